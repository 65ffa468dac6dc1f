"""plaintrain.data.records and serialized: the records of a training set, checked, cleaned and shared."""

import gc
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401 - it teaches ForkingPickler tensors
from hostile_helpers import rejected
from torch.utils.data import DataLoader

from plaintrain.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from plaintrain.data.serialized import SerializedRecords, disable_gc
from plaintrain.data.validation import check_records
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

TRIANGLE = [[1, 1, 9, 1, 1, 9]]


@pytest.fixture
def register():
    """Function (name, *annotations of an image): a dataset of images of 40x30."""

    def make(name, *images):
        records = [
            {"file_name": f"{name}/{i}.png", "image_id": i, "height": 30, "width": 40, "annotations": objects}
            for i, objects in enumerate(images)
        ]
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=["a", "b"])

    return make


def _object(*visibility, **more):
    """An annotation with a keypoint for each visibility."""
    keypoints = [number for v in visibility for number in (3, 4, v)]
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return {**box, **({"keypoints": keypoints} if keypoints else {}), **more}


def _ids(records):
    return [record["image_id"] for record in records]


def test_images_with_too_few_labelled_keypoints_are_skipped(register, log):
    register(
        "people",
        [_object(2, 1, 0)],
        [_object(2, 0, 0), _object(0, 0, 1)],
        [_object(0, 2, 0), _object()],
        [_object(0, 0, 0)],
        [_object(2, 2, 2, iscrowd=1), _object()],
        [],
    )
    for number, expected in enumerate(([0, 1, 2, 3, 4], [0, 1, 2], [0, 1])):
        assert _ids(get_detection_dataset_dicts("people", min_keypoints=number)) == expected
    assert "people: skipped 3 images with too few labelled keypoints" in log.text
    assert "people: skipped 1 images without annotations" in log.text
    words = "left in people: of 6 images 1 have none, and 5 have too few labelled keypoints"
    rejected(words, by=lambda: get_detection_dataset_dicts("people", min_keypoints=3))
    assert _ids(get_detection_dataset_dicts("people", filter_empty=False)) == [0, 1, 2, 3, 4, 5]
    assert _ids(get_detection_dataset_dicts("people", False, min_keypoints=1)) == [0, 1, 2]
    # Those of a dropped box do not count.
    register("outside", [_object(2, 2, bbox=[50, 50, 3, 3]), _object(2)], [_object(2, 2)])
    assert _ids(get_detection_dataset_dicts("outside", min_keypoints=2)) == [1]


def test_masks_and_keypoints_are_checked_before_training(register):
    crowd, gone = _object(iscrowd=1), _object(bbox=[0, 0, 0, 0])
    register("good", [_object(segmentation=TRIANGLE), crowd, gone])
    assert len(get_detection_dataset_dicts("good", need_masks=True)) == 1
    register("bad", [_object(segmentation=TRIANGLE)], [_object(segmentation=TRIANGLE), _object()])
    assert len(get_detection_dataset_dicts("bad")) == 2
    words = "bad/1.png has no segmentation; MODEL.MASK_ON needs"
    rejected(words, by=lambda: get_detection_dataset_dicts(("good", "bad"), need_masks=True))
    register("people", [_object(2, 2, 2)])
    MetadataCatalog.get("people").set(keypoint_names=["head", "foot"])
    words = "people/0.png has 9 numbers as keypoints, not 3 x 2"
    rejected(words, by=lambda: get_detection_dataset_dicts("people", min_keypoints=1))
    register("rle", [_object(segmentation={"size": [30, 40], "counts": "h"})])
    words = "of rle/0.png has ", "counts do not add up to 30 x 40"
    rejected(*words, by=lambda: get_detection_dataset_dicts("rle", need_masks=True))


def test_datasets_are_filtered_counted_and_joined_if_their_classes_agree(register, log):
    register("one", [_object()], [], [_object()])
    register("two", [], [_object(bbox=[1, 1, 0, 0])], [_object()])
    register("none", [])
    records = get_detection_dataset_dicts(("one", "none", "two"))
    assert records.lengths == [2, 0, 1]
    assert _ids(records) == [0, 2, 2]
    assert get_detection_dataset_dicts(("two", "one"), filter_empty=False).lengths == [3, 3]
    kinds = {"g": _object(), "b": _object(bbox=[1, 1, 0, 3])}
    texts = ["gbg", "", "g", "bb", "bg", "gg", "gb"]
    register("mixed", *[[{**kinds[c], "area": i} for i, c in enumerate(text)] for text in texts])
    kept = [[a["area"] for a in r["annotations"]] for r in get_detection_dataset_dicts("mixed", False)]
    assert kept == [[0, 2], [], [0], [], [1], [0, 1], [0]]
    joined = get_detection_dataset_dicts(("two", "one"))
    assert [record["file_name"].split("/")[0] for record in joined] == ["two", "one", "one"]
    register("three", [_object()])
    MetadataCatalog.get("three").set(thing_classes=["b", "a"])
    words = "one and three have different classes: ['a', 'b'] and ['b', 'a']"
    rejected(words, by=lambda: get_detection_dataset_dicts(("one", "three")))
    log.set_level("DEBUG", "plaintrain")
    register("few", [_object(), _object(iscrowd=1)], [_object(category_id=1)])
    get_detection_dataset_dicts("few")
    assert "few: 2 images, 3 boxes (1 crowds) of 2 classes" in log.text
    rows = [line.split() for line in log.text.splitlines()]
    assert ["a", "2"] in rows and ["b", "1"] in rows


