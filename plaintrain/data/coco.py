"""COCO JSON (instances and keypoints) -> records.

Format: https://cocodataset.org/#format-data
"""

import contextlib
import gc
import json
import math
import os

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, select_classes
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError


@contextlib.contextmanager
def _no_garbage_collection():
    # A JSON file makes millions of objects and no cycles: collecting meanwhile doubles the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_json(json_file):
    try:
        with open(json_file, encoding="utf-8") as f, _no_garbage_collection():
            content = json.load(f)
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"cannot read the annotation file {json_file}: {reason}") from e
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"the annotation file {json_file} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{json_file} must hold an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        items = content.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{json_file} has no list of objects {key!r}, which COCO JSON needs")
    return content


def load_coco_json(json_file, image_root, classes=None):
    """Read a COCO annotation file.

    Args:
        json_file: path of the JSON.
        image_root: folder of the images; `file_name` in the JSON is relative to it.
        classes: category names to keep, in the order of their labels; all, by id, if empty.

    Returns:
        (records, metadata): metadata holds `thing_classes`, `thing_dataset_id_to_contiguous_id`,
        and, for keypoints, `keypoint_names`.

    Raises:
        UserError: names the file, and the image or annotation, and what is wrong with it.
    """
    content = _read_json(json_file)
    categories = _categories(content["categories"], json_file)
    id_of = {category["name"]: category["id"] for category in categories}
    names = list(id_of)
    chosen = select_classes(names, classes, json_file)
    labels = {id_of[name]: label for label, name in enumerate(chosen)}
    known_ids = set(id_of.values())
    records = _image_records(content["images"], json_file, image_root)
    for annotation in content["annotations"]:
        _check_annotation(annotation, records, known_ids, json_file)
        if annotation["category_id"] in labels:
            record = records[annotation["image_id"]]
            record["annotations"].append(_convert(annotation, labels))
    metadata = {"thing_classes": chosen, "thing_dataset_id_to_contiguous_id": labels}
    keypoints = next((c["keypoints"] for c in categories if c.get("keypoints")), None)
    if keypoints:
        metadata["keypoint_names"] = list(keypoints)
    return [records[image_id] for image_id in sorted(records)], metadata


def _categories(categories, json_file):
    """The categories by id, checked."""
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise UserError(f"a category in {json_file} needs a numeric id and a name: {category}")
    for key in ("id", "name"):
        seen = set()
        for value in (category[key] for category in categories):
            if value in seen:
                raise UserError(f"{json_file} has two categories with the {key} {value}")
            seen.add(value)
    if not categories:
        raise UserError(f"{json_file} has no categories, so there is nothing to detect")
    return sorted(categories, key=lambda category: category["id"])


def _image_records(images, json_file, image_root):
    records = {}
    for image in images:
        missing = [key for key in ("id", "file_name", "height", "width") if key not in image]
        if missing:
            raise UserError(f"image {image.get('id', image)} in {json_file} has no {missing[0]}")
        for key in ("height", "width"):
            if type(image[key]) is not int or image[key] < 1:
                raise UserError(
                    f"image {image['id']} in {json_file} has the {key} {image[key]!r}, not a number of pixels"
                )
        if not isinstance(image["file_name"], str):
            raise UserError(f"image {image['id']} in {json_file} has the file_name {image['file_name']!r}")
        if image["id"] in records:
            raise UserError(f"{json_file} has two images with the id {image['id']}")
        records[image["id"]] = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
    if len({type(image_id) for image_id in records}) > 1:
        raise UserError(f"the image ids in {json_file} must be all numbers or all strings")
    return records


def _check_annotation(annotation, records, known_ids, json_file):
    where = f"annotation {annotation.get('id', '?')} in {json_file}"
    for key in ("image_id", "category_id", "bbox"):
        if key not in annotation:
            raise UserError(f"{where} has no {key}")
    if annotation["image_id"] not in records:
        raise UserError(f"{where} belongs to image {annotation['image_id']}, which is not there")
    if annotation["category_id"] not in known_ids:
        raise UserError(
            f"{where} has category_id {annotation['category_id']}, but the file's categories are "
            f"{sorted(known_ids)}"
        )
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise UserError(f"{where} has iscrowd {annotation['iscrowd']!r}, not 0 or 1")
    box = annotation["bbox"]
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(v) in (int, float) and math.isfinite(v) for v in box)
    ):
        raise UserError(f"{where} has bbox {box}, which is not four finite numbers x, y, w, h")


def _convert(annotation, labels):
    converted = {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": labels[annotation["category_id"]],
        "iscrowd": int(annotation.get("iscrowd") or 0),
    }
    for key in ("segmentation", "keypoints", "area"):
        if annotation.get(key) is not None:
            converted[key] = annotation[key]
    return converted


def register_coco_instances(name, metadata, json_file, image_root):
    """Register a COCO dataset, scored with COCO metrics.

    Args:
        name: the dataset's name.
        metadata: dict of extra metadata, may be empty; `thing_classes` in it chooses and orders
            the classes.
        json_file, image_root: see `load_coco_json`.
    """

    def load():
        records, found = load_coco_json(json_file, image_root, metadata.get("thing_classes"))
        MetadataCatalog.get(name).set(**found)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, **{"evaluator_type": "coco", **metadata}
    )
