"""plaintrain.data.serialized: blocks of bytes that are shared, and arrays beside them."""

import gc
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401 - it teaches ForkingPickler tensors
from torch.utils.data import DataLoader

from plaintrain.data.serialized import SerializedRecords, no_garbage_collection
from plaintrain.structures import BoxMode


def _annotation(label=0, box=(1, 2, 3, 4), mode=BoxMode.XYWH_ABS, **more):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": label, **more}


def _record(number, *annotations):
    size = {"height": 30 + number, "width": 40}
    return {"file_name": f"{'ü' * number}.png", "image_id": number, **size, "annotations": list(annotations)}


def test_serialized_records_read_like_the_list_they_hold():
    plain = [_record(i) for i in range(5)]
    packed = SerializedRecords(plain)
    assert len(packed) == 5
    assert list(packed) == plain
    assert [packed[i] for i in range(-5, 5)] == [plain[i] for i in range(-5, 5)]
    for part in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(3, 99), slice(4, 1)):
        assert packed[part] == plain[part]
    for records, index in ((packed, 5), (packed, -6), (SerializedRecords([]), 0)):
        with pytest.raises(IndexError):
            records[index]
    # Each access gives a record of its own.
    packed[1]["annotations"].append(1)
    assert packed[1] == plain[1]


def test_joined_and_taken_records_are_the_same_without_their_bytes_copied():
    parts = [SerializedRecords([_record(i + start) for i in range(3)]) for start in (0, 3, 6)]
    joined = SerializedRecords.join(parts)
    assert list(joined) == [_record(i) for i in range(9)]
    assert joined.lengths == [3, 3, 3]
    taken = SerializedRecords.join([joined.take(np.array([7, 0, 4])), parts[1]])
    assert [record["image_id"] for record in taken] == [7, 0, 4, 3, 4, 5]
    assert taken[-1] == _record(5)
    assert taken.lengths == [3, 3]
    assert taken.columns["height"].tolist() == [37, 30, 34, 33, 34, 35]
    assert {block._bytes.data_ptr() for block in taken._blocks} == {
        part._blocks[0]._bytes.data_ptr() for part in parts
    }
    assert list(joined.take(np.array([], dtype=np.int64))) == []


def test_workers_receive_shared_bytes_without_the_arrays():
    packed = SerializedRecords([_record(i, _annotation()) for i in range(7)])
    received = pickle.loads(pickle.dumps(packed))  # noqa: S301 - own bytes
    assert list(received) == list(packed)
    assert (received.columns, received.annotations) == (None, None)
    # The bytes stay in shared memory and are not sent to a spawned worker.
    sent = bytes(ForkingPickler.dumps(SerializedRecords([{"text": "x" * 10**6}])))
    assert len(sent) < 10_000
    assert pickle.loads(sent)[0] == {"text": "x" * 10**6}  # noqa: S301 - own bytes
    loader = DataLoader(packed, batch_size=None, collate_fn=lambda record: record, num_workers=1)
    assert list(loader) == list(packed)


def test_the_table_holds_the_annotations_in_their_order():
    first = _annotation(np.int64(2), (1, 2, 3, 4), iscrowd=1)
    second = _annotation(0, (1.5, 2, 3, 4), BoxMode.XYXY_ABS, keypoints=[1, 2, 2, 3, 4, 0, 5, 6, 1])
    third = {**_annotation(), "bbox": np.array([1, 2, 3, 4.5])}
    table = SerializedRecords([_record(0), _record(1, first, second), _record(2, third)]).annotations
    assert table.record.tolist() == [1, 1, 2]
    assert table.boxes.tolist() == [[1, 2, 4, 6], [1.5, 2, 3, 4], [1, 2, 4, 6.5]]
    assert table.labels.tolist() == [2, 0, 0]
    assert table.crowd.tolist() == [True, False, False]
    assert table.keypoints.tolist() == [0, 2, 0]
    for records in ([], [_record(0)]):
        assert SerializedRecords(records).annotations.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "change",
    [
        *({"category_id": label} for label in (True, 1.0, "1", 2**70)),
        *({"bbox": box} for box in ([1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, np.inf], 3)),
        *({"bbox_mode": 2}, {"bbox_mode": None}, {"keypoints": ["a", "b", "c"]}),
    ],
    ids=str,
)
def test_unreadable_annotations_leave_no_table_but_the_records(change):
    records = [_record(0, _annotation()), _record(1, {**_annotation(), **change})]
    packed = SerializedRecords(records)
    assert packed.annotations is None
    assert packed.columns is not None
    assert list(packed) == records


@pytest.mark.parametrize("change", [{"file_name": Path("0.png")}, {"height": "30"}, {"width": 40.5}, None])
def test_columns_need_every_key_in_its_type(change):
    record = _record(0) | (change or {})
    if not change:
        del record["height"]
    packed = SerializedRecords([_record(1), record])
    assert packed.columns is None
    assert SerializedRecords.join([SerializedRecords([_record(1)]), packed]).columns is None


def test_no_garbage_collection_restores_the_collector():
    with pytest.raises(KeyError), no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
