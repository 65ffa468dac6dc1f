"""plaintrain.data.coco: the reader of COCO JSON."""

import gc
import json

import pytest

from plaintrain.data import (
    DatasetCatalog,
    MetadataCatalog,
    get_detection_dataset_dicts,
    register_coco_instances,
)
from plaintrain.data.catalog import class_names
from plaintrain.data.coco import load_coco_json, load_coco_results
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError


def _load(files, classes=None):
    files.save()
    return load_coco_json(str(files.json), str(files.images), classes)


def _refused(files, *words, classes=None):
    """The file is refused in a sentence that holds its name and these words."""
    with pytest.raises(UserError) as error:
        _load(files, classes)
    # The folder's name is the test's, and may hold any of the words.
    message = str(error.value).replace(str(files.json.parent), "")
    assert [word for word in (files.json.name, *words) if word not in message] == []


def test_records_are_sorted_by_image_and_hold_detectron2s_keys(tiny_coco):
    records, metadata = _load(tiny_coco)
    assert [record["image_id"] for record in records] == [2, 5, 11]
    assert set(records[0]) == {"file_name", "image_id", "height", "width", "annotations"}
    assert records[0]["file_name"] == str(tiny_coco.images / "more/upright.png")
    assert (records[0]["height"], records[0]["width"]) == (40, 30)
    assert [len(record["annotations"]) for record in records] == [2, 0, 2]
    assert metadata["thing_classes"] == ["cat", "person", "dog"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {3: 0, 5: 1, 7: 2}


def test_annotations_keep_boxes_polygons_crowds_and_keypoints(tiny_coco):
    records, metadata = _load(tiny_coco)
    dog, cat = records[2]["annotations"]
    assert dog["bbox"] == [4, 5, 10.5, 8]
    assert dog["bbox_mode"] == BoxMode.XYWH_ABS
    assert (dog["category_id"], cat["category_id"]) == (2, 0)
    assert (dog["iscrowd"], "segmentation" in dog, "keypoints" in dog) == (0, False, False)
    assert cat["segmentation"] == [[20, 10, 35, 10, 35, 25, 20, 25]]
    assert cat["area"] == 225
    crowd, person = records[0]["annotations"]
    assert crowd["iscrowd"] == 1
    assert crowd["segmentation"] == {"size": [40, 30], "counts": [0, 600, 600]}
    # A pixel's centre is half a pixel from its corner.
    assert person["keypoints"] == [5.5, 6.5, 2, 20.5, 30.5, 1]
    assert metadata["keypoint_names"] == ["head", "foot"]


def test_without_keypoints_there_are_no_keypoint_names(tiny_coco):
    del tiny_coco.content["categories"][2]["keypoints"]
    assert "keypoint_names" not in _load(tiny_coco)[1]


def test_only_labelled_keypoints_are_moved_to_their_pixels_centre(tiny_coco):
    tiny_coco.content["annotations"][3]["keypoints"] = [0, 0, 0, 20, 30, 2]
    assert _load(tiny_coco)[0][0]["annotations"][1]["keypoints"] == [0, 0, 0, 20.5, 30.5, 2]


@pytest.mark.parametrize(
    ("keypoints", "words"),
    [
        ([1, 2, 2], ["3 numbers", "3 x 2"]),
        ([1, 2, 2] * 3, ["9 numbers", "3 x 2"]),
        ([1, 2, 2, 1, 2], ["5 numbers"]),
        ([1, 2, 3, 1, 2, 2], ["visibility", "[3, 2]"]),
        ([1, 2, 2, float("nan"), 2, 2], ["finite"]),
        ("121121", ["finite"]),
    ],
)
def test_keypoints_that_do_not_fit_the_categorys_names_are_refused(tiny_coco, keypoints, words):
    tiny_coco.content["annotations"][3]["keypoints"] = keypoints
    _refused(tiny_coco, "annotation 103", *words)


def test_without_names_any_whole_number_of_keypoints_will_do(tiny_coco):
    del tiny_coco.content["categories"][2]["keypoints"]
    tiny_coco.content["annotations"][3]["keypoints"] = [1, 2, 2] * 3
    assert len(_load(tiny_coco)[0][0]["annotations"][1]["keypoints"]) == 9
    tiny_coco.content["annotations"][3]["keypoints"] = [1, 2, 2, 4]
    _refused(tiny_coco, "annotation 103", "4 numbers")


def test_a_skeleton_is_kept_and_keypoint_names_that_contradict_are_not(tiny_coco):
    tiny_coco.content["categories"][2]["skeleton"] = [[1, 2]]
    assert _load(tiny_coco)[1]["skeleton"] == [[1, 2]]
    tiny_coco.content["categories"][0]["keypoints"] = ["nose"]
    assert "keypoint_names" not in _load(tiny_coco)[1]
    assert _load(tiny_coco, ["dog", "cat"])[1]["keypoint_names"] == ["nose"]


@pytest.mark.parametrize("keypoints", ["head", [1, 2]])
def test_keypoint_names_that_are_no_names_are_refused(tiny_coco, keypoints):
    tiny_coco.content["categories"][2]["keypoints"] = keypoints
    _refused(tiny_coco, "category person", "keypoints")


def test_an_empty_segmentation_is_as_none(tiny_coco):
    tiny_coco.content["annotations"][0]["segmentation"] = []
    assert "segmentation" not in _load(tiny_coco)[0][2]["annotations"][0]


def test_an_annotation_without_iscrowd_is_no_crowd(tiny_coco):
    for annotation in tiny_coco.content["annotations"]:
        del annotation["iscrowd"]
    records, _ = _load(tiny_coco)
    assert {a["iscrowd"] for record in records for a in record["annotations"]} == {0}


def test_chosen_classes_keep_their_order_and_leave_other_objects_out(tiny_coco):
    records, metadata = _load(tiny_coco, ["dog", "person"])
    assert metadata["thing_classes"] == ["dog", "person"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {7: 0, 5: 1}
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[1], [], [0]]
    _refused(tiny_coco, "'dgo'", "'dog'", classes=["dgo"])


def test_image_ids_may_be_strings(tiny_coco):
    for item in tiny_coco.content["images"]:
        item["id"] = f"image-{item['id']}"
    for item in tiny_coco.content["annotations"]:
        item["image_id"] = f"image-{item['image_id']}"
    records, _ = _load(tiny_coco)
    assert [record["image_id"] for record in records] == ["image-11", "image-2", "image-5"]
    assert len(records[0]["annotations"]) == 2
    tiny_coco.content["images"].append({"id": 3, "file_name": "x.png", "width": 1, "height": 1})
    _refused(tiny_coco, "all numbers or all strings")


@pytest.mark.parametrize(
    ("text", "word"), [("{", "JSON"), ("", "JSON"), ("[1]", "images"), ('{"images": []}', "annotations")]
)
def test_a_file_of_another_kind_is_refused(tiny_coco, text, word):
    tiny_coco.json.write_text(text)
    with pytest.raises(UserError, match=f"instances.json.*{word}"):
        load_coco_json(str(tiny_coco.json), str(tiny_coco.images))


def test_a_missing_or_binary_file_is_refused(tiny_coco):
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        load_coco_json(str(tiny_coco.json.parent / "none.json"), "")
    tiny_coco.json.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match=r"instances\.json"):
        load_coco_json(str(tiny_coco.json), "")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, [3]])
