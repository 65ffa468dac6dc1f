"""COCO JSON (instances, keypoints, results) -> records.

Format: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results
"""

import json
import os
from collections import Counter

from pycocotools import mask as coco_mask

from plaintrain.data.cache import load_cached_records
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, select_classes
from plaintrain.data.image_files import is_too_large
from plaintrain.data.keypoints import get_keypoint_metadata
from plaintrain.data.serialized import disable_gc
from plaintrain.data.validation import find_coco_annotation_problem, find_image_problem, find_keypoint_problem
from plaintrain.structures import (
    BoxMode,
    are_numbers,
    encode_segmentation,
    find_segmentation_problem,
    make_record,
)
from plaintrain.utils.errors import DataError, UserError, raise_or_append
from plaintrain.utils.files import is_below, read_text

_XYWH = BoxMode.XYWH_ABS


def _read_json(json_file, what="annotation file"):
    text = read_text(json_file, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"the {what} {json_file} is not JSON: {e}") from e


def _read_content(json_file, keys=("images", "annotations", "categories")):
    content = _read_json(json_file)
    for key in keys:
        if not isinstance(content, dict) or not _are_objects(content.get(key)):
            raise UserError(f"{json_file} has no list of objects {key!r}, which COCO JSON needs")
    return content


def _are_objects(items):
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def load_coco_json(json_file, image_root, classes=None, problems=None):
    """Read a COCO annotation file.

    Coordinates are taken as continuous, so 0.5 is added to x and y of the keypoints with v > 0,
    which COCO gives as numbers of pixels. An empty `segmentation` is as none.

    Args:
        json_file: path of the JSON.
        image_root: folder of the images; `file_name` in the JSON is relative to it.
        classes: category names to keep, in the order of their labels; all, by id, if empty.
        problems: None, or a list that takes broken images and annotations instead of an error.

    Returns:
        (records, metadata): metadata holds `thing_classes`, `thing_dataset_id_to_contiguous_id`,
        and, for keypoints, `keypoint_names` and `skeleton` (COCO's pairs of numbers from 1).
    """
    with disable_gc():
        content = _read_content(json_file)
        if problems is not None:
            ids = Counter(str(a["id"]) for a in content["annotations"] if "id" in a)
            for annotation_id, count in ids.items():
                text = f"two annotations in {json_file} have the id {annotation_id}"
                problems += [DataError("duplicate_id", text)] * (count - 1)
        return _to_records(content, json_file, image_root, classes, problems)


def load_coco_results(json_file, image_root, results_file, classes=None, score_thresh=0.0, problems=None):
    """Read detections in COCO's results format as if they were annotations, each with its `score`.

    A detection without a box gets the one around its segmentation, or its keypoints, which count as
    visible.

    Args:
        json_file: path of a JSON with the `images` and `categories`; its annotations are not used.
        results_file: path of a JSON list of `{image_id, category_id, score, bbox, ...}`.
        score_thresh: detections with a lower score are left out.
        image_root, classes, problems: see `load_coco_json`, as for what is returned.
    """
    with disable_gc():
        content = _read_content(json_file, ("images", "categories"))
        content["annotations"] = [
            mark_keypoints_visible(detection)
            for detection in read_coco_results(results_file, problems)
            if detection["score"] >= score_thresh
        ]
        return _to_records(content, results_file, image_root, classes, problems)


def read_coco_results(results_file, problems=None):
    """Read the detections of a JSON in COCO's results format; `problems` as in `load_coco_json`.

    Returns:
        list of dicts as the file has them, with `id`, the place in the file from 0, and a `bbox`: that
        around the segmentation, or the keypoints, where there was none. Only the `score` is checked.
    """
    results = _read_json(results_file, "results file")
    if not _are_objects(results):
        raise UserError(f"{results_file} must hold a list of detections, as COCO's results format")
    detections = []
    for index, result in enumerate(results):
        detection = {**result, "id": index}
        mistake = _complete(detection)
        if mistake:
            raise_or_append(
                problems, DataError(mistake[0], f"detection {index} in {results_file} {mistake[1]}")
            )
        else:
            detections.append(detection)
    return detections


def mark_keypoints_visible(detection):
    """The detection with all keypoints visible, where results have a score of each or nothing."""
    keypoints = detection.get("keypoints")
    if not isinstance(keypoints, list):
        return detection
    return {**detection, "keypoints": [2 if i % 3 == 2 else v for i, v in enumerate(keypoints)]}


