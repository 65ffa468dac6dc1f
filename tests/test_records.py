"""plaintrain.data.records: which images of a dataset are trained on, and what is said about them."""

import os

import pytest

from plaintrain.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from plaintrain.data.records import check_image_files
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

TRIANGLE = [[1, 1, 9, 1, 1, 9]]


@pytest.fixture
def register():
    """Function (name, *annotations of an image): a dataset of images of 40x30."""

    def make(name, *images):
        records = [
            {
                "file_name": f"{name}/{i}.png",
                "image_id": i,
                "height": 30,
                "width": 40,
                "annotations": annotations,
            }
            for i, annotations in enumerate(images)
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


def test_images_with_too_few_labelled_keypoints_are_left_out_and_counted(register, log):
    register(
        "people",
        [_object(2, 1, 0)],
        [_object(2, 0, 0), _object(0, 0, 1)],
        [_object(0, 2, 0), _object()],
        [_object(0, 0, 0)],
        [_object(2, 2, 2, iscrowd=1), _object()],
        [],
    )
    expected = {0: [0, 1, 2, 3, 4], 1: [0, 1, 2], 2: [0, 1], 3: []}
    for number in (0, 1, 2):
        assert _ids(get_detection_dataset_dicts("people", min_keypoints=number)) == expected[number]
    assert "people: 3 images with too few labelled keypoints are left out" in log.text
    assert "people: 1 images without annotations are left out" in log.text
    with pytest.raises(UserError, match="no image with annotations is left in people"):
        get_detection_dataset_dicts("people", min_keypoints=3)
    assert _ids(get_detection_dataset_dicts("people", filter_empty=False)) == [0, 1, 2, 3, 4, 5]
    assert _ids(get_detection_dataset_dicts("people", False, min_keypoints=1)) == [0, 1, 2]


def test_keypoints_of_a_dropped_box_do_not_count(register):
    register("people", [_object(2, 2, bbox=[50, 50, 3, 3]), _object(2)], [_object(2, 2)])
    assert _ids(get_detection_dataset_dicts("people", min_keypoints=2)) == [1]


def test_masks_need_a_segmentation_of_every_object(register):
    crowd, gone = _object(iscrowd=1), _object(bbox=[0, 0, 0, 0])
    register("good", [_object(segmentation=TRIANGLE), crowd, gone])
    assert len(get_detection_dataset_dicts("good", need_masks=True)) == 1
    register("bad", [_object(segmentation=TRIANGLE)], [_object(segmentation=TRIANGLE), _object()])
    assert len(get_detection_dataset_dicts("bad")) == 2
    with pytest.raises(UserError, match=r"MASK_ON needs a segmentation.* bad/1\.png has none"):
        get_detection_dataset_dicts(("good", "bad"), need_masks=True)


def test_lengths_are_those_of_the_datasets_after_filtering(register):
    register("one", [_object()], [], [_object()])
    register("two", [], [_object(bbox=[1, 1, 0, 0])], [_object()])
    register("none", [])
    records = get_detection_dataset_dicts(("one", "none", "two"))
    assert records.lengths == [2, 0, 1]
    assert _ids(records) == [0, 2, 2]
    assert get_detection_dataset_dicts(("two", "one"), filter_empty=False).lengths == [3, 3]


def test_only_the_bad_boxes_of_an_image_are_dropped_whatever_is_around_it(register):
    good, bad = _object(), _object(bbox=[1, 1, 0, 3])
    kinds = {"g": good, "b": bad}
    texts = ["gbg", "", "g", "bb", "bg", "gg", "gb"]
    register("mixed", *[[{**kinds[c], "area": i} for i, c in enumerate(text)] for text in texts])
    kept = [[a["area"] for a in r["annotations"]] for r in get_detection_dataset_dicts("mixed", False)]
    assert kept == [[0, 2], [], [0], [], [1], [0, 1], [0]]


def test_a_fault_in_any_dataset_is_named_though_the_first_is_fine(register):
    register("one", [_object()])
    register("two", [_object()], [_object(), _object(category_id=2)])
    with pytest.raises(UserError, match=r"two/1\.png has category_id 2"):
        get_detection_dataset_dicts(("one", "two"))


def test_sizes_that_are_no_numbers_are_refused(register):
    register("odd", [_object()])
    DatasetCatalog._functions["odd"]()[0]["height"] = None
    with pytest.raises(UserError, match="the dataset odd"):
        get_detection_dataset_dicts("odd")


def test_folders_are_listed_once_for_each_loaded_dataset(register, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register("files", [], [_object()])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "1.png").touch()
    for _ in range(2):
        with pytest.raises(UserError, match=r"does not exist: files/0\.png$"):
            check_image_files(DatasetCatalog.get("files"), "files")
    check_image_files(get_detection_dataset_dicts("files"), "files")
    (tmp_path / "files" / "0.png").touch()
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (listed.append(path), listdir(path))[1])
    for _ in range(3):
        check_image_files(DatasetCatalog.get("files"), "files")
    assert listed == ["files"]
    DatasetCatalog.remove("files")
    register("files", [], [_object()], [])
    with pytest.raises(UserError, match=r"does not exist: files/2\.png$"):
        check_image_files(DatasetCatalog.get("files"), "files")