def test_each_of_the_three_lists_is_needed(tiny_coco, key, value):
    tiny_coco.content[key] = value
    _refused(tiny_coco, f"'{key}'")


@pytest.mark.parametrize("key", ["id", "file_name", "height", "width"])
def test_an_image_without_a_key_is_named(tiny_coco, key):
    del tiny_coco.content["images"][1][key]
    _refused(tiny_coco, f"has no {key}", "upright.png" if key == "id" else "image 2")


@pytest.mark.parametrize("key", ["height", "width"])
@pytest.mark.parametrize("value", [None, "40", 0, -3])
def test_an_image_size_that_is_no_positive_number_is_refused(tiny_coco, key, value):
    tiny_coco.content["images"][1][key] = value
    _refused(tiny_coco, "image 2", key, repr(value) if isinstance(value, int) else str(value))


def test_a_file_name_that_is_no_string_is_refused(tiny_coco):
    tiny_coco.content["images"][1]["file_name"] = None
    _refused(tiny_coco, "image 2", "file_name")


def test_two_images_of_one_id_are_refused(tiny_coco):
    tiny_coco.content["images"][2]["id"] = 11
    _refused(tiny_coco, "two images with the id 11")


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_an_annotation_without_a_key_is_named(tiny_coco, key):
    del tiny_coco.content["annotations"][2][key]
    _refused(tiny_coco, "annotation 102", f"has no {key}")


def test_an_annotation_of_an_unknown_image_or_category_is_named(tiny_coco):
    tiny_coco.content["annotations"][1]["image_id"] = 12
    _refused(tiny_coco, "annotation 101", "image 12")
    tiny_coco.content["annotations"][1].update(image_id=11, category_id=4)
    _refused(tiny_coco, "annotation 101", "category_id 4", "[3, 5, 7]")


