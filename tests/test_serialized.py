"""plaintrain.data.serialized: blocks of bytes that are shared, and arrays beside them."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest

from plaintrain.data.serialized import SerializedRecords, no_garbage_collection
from plaintrain.structures import BoxMode


def _annotation(label=0, box=(1, 2, 3, 4), mode=BoxMode.XYWH_ABS, **more):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": label, **more}


def _record(number, *annotations):
    size = {"height": 30 + number, "width": 40}
    return {"file_name": f"{number}.png", "image_id": number, **size, "annotations": list(annotations)}


def test_joined_and_taken_records_are_the_same_records_without_their_bytes_copied():
    parts = [SerializedRecords([_record(i + start) for i in range(3)]) for start in (0, 3, 6)]
    joined = SerializedRecords.join(parts)
    assert list(joined) == [_record(i) for i in range(9)]
    assert joined.lengths == [3, 3, 3]
    taken = SerializedRecords.join([joined.take(np.array([7, 0, 4])), parts[1]])
    assert [record["image_id"] for record in taken] == [7, 0, 4, 3, 4, 5]
    assert taken[-1] == _record(5)
    assert taken.lengths == [3, 3]
    assert taken.columns["file_name"].tolist() == [f"{i}.png" for i in (7, 0, 4, 3, 4, 5)]
    assert taken.columns["height"].tolist() == [37, 30, 34, 33, 34, 35]
    assert {block._bytes.data_ptr() for block in taken._blocks} == {
        part._blocks[0]._bytes.data_ptr() for part in parts
    }
    assert len(joined.take(np.array([], dtype=np.int64))) == 0


def test_what_is_sent_to_a_worker_leaves_the_arrays_behind():
    records = SerializedRecords([_record(i, _annotation()) for i in range(3)])
    sent = pickle.loads(pickle.dumps(records))  # noqa: S301 - bytes made here
    assert list(sent) == list(records)
    assert sent.columns is None
    assert sent.annotations is None


def test_the_table_holds_the_annotations_in_their_order():
    first = _annotation(2, (1, 2, 3, 4), iscrowd=1)
    second = _annotation(0, (1.5, 2, 3, 4), BoxMode.XYXY_ABS, keypoints=[1, 2, 2, 3, 4, 0, 5, 6, 1])
    table = SerializedRecords([_record(0), _record(1, first, second), _record(2, _annotation())]).annotations
    assert table.record.tolist() == [1, 1, 2]
    assert table.boxes.tolist() == [[1, 2, 4, 6], [1.5, 2, 3, 4], [1, 2, 4, 6]]
    assert table.labels.tolist() == [2, 0, 0]
    assert table.crowd.tolist() == [True, False, False]
    assert table.keypoints.tolist() == [0, 2, 0]


def test_numbers_of_numpy_and_tuples_are_read_too():
    annotations = [_annotation(np.int64(1), np.array([1, 2, 3, 4.5])), _annotation(box=(1, 2, 3, 4))]
    annotations[1]["bbox"] = (1, 2, 3, 4)
    table = SerializedRecords([_record(0, *annotations)]).annotations
    assert table.boxes.tolist() == [[1, 2, 4, 6.5], [1, 2, 4, 6]]


def test_records_without_annotations_have_an_empty_table():
    for records in ([], [_record(0)]):
        assert SerializedRecords(records).annotations.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"category_id": True},
        {"category_id": 1.0},
        {"category_id": "1"},
        {"category_id": 2**70},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, "4"]},
        {"bbox": [1, 2, 3, None]},
        {"bbox": [1, 2, 3, float("inf")]},
        {"bbox": 3},
        {"bbox_mode": 2},
        {"bbox_mode": None},
        {"keypoints": ["a", "b", "c"]},
    ],
)
def test_an_annotation_that_cannot_be_read_leaves_no_table_but_the_records(change):
    records = [_record(0, _annotation()), _record(1, {**_annotation(), **change})]
    packed = SerializedRecords(records)
    assert packed.annotations is None
    assert packed.columns is not None
    assert list(packed) == records


@pytest.mark.parametrize("key", ["file_name", "height", "width"])
def test_a_missing_column_is_no_error_until_it_is_needed(key):
    record = _record(0)
    del record[key]
    packed = SerializedRecords([_record(1), record])
    assert packed.columns is None
    assert packed.annotations is None
    assert SerializedRecords.join([SerializedRecords([_record(1)]), packed]).columns is None


def test_the_collector_is_off_in_the_block_and_as_before_after_it():
    assert gc.isenabled()
    with pytest.raises(KeyError), no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


@pytest.mark.parametrize("change", [{"file_name": Path("0.png")}, {"height": "30"}, {"width": 40.5}])
def test_columns_hold_what_they_are_said_to(change):
    assert SerializedRecords([_record(0)]).columns is not None
    assert SerializedRecords([{**_record(0), **change}]).columns is None