def test_training_warns_of_boxes_as_check_records_does(register, log):
    boxes = [[5, 5, 0, 3], [5, 5, 3, -1], [50, 5, 3, 3], [-9, -9, 5, 5], [5, 45, 3, 3]]
    boxes += [[20, 5, 30, 5], [20, 5, 20.4, 5]]
    register("one", [_object(bbox=box) for box in boxes])
    findings = check_records(DatasetCatalog.get("one"), MetadataCatalog.get("one"))
    assert [a["bbox"] for a in get_detection_dataset_dicts("one")[0]["annotations"]] == boxes[5:]
    # The registered records stay as they are.
    assert len(DatasetCatalog.get("one")[0]["annotations"]) == 7
    warnings = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert warnings == [
        "one: boxes without area, which training drops: 2",
        "one: boxes outside their image, which training drops: 3",
        "one: boxes more than half a pixel outside their image, which training clips: 1",
    ]
    assert warnings == [f"one: {f}".split("\n")[0] for f in findings if "box" in f.type]
    register("two", [_object(area=12), _object(area=1200)])
    get_detection_dataset_dicts("two")
    for words in ("two: objects annotated twice", "less than a pixel apart: 1", "two: areas that contradict"):
        assert words in log.text
    register("shares", [_object()], [_object(bbox=[0.3, 0.2, 0.5, 0.4])])
    rejected("shares: boxes normalized to 0..1", by=lambda: get_detection_dataset_dicts("shares"))


def _holding(**change):
    return {"annotations": [_object(**change)]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": None}, "the dataset odd has the height None"),
        ({"height": "30"}, "the dataset odd has the height '30'"),
        ({"width": 40.5}, "the dataset odd has the width 40.5"),
        ({"file_name": Path("a.png")}, "the dataset odd has the file_name PosixPath"),
        *(
            (_holding(category_id=v), f"odd.png has category_id {v!r}, .* 2 classes .*0 to 1")
            for v in (2, -1, "a", 1.0, True, 2**70)
        ),
        (_holding(bbox=None), "of odd.png has the box None"),
        (_holding(bbox=[1, 2, float("nan"), 4]), r"odd.png.*\[1, 2, nan, 4\]"),
        *((_holding(bbox=[1, 2, 3, *more]), r"odd.png.*\[1, 2, 3") for more in ((), ("4",), (None,))),
        (_holding(bbox_mode=7), "odd.png.*7"),
        (_holding(bbox_mode=None), "odd.png has the bbox_mode None"),
        (_holding(keypoints=["a", "b", "c"]), "annotations of odd.png cannot be read"),
    ],
    ids=str,
)
def test_malformed_records_are_named(register, change, words):
    register("good", [_object()])
    register("odd", [_object()], [_object()])
    DatasetCatalog["odd"]()[1].update({"file_name": "odd.png", **change})
    with pytest.raises(UserError, match=words):
        get_detection_dataset_dicts(("good", "odd"))


def test_missing_keys_of_records_and_annotations_are_named(register):
    keys = "file_name", "image_id", "height", "width", "annotations", "bbox", "bbox_mode", "category_id"
    for i, key in enumerate(keys):
        register(f"odd {i}", [_object()], [_object()])
        record = DatasetCatalog[f"odd {i}"]()[1]
        del (record if key in record else record["annotations"][0])[key]
        rejected(f"odd {i}", f" no {key}", by=lambda i=i: get_detection_dataset_dicts(f"odd {i}"))


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
    # Joined and taken ones are the same, without their bytes copied.
    parts = [SerializedRecords([_record(i + start) for i in range(3)]) for start in (0, 3, 6)]
    joined = SerializedRecords.join(parts)
    assert list(joined) == [_record(i) for i in range(9)]
    assert joined.lengths == [3, 3, 3]
    taken = SerializedRecords.join([joined.take(np.array([7, 0, 4])), parts[1]])
    assert [record["image_id"] for record in taken] == [7, 0, 4, 3, 4, 5]
    assert taken[-1] == _record(5)
    assert taken.lengths == [3, 3]
    assert taken.columns["height"].tolist() == [37, 30, 34, 33, 34, 35]
    assert {data.data_ptr() for data, _ in taken._blocks} == {part._blocks[0][0].data_ptr() for part in parts}
    assert list(joined.take(np.array([], dtype=np.int64))) == []


def test_workers_receive_shared_bytes_without_the_arrays():
    packed = SerializedRecords([_record(i, _object()) for i in range(7)])
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
    first = _object(category_id=np.int64(2), iscrowd=1)
    second = _object(2, 0, 1, bbox=[1.5, 2, 3, 4], bbox_mode=BoxMode.XYXY_ABS)
    third = _object(bbox=np.array([1, 2, 3, 4.5]))
    table = SerializedRecords([_record(0), _record(1, first, second), _record(2, third)]).annotations
    assert table.record.tolist() == [1, 1, 2]
    assert table.boxes.tolist() == [[1, 2, 4, 6], [1.5, 2, 3, 4], [1, 2, 4, 6.5]]
    assert table.labels.tolist() == [2, 0, 0]
    assert table.crowd.tolist() == [True, False, False]
    assert table.keypoints.tolist() == [0, 2, 0]
    for records in ([], [_record(0)]):
        assert SerializedRecords(records).annotations.boxes.shape == (0, 4)
    # What cannot be read leaves no table, and odd sizes no columns.
    bad = SerializedRecords([_record(0, _object()), _record(1, _object(bbox=[1, 2, 3]))])
    assert bad.annotations is None and bad.columns is not None
    assert SerializedRecords([_record(1), _record(0) | {"width": 40.5}]).columns is None


def test_no_garbage_collection_restores_the_collector():
    with pytest.raises(KeyError), disable_gc():
        with disable_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