@pytest.mark.parametrize(
    "bbox",
    [
        [1, 2, float("nan"), 4],
        [1, 2, float("inf"), 4],
        [1, 2, 3],
        [1, 2, "3", 4],
        "1234",
        None,
        {},
    ],
)
def test_a_box_that_is_not_four_finite_numbers_is_shown(tiny_coco, bbox):
    tiny_coco.content["annotations"][3]["bbox"] = bbox
    _refused(tiny_coco, "annotation 103", f"bbox {bbox}", "four finite numbers")


@pytest.mark.parametrize(
    "category", [{"name": "cow"}, {"id": 9}, {"id": "9", "name": "cow"}, {"id": None, "name": "cow"}]
)
def test_a_category_without_a_numeric_id_and_a_name_is_refused(tiny_coco, category):
    tiny_coco.content["categories"].append(category)
    _refused(tiny_coco, "category", "id", "name")


@pytest.mark.parametrize("name", [None, 3, ["cow"]])
def test_a_category_name_that_is_no_string_is_refused(tiny_coco, name):
    tiny_coco.content["categories"].append({"id": 9, "name": name})
    _refused(tiny_coco, "category")


@pytest.mark.parametrize("category", [{"id": 3, "name": "cow"}, {"id": 9, "name": "cat"}])
def test_two_categories_of_one_id_or_one_name_are_refused(tiny_coco, category):
    tiny_coco.content["categories"].append(category)
    _refused(tiny_coco, "two categories", "3" if category["id"] == 3 else "cat")


def test_a_file_without_categories_is_refused_before_training(tiny_coco):
    tiny_coco.content.update(categories=[], annotations=[])
    tiny_coco.save()
    register_coco_instances("pets", {}, str(tiny_coco.json), str(tiny_coco.images))
    with pytest.raises(UserError, match=r"categor|class"):
        get_detection_dataset_dicts("pets", filter_empty=False)


def test_broken_entries_are_collected_instead_if_asked_for(tiny_coco):
    images, annotations = tiny_coco.content["images"], tiny_coco.content["annotations"]
    del images[2]["height"]
    annotations[0]["bbox"] = [1, 2]
    annotations[1]["category_id"] = 99
    annotations[2]["image_id"] = 98
    annotations[3]["id"] = annotations[2]["id"]
    tiny_coco.save()
    problems = []
    records, _ = load_coco_json(str(tiny_coco.json), str(tiny_coco.images), problems=problems)
    kinds = [problem.kind for problem in problems]
    assert kinds == ["duplicate_id", "broken_image", "bad_box", "unknown_class", "unknown_image"]
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [(2, 1), (11, 0)]


# ---- results files


def _load_results(files, results, **options):
    files.save()
    path = files.json.parent / "results.json"
    path.write_text(json.dumps(results))
    return load_coco_results(str(files.json), str(files.images), str(path), **options)


