"""Readers of COCO JSON: instances, keypoints and results.

Format: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from plaintrain.data.cache import load_cached_records
from plaintrain.data.catalog import MetadataCatalog, register_dataset, select_classes
from plaintrain.data.datasets.write import convert_to_coco_dict  # noqa: F401 - Detectron2 has it here
from plaintrain.data.image_files import find_name, is_too_large
from plaintrain.data.keypoints import get_keypoint_metadata, shift_keypoints
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
# Records and metadata.
LoadedDataset = tuple[list[dict[str, Any]], dict[str, Any]]


def _read_json(json_file, description="annotation file"):
    text = read_text(json_file, description)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"the {description} {json_file} is not JSON: {e}") from e


def read_content(json_file: str) -> Any:
    """Read a COCO annotation file; ids and sizes such as 1.0 are converted to integers."""
    content = _read_json(json_file)
    # COCO's files of test sets have no annotations.
    content = {"annotations": [], **content} if isinstance(content, dict) else {}
    if not all(_normalize_objects(content.get(key)) for key in ("images", "annotations", "categories")):
        raise UserError(f"{json_file} must have the lists of objects 'images', 'annotations', 'categories'")
    return content


def _normalize_objects(items):
    """Convert ids and sizes such as 1.0 to integers; return whether `items` is a list of objects."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return False
    for item in items:
        for key in ("id", "image_id", "category_id", "height", "width"):
            if type(value := item.get(key)) is float and value.is_integer():
                item[key] = int(value)
    return True


