"""plaintrain.data.datasets.coco: the reader of COCO JSON."""

import gc
import itertools
import json

import pytest
from hostile_helpers import rejected

from plaintrain.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from plaintrain.data.catalog import load_class_names
from plaintrain.data.datasets.coco import (
    convert_to_coco_dict,
    load_coco_json,
    load_coco_results,
    read_coco_json,
)
from plaintrain.structures import BoxMode

NAN = float("nan")
DELETED = object()


def _load(files, classes=None, problems=None):
    files.save()
    return read_coco_json(str(files.json), str(files.images), classes, problems)


def test_records_hold_detectron2s_keys(tiny_coco):
    tiny_coco.content["annotations"][0]["segmentation"] = []
    del tiny_coco.content["annotations"][1]["iscrowd"]
    records, metadata = _load(tiny_coco)
    assert [record["image_id"] for record in records] == [2, 5, 11]
    empty = {"file_name": str(tiny_coco.images / "empty.png"), "image_id": 5, "height": 24, "width": 20}
    assert records[1] == {**empty, "annotations": []}
    dog, cat = records[2]["annotations"]
    keys = {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    assert dog == {"bbox": [4, 5, 10.5, 8], "category_id": 2, **keys}
    box = {"bbox": [20, 10, 15, 15], "category_id": 0, "area": 225, **keys}
    assert cat == {**box, "segmentation": [[20, 10, 35, 10, 35, 25, 20, 25]]}
    crowd, person = records[0]["annotations"]
    assert crowd["iscrowd"] == 1
    assert crowd["segmentation"] == {"size": [40, 30], "counts": [0, 600, 600]}
    # A pixel's centre is half a pixel from its corner.
    assert person["keypoints"] == [5.5, 6.5, 2, 20.5, 30.5, 1]
    assert metadata == {
        "thing_classes": ["cat", "person", "dog"],
        "thing_dataset_id_to_contiguous_id": {3: 0, 5: 1, 7: 2},
        "keypoint_names": ["head", "foot"],
    }
    assert gc.isenabled()


def test_keypoint_metadata_is_kept_unless_categories_contradict(tiny_coco):
    tiny_coco.content["categories"][2]["skeleton"] = [[1, 2]]
    assert _load(tiny_coco)[1]["skeleton"] == [[1, 2]]
    tiny_coco.content["categories"][0]["keypoints"] = ["nose"]
    assert "keypoint_names" not in _load(tiny_coco)[1]
    assert _load(tiny_coco, ["dog", "cat"])[1]["keypoint_names"] == ["nose"]
    # Without names there may be any number of keypoints.
    del tiny_coco.content["categories"][0]["keypoints"]
    del tiny_coco.content["categories"][2]["keypoints"]
    tiny_coco.content["annotations"][3]["keypoints"] = [0, 0, 0, 20, 30, 2, 1, 2, 1]
    records, metadata = _load(tiny_coco)
    assert records[0]["annotations"][1]["keypoints"] == [0, 0, 0, 20.5, 30.5, 2, 1.5, 2.5, 1]
    assert "keypoint_names" not in metadata
    tiny_coco.content["annotations"][3]["keypoints"] = [1, 2, 2, 4]
    rejected("annotation 103", "4 numbers", by=lambda: _load(tiny_coco))


def test_classes_choose_and_order_categories(tiny_coco, log):
    records, metadata = _load(tiny_coco, ["dog", "person"])
    assert metadata["thing_classes"] == ["dog", "person"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {7: 0, 5: 1}
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[1], [], [0]]
    rejected("instances.json", "'dgo'", "'dog'", by=lambda: _load(tiny_coco, ["dgo", "cat", "person"]))
    assert _load(tiny_coco, [])[1]["thing_classes"] == ["cat", "person", "dog"]
    ids = _load(tiny_coco, ["cow", "dog", "person", "cat"])[1]["thing_dataset_id_to_contiguous_id"]
    assert ids == {8: 0, 7: 1, 5: 2, 3: 3}
    assert "has no class 'cow'" in log.text


def test_files_of_other_tools_are_accepted(tiny_coco):
    content = tiny_coco.content
    expected = _load(tiny_coco)
    # Roboflow's root category, and numbers of other programs.
    root = {"id": 0, "name": "dog", "supercategory": "none"}
    content["categories"] = [root, *({**c, "supercategory": "dog"} for c in content["categories"])]
    for entry in itertools.chain(*content.values()):
        entry |= {key: float(value) for key, value in entry.items() if isinstance(value, int)}
    assert _load(tiny_coco) == expected
    root["name"] = content["categories"][2]["supercategory"] = "animal"
    del content["annotations"][1]["bbox"]
    content["annotations"][2] |= {"bbox": None, "category_id": 0}
    assert _load(tiny_coco)[1]["thing_classes"] == ["animal", "cat", "person", "dog"]
    boxes = [annotation["bbox"] for record in _load(tiny_coco)[0] for annotation in record["annotations"]]
    assert boxes == [[0, 0, 15, 40], [3, 4, 20, 30], [4, 5, 10.5, 8], [20, 10, 15, 15]]
    del content["annotations"]
    assert [record["annotations"] for record in _load(tiny_coco)[0]] == [[], [], []]


def test_image_ids_may_be_strings_and_file_names_absolute(tiny_coco):
    for image in tiny_coco.content["images"]:
        image["id"] = f"image-{image['id']}"
    for annotation in tiny_coco.content["annotations"]:
        annotation["image_id"] = f"image-{annotation['image_id']}"
    # File names may be absolute, or wander below the folder of the images.
    tiny_coco.content["images"][0]["file_name"] = f"{tiny_coco.images}/wide.png"
    tiny_coco.content["images"][1]["file_name"] = "more\\upright.png"
    tiny_coco.save()
    tiny_coco.json.write_bytes(b"\xef\xbb\xbf" + tiny_coco.json.read_bytes())
    records, _ = read_coco_json(str(tiny_coco.json), str(tiny_coco.images))
    assert [record["image_id"] for record in records] == ["image-11", "image-2", "image-5"]
    assert records[0]["file_name"] == f"{tiny_coco.images}/wide.png"
    assert len(records[0]["annotations"]) == 2


def test_files_that_are_not_coco_json_are_rejected(tiny_coco):
    for text, word in (
        *(("{", "JSON"), ("", "JSON"), ("[1]", "images"), ('{"images": []}', "annotations")),
        ('{"images": [3], "annotations": [], "categories": []}', "'images'"),
        ('{"images": [], "annotations": null, "categories": []}', "'annotations'"),
        ('{"images": [], "annotations": [], "categories": null}', "'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "categories"),
    ):
        tiny_coco.json.write_text(text)
        rejected(tiny_coco.json, word, by=lambda: read_coco_json(str(tiny_coco.json), ""))
        assert gc.isenabled()


@pytest.mark.parametrize(
    ("key", "index", "change", "words"),
    [
        ("images", 1, {"id": DELETED}, ["has no id", "upright.png"]),
        ("images", 1, {"height": DELETED}, ["image 2", "has no height"]),
        ("images", 1, {"id": 11}, ["two images with the id 11"]),
        ("images", 1, {"id": "2"}, ["all numbers or all strings"]),
        ("images", 1, {"height": "40"}, ["image 2", "the height '40'"]),
        ("images", 1, {"width": 0}, ["image 2", "the width 0"]),
        ("images", 1, {"height": 60_000, "width": 60_000}, ["image 2", "more pixels"]),
        ("images", 1, {"file_name": None}, ["image 2", "file_name None"]),
        ("images", 1, {"file_name": "more/../../a.png"}, ["image 2", "IMAGE_ROOT"]),
        ("annotations", 2, {"image_id": DELETED}, ["annotation 102", "has no image_id"]),
        ("annotations", 1, {"image_id": 12}, ["annotation 101", "image 12"]),
        ("annotations", 1, {"category_id": 4}, ["annotation 101", "category_id 4", "[3, 5, 7]"]),
        ("annotations", 1, {"category_id": "7"}, ["annotation 101", "category_id '7'"]),
        ("annotations", 3, {"bbox": [1, 2, NAN, 4]}, ["annotation 103", "nan", "four finite numbers"]),
        ("annotations", 3, {"bbox": [10**400, 0, 1.5, 1]}, ["four finite numbers"]),
        ("annotations", 1, {"iscrowd": 2}, ["annotation 101", "iscrowd 2"]),
        ("annotations", 3, {"keypoints": [1, 2, 2] * 3}, ["annotation 103", "9 numbers", "3 x 2"]),
        ("annotations", 3, {"keypoints": [1, 2, 3, 1, 2, 2]}, ["visibility", "[3, 2]"]),
        ("annotations", 3, {"keypoints": [1, 2, 2, NAN, 2, 2]}, ["not finite"]),
        ("categories", 0, {"name": 3}, ["category", "id", "name"]),
        ("categories", 0, {"id": 3}, ["two categories with the id 3"]),
        ("categories", 0, {"name": "cat"}, ["two categories with the name cat"]),
        ("categories", 2, {"keypoints": [1, 2]}, ["keypoints of category person"]),
    ],
)
def test_broken_entries_are_rejected(tiny_coco, key, index, change, words):
    entry = tiny_coco.content[key][index] | change
    tiny_coco.content[key][index] = {k: v for k, v in entry.items() if v is not DELETED}
    rejected(tiny_coco.json, *words, by=lambda: _load(tiny_coco))


def test_broken_entries_are_collected_if_asked_for(tiny_coco):
    images, annotations = tiny_coco.content["images"], tiny_coco.content["annotations"]
    del images[2]["height"]
    annotations[0]["bbox"] = [1, 2]
    annotations[1]["category_id"] = 99
    annotations[2]["image_id"] = 98
    annotations[3]["id"] = annotations[2]["id"]
    problems = []
    records, _ = _load(tiny_coco, problems=problems)
    kinds = [problem.error_type for problem in problems]
    assert kinds == ["duplicate_id", "broken_image", "bad_box", "unknown_class", "unknown_image"]
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [(2, 1), (11, 0)]


BOX = {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9}


def _load_results(files, results, **options):
    path = files.json.parent / "results.json"
    path.write_text(json.dumps(results))
    return load_coco_results(str(files.json), str(files.images), str(path), **options)


def test_detections_become_annotations_with_a_score(tiny_coco):
    del tiny_coco.content["annotations"]
    tiny_coco.save()
    rle = {"size": [30, 40], "counts": [30 * 4 + 5, 8, 30 * 36 - 13]}
    person = {"image_id": 2, "category_id": 5}
    results = [
        BOX,
        {"image_id": 11, "category_id": 3, "score": 0.8, "segmentation": rle},
        {**BOX, "category_id": 3, "score": 0.2},
        {**person, "bbox": [1, 2, 3, 4], "score": 1, "keypoints": [3, 4, 0.3, 5, 6, 7.5]},
        {**person, "score": 0.5, "keypoints": [9, 4, 0.5, 5, 6, 0]},
    ]
    records, metadata = _load_results(tiny_coco, results, score_thresh=0.5)
    assert metadata["thing_classes"] == ["cat", "person", "dog"]
    assert [len(record["annotations"]) for record in records] == [2, 0, 2]
    box, mask = records[2]["annotations"]
    assert (box["bbox"], box["score"], box["category_id"], box["iscrowd"]) == ([1, 2, 3, 4], 0.9, 2, 0)
    assert (mask["bbox"], mask["segmentation"]) == ([4, 5, 1, 8], rle)
    # Keypoints of results have no visibility; without a box, there is the one around them.
    first, second = records[0]["annotations"]
    assert first["keypoints"] == [3.5, 4.5, 2, 5.5, 6.5, 2]
    assert (second["keypoints"], second["bbox"]) == ([9.5, 4.5, 2, 5.5, 6.5, 2], [5, 4, 4, 2])
    assert len(_load_results(tiny_coco, results, classes=["dog"])[0][2]["annotations"]) == 1


def test_broken_detections_are_rejected_or_collected(tiny_coco):
    # tests/test_predictions.py has the mistakes in what every reader of results checks.
    boxless = {"image_id": 2, "category_id": 5, "score": 0.9}
    for detection, words in (
        (BOX | {"image_id": 12}, ["annotation 0", "image 12"]),
        (boxless | {"segmentation": {"counts": "x"}}, ["detection 0", "an RLE of the size None"]),
        (boxless | {"segmentation": {"size": [40, 30], "counts": "h"}}, ["do not add up to 40 x 30"]),
        (boxless | {"keypoints": [1, 2]}, ["detection 0", "2 numbers as keypoints"]),
    ):
        rejected("results.json", *words, by=lambda found=[detection]: _load_results(tiny_coco, found))
    broken = [{"score": "high"}, {"image_id": 12}, {"bbox": [1]}]
    problems = []
    records, _ = _load_results(tiny_coco, [*(BOX | change for change in broken), BOX], problems=problems)
    assert [problem.error_type for problem in problems] == ["broken", "unknown_image", "bad_box"]
    assert [len(record["annotations"]) for record in records] == [0, 0, 1]


def test_register_coco_instances_as_in_detectron2(tiny_coco):
    files = str(tiny_coco.json), str(tiny_coco.images)
    register_coco_instances("pets", {"colour": "red"}, *files)
    metadata = MetadataCatalog.get("pets")
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root, metadata.colour) == (*files, "red")
    assert load_class_names("pets") == ["cat", "person", "dog"]
    assert len(DatasetCatalog.get("pets")) == 3
    rejected("pets", by=lambda: register_coco_instances("pets", {}, *files))
    own = {"thing_classes": ["person", "cat"], "evaluator_type": "pascal_voc"}
    register_coco_instances("few", own, *files)
    labels = [[a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get("few")]
    assert labels == [[1, 0], [], [1]]
    assert MetadataCatalog.get("few").evaluator_type == "pascal_voc"
    records = load_coco_json(*files, "many")
    assert records == _load(tiny_coco)[0] == load_coco_json(*files)
    assert MetadataCatalog.get("many").as_dict()["thing_classes"] == load_class_names("pets")
    # A popped dataset leaves nothing behind.
    DatasetCatalog.pop("few")
    DatasetCatalog.register("few", lambda: records[:1])
    assert [image["id"] for image in convert_to_coco_dict("few")["images"]] == [records[0]["image_id"]]


def test_the_real_images_are_read_by_their_built_in_names(data_root):
    train, val = (DatasetCatalog.get(f"coco_2017_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (29, 28)
    assert (sum(len(r["annotations"]) for r in train), sum(len(r["annotations"]) for r in val)) == (354, 220)
    assert sum(a["iscrowd"] for r in train for a in r["annotations"]) == 5
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert (len(ids), ids[1], ids[90]) == (80, 0, 79)
    people = DatasetCatalog.get("keypoints_coco_2017_val")
    assert MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names[:2] == ["nose", "left_eye"]
    assert {len(a["keypoints"]) for r in people for a in r["annotations"]} == {51}