def test_detections_become_annotations_with_a_score(tiny_coco):
    del tiny_coco.content["annotations"]
    rle = {"size": [30, 40], "counts": [30 * 4 + 5, 8, 30 * 36 - 13]}
    results = [
        {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"image_id": 11, "category_id": 3, "score": 0.8, "segmentation": rle},
        {"image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.2},
        {
            "image_id": 2,
            "category_id": 5,
            "bbox": [1, 2, 3, 4],
            "score": 1,
            "keypoints": [3, 4, 0.3, 5, 6, 7.5],
        },
    ]
    records, metadata = _load_results(tiny_coco, results, score_thresh=0.5)
    assert metadata["thing_classes"] == ["cat", "person", "dog"]
    assert [len(record["annotations"]) for record in records] == [1, 0, 2]
    box, mask = records[2]["annotations"]
    assert (box["bbox"], box["score"], box["category_id"], box["iscrowd"]) == ([1, 2, 3, 4], 0.9, 2, 0)
    assert (mask["bbox"], mask["segmentation"]) == ([4, 5, 1, 8], rle)
    assert records[0]["annotations"][0]["keypoints"] == [3.5, 4.5, 2, 5.5, 6.5, 2]
    assert len(_load_results(tiny_coco, results)[0][2]["annotations"]) == 3
    assert len(_load_results(tiny_coco, results, classes=["dog"])[0][2]["annotations"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": None}, ["detection 0", "score"]),
        ({"image_id": 12}, ["annotation 0", "image 12"]),
        ({"category_id": 4}, ["annotation 0", "category_id 4"]),
        ({"bbox": [1]}, ["annotation 0", "bbox [1]"]),
    ],
)
def test_a_broken_detection_is_named_with_its_place(tiny_coco, change, words):
    detection = {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9}
    with pytest.raises(UserError) as error:
        _load_results(tiny_coco, [detection | change])
    assert [word for word in ["results.json", *words] if word not in str(error.value)] == []


def test_a_results_file_of_another_kind_or_with_a_broken_mask_is_refused(tiny_coco):
    with pytest.raises(UserError, match=r"results\.json.*list of detections"):
        _load_results(tiny_coco, {"annotations": []})
    detection = {"image_id": 11, "category_id": 7, "score": 0.9, "segmentation": {"counts": "x"}}
    with pytest.raises(UserError, match=r"detection 0 in .*results\.json has an RLE of the size None"):
        _load_results(tiny_coco, [detection])
    detection["segmentation"] = {"size": [30, 40], "counts": "h"}
    with pytest.raises(UserError, match=r"detection 0 .* counts do not add up to 30 x 40"):
        _load_results(tiny_coco, [detection])


def test_a_detection_of_keypoints_alone_gets_the_box_around_them(tiny_coco):
    detection = {"image_id": 2, "category_id": 5, "score": 0.9, "keypoints": [9, 4, 0.5, 5, 6, 0]}
    annotation = _load_results(tiny_coco, [detection])[0][0]["annotations"][0]
    assert annotation["bbox"] == [5, 4, 4, 2]
    assert annotation["keypoints"] == [9.5, 4.5, 2, 5.5, 6.5, 2]
    detection["keypoints"] = [1, 2]
    with pytest.raises(UserError, match="detection 0 .* has 2 numbers as keypoints"):
        _load_results(tiny_coco, [detection])


def test_broken_detections_are_collected_instead_if_asked_for(tiny_coco):
    good = {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9}
    broken = [{"score": "high"}, {"image_id": 12}, {"bbox": [1]}]
    problems = []
    records, _ = _load_results(tiny_coco, [*(good | change for change in broken), good], problems=problems)
    assert [problem.kind for problem in problems] == ["broken", "unknown_image", "bad_box"]
    assert [len(record["annotations"]) for record in records] == [0, 0, 1]


def test_an_area_that_is_no_number_is_refused(tiny_coco):
    tiny_coco.content["annotations"][1]["area"] = "225"
    _refused(tiny_coco, "annotation 101", "area", "'225'")


def test_the_garbage_collector_runs_again_after_reading(tiny_coco):
    _load(tiny_coco)
    assert gc.isenabled()
    tiny_coco.json.write_text("{")
    with pytest.raises(UserError):
        load_coco_json(str(tiny_coco.json), "")
    assert gc.isenabled()


def test_register_coco_instances_as_in_detectron2(tiny_coco):
    register_coco_instances("pets", {"colour": "red"}, str(tiny_coco.json), str(tiny_coco.images))
    metadata = MetadataCatalog.get("pets")
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root) == (str(tiny_coco.json), str(tiny_coco.images))
    assert metadata.colour == "red"
    assert class_names("pets") == ["cat", "person", "dog"]
    assert len(DatasetCatalog.get("pets")) == 3
    with pytest.raises(UserError, match="pets"):
        register_coco_instances("pets", {}, str(tiny_coco.json), str(tiny_coco.images))


def test_thing_classes_given_to_register_coco_instances_choose_and_order(tiny_coco):
    chosen = {"thing_classes": ["person", "cat"], "evaluator_type": "pascal_voc"}
    register_coco_instances("pets", chosen, str(tiny_coco.json), str(tiny_coco.images))
    labels = [[a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get("pets")]
    assert labels == [[1, 0], [], [1]]
    assert class_names("pets") == ["person", "cat"]
    assert MetadataCatalog.get("pets").evaluator_type == "pascal_voc"


def test_the_real_images_are_read_by_their_built_in_names(data_root):
    train, val = (DatasetCatalog.get(f"coco_2017_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (29, 28)
    assert (sum(len(r["annotations"]) for r in train), sum(len(r["annotations"]) for r in val)) == (354, 220)
    assert sum(a["iscrowd"] for r in train for a in r["annotations"]) == 5
    assert len(class_names("coco_2017_val")) == 80
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert (ids[1], ids[90]) == (0, 79)


def test_the_real_keypoints_are_read_by_their_built_in_names(data_root):
    records = DatasetCatalog.get("keypoints_coco_2017_val")
    assert (len(records), sum(len(r["annotations"]) for r in records)) == (28, 46)
    assert class_names("keypoints_coco_2017_val") == ["person"]
    assert MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names[:2] == ["nose", "left_eye"]
    assert {len(a["keypoints"]) for r in records for a in r["annotations"]} == {51}