def load_coco_json(json_file: str, image_root: str, dataset_name: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a COCO annotation file; set the metadata of `dataset_name`."""
    records, metadata = read_coco_json(json_file, image_root)
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(**metadata)
    return records


def read_coco_json(
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None = None,
    problems: list[UserError] | None = None,
) -> LoadedDataset:
    """Read the records and the metadata of a COCO annotation file.

    COCO's keypoints are pixel indices; 0.5 is added to make them continuous.

    Args:
        classes: categories to keep, in label order; None or empty keeps all, ordered by id.
        problems: if given, errors in single images and annotations are appended instead of raised.
    """
    with disable_gc():
        content = read_content(json_file)
        if problems is not None:
            ids = Counter(str(a["id"]) for a in content["annotations"] if "id" in a)
            for annotation_id, count in ids.items():
                message = f"two annotations in {json_file} have the id {annotation_id}"
                problems += [DataError("duplicate_id", message)] * (count - 1)
        return convert_content(content, json_file, image_root, classes, problems)


def load_coco_results(
    json_file: str,
    image_root: str,
    results_file: str,
    classes: Sequence[str] | None = None,
    score_thresh: float = 0.0,
    problems: list[UserError] | None = None,
) -> LoadedDataset:
    """Read detections in COCO's results format as annotations with a `score`, such as pseudo-labels.

    `json_file` provides `images` and `categories`; its annotations are ignored. All keypoints count as
    visible. See `read_coco_json` for the other arguments and the return value.
    """
    with disable_gc():
        content = read_content(json_file)
        content["annotations"] = [
            mark_keypoints_visible(detection)
            for detection in read_coco_results(results_file, problems)
            if detection["score"] >= score_thresh
        ]
        return convert_content(content, results_file, image_root, classes, problems)


def read_coco_results(results_file: str, problems: list[UserError] | None = None) -> list[dict[str, Any]]:
    """Read the detections of a JSON in COCO's results format; their `id` is the index in the file.

    A missing `bbox` is computed from the segmentation or the keypoints. Only the `score` is checked.
    """
    results = _read_json(results_file, "results file")
    if not _normalize_objects(results):
        raise UserError(f"{results_file} must hold a list of detections, as in COCO's results format")
    detections = []
    for index, result in enumerate(results):
        detection = {**result, "id": index}
        score = detection.get("score")
        problem = _add_box(detection, mark_keypoints_visible(detection).get("keypoints"))
        if type(score) not in (int, float) or not are_numbers([score]):
            problem = "broken", f"has the score {score!r}, not a finite number"
        if problem:
            message = f"detection {index} in {results_file} {problem[1]}"
            raise_or_append(problems, DataError(problem[0], message))
        else:
            detections.append(detection)
    return detections


def mark_keypoints_visible(detection: dict[str, Any]) -> dict[str, Any]:
    """Return the detection with v = 2 for all keypoints; v in results files is a score or 0."""
    keypoints = detection.get("keypoints")
    if not isinstance(keypoints, list):
        return detection
    return {**detection, "keypoints": [2 if i % 3 == 2 else v for i, v in enumerate(keypoints)]}


def _add_box(annotation, keypoints=None):
    """Add a missing `bbox` around the segmentation or `keypoints`; return the problem of these, or None."""
    segmentation = annotation.get("segmentation")
    if annotation.get("bbox") or not (segmentation or keypoints):
        return None
    size = (math.inf, math.inf)
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        is_size = isinstance(size, list) and [*map(type, size)] == [int, int] and min(size) > 0
        if not is_size or is_too_large(*size):
            return "bad_rle", f"has an RLE of the size {size}, not [height, width]"
    if segmentation:
        problem = find_segmentation_problem(segmentation, *size)
    else:
        problem = find_keypoint_problem(keypoints, 0)
    if not problem and isinstance(segmentation, dict):
        annotation["bbox"] = coco_mask.toBbox(encode_segmentation(segmentation, *size)).tolist()
    elif not problem:
        polygons = [np.reshape(polygon, (-1, 2)) for polygon in segmentation or ()]
        points = np.concatenate(polygons or [np.reshape(keypoints, (-1, 3))[:, :2]])
        annotation["bbox"] = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    return problem


def convert_content(
    content: Any,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    problems: list[UserError] | None = None,
) -> LoadedDataset:
    """Convert the content of a COCO annotation file to records and metadata."""
    categories = _sort_categories(content, json_file, classes or ())
    id_of = {category["name"]: category["id"] for category in categories}
    selected = select_classes(list(id_of), classes, json_file)
    # Classes that the file does not have get ids above its own.
    labels = {id_of.get(name, max(id_of.values()) + 1 + label): label for label, name in enumerate(selected)}
    num_keypoints = {c["id"]: len(c.get("keypoints") or ()) for c in categories}
    records = _create_records(content["images"], json_file, image_root, problems)
    for annotation in content["annotations"]:
        problem = _add_box(annotation) or find_coco_annotation_problem(annotation, records, num_keypoints)
        if problem:
            message = f"annotation {annotation.get('id', '?')} in {json_file} {problem[1]}"
            raise_or_append(problems, DataError(problem[0], message))
        elif annotation["category_id"] in labels:
            records[annotation["image_id"]]["annotations"].append(_convert_annotation(annotation, labels))
    metadata = {"thing_classes": selected, "thing_dataset_id_to_contiguous_id": labels}
    keypoints = [
        {"keypoint_names": c.get("keypoints"), "skeleton": c.get("skeleton")}
        for c in categories
        if c["id"] in labels
    ]
    metadata |= get_keypoint_metadata(keypoints)
    return [records[image_id] for image_id in sorted(records)], metadata


def _sort_categories(content, json_file, classes):
    """Check the categories, sort them by id, and drop unused ones that are only the parents of others."""
    categories = content["categories"]
    if not categories:
        raise UserError(f"{json_file} has no categories")
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise UserError(f"a category in {json_file} must have an integer id and a name, got {category}")
        names = category.get("keypoints") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"the keypoints of category {category['name']} in {json_file} must be names, got {names}"
            )
    names = Counter(category["name"] for category in categories)
    # Roboflow writes such a root, sometimes with the name of a class.
    pairs = [(category, str(category.get("supercategory"))) for category in categories]
    children = [category for category, parent in pairs if names[parent] > (parent == category["name"])]
    parents = {child["supercategory"] for child in children} - set(classes)
    for root in [c for c in categories if c["name"] in parents and c not in children]:
        if not any(annotation.get("category_id") == root["id"] for annotation in content["annotations"]):
            categories = [category for category in categories if category is not root]
    for key in ("id", "name"):
        ((value, count),) = Counter(category[key] for category in categories).most_common(1)
        if count > 1:
            raise UserError(f"{json_file} has two categories with the {key} {value}")
    return sorted(categories, key=lambda category: category["id"])


def _create_records(images, json_file, image_root, problems):
    records = {}
    # Annotations cannot be assigned to images that share an id but differ otherwise.
    distinct = {tuple(repr(image.get(k)) for k in ("id", "file_name", "height", "width")) for image in images}
    entries = Counter(image_id for image_id, *_ in distinct)
    for image in images:
        problem_type = "broken_image"
        problem = find_image_problem(image, "id")
        if not problem and entries[repr(image["id"])] > 1:
            problem_type = "ambiguous"
            problem = f"({image['file_name']}) is one of two images with the id {image['id']}"
        elif not problem and image["id"] in records:
            problem = f"is listed twice, with the id {image['id']}"
        elif not problem and not is_below(image_root, image["file_name"]):
            problem = (
                f"has the file_name {image['file_name']!r}, which is outside the image folder {image_root}; "
                "set IMAGE_ROOT to a folder that holds all images"
            )
        if problem:
            message = f"image {image.get('id', image)} in {json_file} {problem}"
            raise_or_append(problems, DataError(problem_type, message))
            continue
        file_name = os.path.join(image_root, find_name(image_root, image["file_name"]))
        records[image["id"]] = make_record(file_name, image["id"], image["height"], image["width"])
    if len({type(image_id) for image_id in records}) > 1:
        raise UserError(f"the image ids in {json_file} must be all numbers or all strings")
    return records


def _convert_annotation(annotation, labels):
    # COCO has a million annotations: a loop over the keys would be slower.
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


def register_coco_instances(name: str, metadata: dict[str, Any], json_file: str, image_root: str) -> None:
    """Register a COCO dataset, as in Detectron2; `thing_classes` in `metadata` selects and orders classes."""
    arguments = {"json_file": json_file, "image_root": image_root}
    classes = metadata.get("thing_classes")
    read = partial(load_cached_records, read_coco_json, classes=classes, **arguments)
    register_dataset(name, read, **{"evaluator_type": "coco", **arguments, **metadata})