def _complete(detection):
    """Give a detection the box that it lacks; what is wrong with it, or None."""
    score = detection.get("score")
    if type(score) not in (int, float) or not are_numbers([score]):
        return "broken", f"has the score {score!r}, not a finite number"
    if "bbox" in detection:
        return None
    segmentation, keypoints = (
        detection.get("segmentation"),
        mark_keypoints_visible(detection).get("keypoints"),
    )
    mistake = None
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        is_size = isinstance(size, list) and [*map(type, size)] == [int, int] and min(size) > 0
        if not is_size or is_too_large(*size):
            return "bad_rle", f"has an RLE of the size {size}, not [height, width]"
        mistake = find_segmentation_problem(segmentation, *size)
        if not mistake:
            detection["bbox"] = coco_mask.toBbox(encode_segmentation(segmentation, *size)).tolist()
    elif keypoints:
        mistake = find_keypoint_problem(keypoints, 0)
        if not mistake:
            xs, ys = keypoints[::3], keypoints[1::3]
            detection["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return mistake


def _to_records(content, json_file, image_root, classes, problems=None):
    categories = _categories(content["categories"], json_file)
    id_of = {category["name"]: category["id"] for category in categories}
    chosen = select_classes(list(id_of), classes, json_file)
    labels = {id_of[name]: label for label, name in enumerate(chosen)}
    num_keypoints = {c["id"]: len(c.get("keypoints") or ()) for c in categories}
    records = _image_records(content["images"], json_file, image_root, problems)
    for annotation in content["annotations"]:
        mistake = find_coco_annotation_problem(annotation, records, num_keypoints)
        if mistake:
            where = f"annotation {annotation.get('id', '?')} in {json_file}"
            raise_or_append(problems, DataError(mistake[0], f"{where} {mistake[1]}"))
        elif annotation["category_id"] in labels:
            records[annotation["image_id"]]["annotations"].append(_convert(annotation, labels))
    metadata = {"thing_classes": chosen, "thing_dataset_id_to_contiguous_id": labels}
    keypoints = [
        {"keypoint_names": c.get("keypoints"), "skeleton": c.get("skeleton")}
        for c in categories
        if c["id"] in labels
    ]
    metadata |= get_keypoint_metadata(keypoints)
    return [records[image_id] for image_id in sorted(records)], metadata


def _categories(categories, json_file):
    """The categories by id, checked."""
    if not categories:
        raise UserError(f"{json_file} has no categories, so there is nothing to detect")
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise UserError(f"a category in {json_file} needs a numeric id and a name: {category}")
        names = category.get("keypoints") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"the keypoints of category {category['name']} in {json_file} must be names: {names}"
            )
    for key in ("id", "name"):
        ((value, count),) = Counter(category[key] for category in categories).most_common(1)
        if count > 1:
            raise UserError(f"{json_file} has two categories with the {key} {value}")
    return sorted(categories, key=lambda category: category["id"])


def _image_records(images, json_file, image_root, problems):
    records = {}
    # Nobody knows whose objects an id has that stands for several images.
    distinct = {
        repr([image.get(key) for key in ("id", "file_name", "height", "width")]): image for image in images
    }
    entries = Counter(repr(image.get("id")) for image in distinct.values())
    for image in images:
        kind, mistake = "broken_image", find_image_problem(image, "id")
        if not mistake and entries[repr(image["id"])] > 1:
            kind, mistake = (
                "ambiguous",
                f"({image['file_name']}) is one of two images with the id {image['id']}",
            )
        elif not mistake and image["id"] in records:
            mistake = f"is listed twice, with the id {image['id']}"
        elif not mistake and not is_below(image_root, image["file_name"]):
            mistake = (
                f"has the file_name {image['file_name']!r}, which leaves the images' folder {image_root}: "
                "let IMAGE_ROOT be a folder that holds all images"
            )
        if mistake:
            where = f"image {image.get('id', image)} in {json_file}"
            raise_or_append(problems, DataError(kind, f"{where} {mistake}"))
            continue
        file_name = os.path.join(image_root, image["file_name"])
        records[image["id"]] = make_record(file_name, image["id"], image["height"], image["width"])
    if len({type(image_id) for image_id in records}) > 1:
        raise UserError(f"the image ids in {json_file} must be all numbers or all strings")
    return records


def _convert(annotation, labels):
    # Runs a million times, hence without a loop over the keys.
    converted = {
        "bbox": annotation["bbox"],
        "bbox_mode": _XYWH,
        "category_id": labels[annotation["category_id"]],
        "iscrowd": int(annotation.get("iscrowd") or 0),
    }
    if (area := annotation.get("area")) is not None:
        converted["area"] = area
    if segmentation := annotation.get("segmentation"):
        converted["segmentation"] = segmentation
    if keypoints := annotation.get("keypoints"):
        converted["keypoints"] = shift_keypoints(keypoints, 0.5)
    if (score := annotation.get("score")) is not None:
        converted["score"] = score
    if difficult := annotation.get("difficult"):
        converted["difficult"] = difficult
    return converted


def shift_keypoints(keypoints, by):
    """`[x, y, v, ...]` with `by` added to x and y where v > 0: 0.5 makes COCO's pixel numbers continuous."""
    shifted = list(keypoints)
    for i in range(0, len(shifted), 3):
        if shifted[i + 2] > 0:
            shifted[i] += by
            shifted[i + 1] += by
    return shifted


def register_coco_instances(name, metadata, json_file, image_root):
    """Register a COCO dataset, scored with COCO metrics, as Detectron2 does.

    `metadata` is a dict of more metadata; `thing_classes` in it chooses and orders the classes.
    """

    def load():
        classes = metadata.get("thing_classes")
        records, found = load_cached_records(load_coco_json, json_file, image_root, classes)
        MetadataCatalog.get(name).set(**found)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, **{"evaluator_type": "coco", **metadata}
    )
