"""plaintrain.data.concat: several datasets as one; and a fraction of a dataset."""

import json

import pytest
from hostile_helpers import rejected

from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.catalog import class_names
from plaintrain.data.coco import register_coco_instances
from plaintrain.utils.errors import UserError


@pytest.fixture
def part(tmp_path):
    """Function (name, class names, image ids) that declares a COCO dataset, an object of each class."""

    def make(name, classes, image_ids=(1, 2), first_id=1, **keys):
        images = [{"id": i, "file_name": f"{name}-{i}.png", "height": 9, "width": 9} for i in image_ids]
        categories = [{"id": first_id + i, "name": c, **keys} for i, c in enumerate(classes)]
        box = {"image_id": image_ids[0], "bbox": [1, 1, 4, 4]}
        annotations = [{"id": i, "category_id": c["id"], **box} for i, c in enumerate(categories)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        declare_dataset(name, {"FORMAT": "coco", "JSON": str(path), "IMAGE_ROOT": ""})

    return make


def _join(*names, name="both", **keys):
    declare_dataset(name, {"FORMAT": "concat", "DATASETS": list(names), **keys})
    return list(DatasetCatalog.get(name))


def _labels(records):
    return [[a["category_id"] for a in record["annotations"]] for record in records]


def test_datasets_of_equal_classes_are_joined_in_order(part):
    part("one", ["cat", "dog"], (1, 2))
    part("two", ["cat", "dog"], (3, 4))
    records = _join("two", "one")
    assert [record["image_id"] for record in records] == [3, 4, 1, 2]
    assert _labels(records) == [[0, 1], [], [0, 1], []]
    assert class_names("both") == ["cat", "dog"]
    metadata = MetadataCatalog.get("both")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}


def test_image_ids_that_collide_get_their_datasets_name(part):
    part("one", ["cat"], (1, 2))
    part("two", ["cat"], (2, 3))
    assert [r["image_id"] for r in _join("one", "two")] == ["one/1", "one/2", "two/2", "two/3"]
    part("three", ["cat"], ("1", "x"))
    assert [r["image_id"] for r in _join("one", "three", name="mixed")][::2] == ["one/1", "three/1"]


def test_differing_classes_are_rejected_with_the_difference(part):
    part("one", ["cat", "dog"])
    part("two", ["cat", "cow"])
    with pytest.raises(UserError, match=r"one.*two.*missing \['dog'\].*additional \['cow'\].*MERGE_CLASSES"):
        _join("one", "two")
    part("three", ["dog", "cat"])
    rejected("another order", by=lambda: _join("one", "three", name="reordered"))


def test_merged_classes_are_in_order_of_first_appearance(part):
    part("one", ["dog", "cat"], (1, 2))
    part("two", ["cow", "dog"], (3, 4), first_id=7)
    records = _join("one", "two", MERGE_CLASSES=True)
    assert class_names("both") == ["dog", "cat", "cow"]
    assert _labels(records) == [[0, 1], [], [2, 0], []]
    # dog is 1 there and 8 here.
    assert MetadataCatalog.get("both").thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    part("three", ["cat", "cow"], (5, 6), first_id=2)
    _join("one", "three", name="agreeing", MERGE_CLASSES=True)
    assert MetadataCatalog.get("agreeing").thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}


def test_classes_choose_order_and_may_be_in_no_part(part, log):
    part("one", ["cat", "dog"], (1, 2))
    part("two", ["cow", "dog"], (3, 4))
    records = _join("one", "two", CLASSES=["dog", "catt", "cow"])
    assert class_names("both") == ["dog", "catt", "cow"]
    assert _labels(records) == [[0], [], [2, 0], []]
    assert "'catt'; the nearest is 'cat'" in log.text
    rejected("twice", by=lambda: _join("one", name="again", CLASSES=["dog", "dog"]))


def test_class_ids_that_their_dataset_does_not_have_are_rejected(part):
    part("one", ["cat", "dog", "cow"], (1, 2))
    box = {"bbox": [1, 1, 4, 4], "bbox_mode": 0, "category_id": -1}
    record = {"file_name": "own.png", "image_id": 7, "height": 9, "width": 9, "annotations": [box]}
    DatasetCatalog.register("own", lambda: [record])
    MetadataCatalog.get("own").set(thing_classes=["cat", "dog"])
    rejected("own.png has category_id -1", by=lambda: _join("own", "one", MERGE_CLASSES=True))


def test_keypoint_names_are_kept_where_they_are_equal(part):
    names = {"keypoints": ["head", "tail"], "skeleton": [[1, 2]]}
    part("one", ["cat"], (1, 2), **names)
    part("two", ["cat"], (3, 4))
    part("three", ["cat"], (5, 6), keypoints=["nose"])
    _join("one", "two")
    assert MetadataCatalog.get("both").keypoint_names == ["head", "tail"]
    assert MetadataCatalog.get("both").skeleton == [[1, 2]]
    _join("one", "three", name="other")
    assert MetadataCatalog.get("other").get("keypoint_names") is None


def test_other_formats_concatenations_and_registered_datasets_can_be_joined(tiny_coco, tiny_voc):
    register_coco_instances("pets", {}, str(tiny_coco.json), str(tiny_coco.images))
    declare_dataset("zoo", {"FORMAT": "voc", "ROOT": str(tiny_voc.root), "SPLIT": "train"})
    _join("pets", "zoo", name="inner", MERGE_CLASSES=True)
    declare_dataset("shapes", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 3})
    records = _join("inner", "shapes", MERGE_CLASSES=True)
    assert len(records) == 3 + 2 + 3
    assert class_names("both")[:4] == ["cat", "person", "dog", "ant"]
    assert records[0]["image_id"] == "inner/pets/2"


def test_unknown_datasets_circles_and_doubles_are_rejected(part, write_image, tmp_path):
    part("one", ["cat"])
    declare_dataset("a", {"FORMAT": "concat", "DATASETS": ["one", "b"]})
    declare_dataset("b", {"FORMAT": "concat", "DATASETS": ["a"]})
    write_image(tmp_path / "images/a.png", 9, 9)
    declare_dataset("pictures", {"FORMAT": "images", "ROOT": str(tmp_path / "images")})
    for names, words in (
        (["onne"], "'onne', which is no dataset; the nearest is one"),
        (["a"], "circle: a -> b -> a"),
        (["one", "one"], "each once"),
        ([], "one or more"),
        (["pictures"], "pictures names no classes"),
    ):
        with pytest.raises(UserError, match=words):
            _join(*names, name=words)


def _fraction(name, **keys):
    size = {"HEIGHT": 16, "WIDTH": 16, "NUM": 40}
    declare_dataset(name, {"FORMAT": "shapes", "SPLIT": "val", **size, **keys})
    return [record["image_id"] for record in DatasetCatalog.get(name)]


def test_a_fraction_is_a_fixed_random_subset_in_order():
    tenth, half = _fraction("tenth", FRACTION=0.1), _fraction("half", FRACTION=0.5)
    assert (len(tenth), len(half)) == (4, 20)
    assert half == sorted(half) != list(range(1, 21))
    assert half == _fraction("again", FRACTION=0.5)
    assert half != _fraction("other", FRACTION=0.5, FRACTION_SEED=1)
    assert set(tenth) < set(half)
    assert _fraction("all", FRACTION=1) == list(range(1, 41))
    assert len(_fraction("little", FRACTION=0.001)) == 1
    # 0.07 * 100 is 7.000000000000001.
    assert len(_fraction("some", FRACTION=0.07, NUM=100)) == 7
