"""Writer of COCO JSON, and conversions of annotations."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import Metadata
from plaintrain.data.datasets.coco import shift_keypoints
from plaintrain.structures import BoxMode, encode_segmentation, find_segmentation_problem
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write


def make_folder(path: str) -> None:
    """Create a folder for a dataset; raise a `UserError` if it exists and is not empty."""
    try:
        os.makedirs(path, exist_ok=True)
        if os.listdir(path):
            raise UserError(f"the folder {path} is not empty; its files would be overwritten")
    except OSError as e:
        raise UserError(f"cannot create the folder {path}: {e.strerror}") from e


def get_relative_names(paths: Iterable[str], *folders: str) -> tuple[str, list[str]]:
    """Return a common parent folder of all files and `folders`, and the files' paths relative to it."""
    paths = [os.path.abspath(path) for path in paths]
    all_folders = [*map(os.path.dirname, paths), *map(os.path.abspath, folders)]
    folder = os.path.commonpath(all_folders or [os.getcwd()])
    return folder, [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def get_category_ids(metadata: Metadata | Mapping[str, Any]) -> list[int]:
    """Return the dataset's own category id of each label, or label + 1 if it has none."""
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {label: dataset_id for dataset_id, label in mapping.items()}
    return [ids.get(label, label + 1) for label in range(len(metadata.get("thing_classes", ())))]


def write_coco(
    json_file: str, records: Sequence[dict[str, Any]], metadata: Mapping[str, Any], file_names: Iterable[str]
) -> None:
    """Write records as COCO JSON with these file names; `load_coco_json` reads it."""
    ids = get_category_ids(metadata)
    images = []
    annotations: list[dict[str, Any]] = []
    for record, file_name in zip(records, file_names, strict=True):
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": file_name, **size})
        for annotation in record["annotations"]:
            try:
                if annotation.get("segmentation") and annotation.get("area") is None:
                    encode_segmentation(annotation["segmentation"], record["height"], record["width"])
                converted = convert_to_coco(annotation, record, ids)
            except UserError as e:
                raise UserError(f"an annotation of {record['file_name']}: {e}") from e
            annotations.append({"id": len(annotations) + 1, "image_id": record["image_id"], **converted})
    categories = [{"id": i, "name": name} for i, name in zip(ids, metadata["thing_classes"], strict=True)]
    if metadata.get("keypoint_names"):
        keys = {"keypoints": list(metadata["keypoint_names"]), "skeleton": metadata.get("skeleton") or []}
        with_keypoints = {a["category_id"] for a in annotations if "keypoints" in a}
        for category in categories:
            if not with_keypoints or category["id"] in with_keypoints:
                category.update(keys)
    with atomic_write(json_file) as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def get_area(annotation: dict[str, Any], record: dict[str, Any]) -> float:
    """Return the area of an object in pixels: its `area`, or that of its valid segmentation or its box."""
    if annotation.get("area") is not None:
        return float(annotation["area"])
    size = record["height"], record["width"]
    if not find_segmentation_problem(annotation.get("segmentation"), *size):
        return float(coco_mask.area(encode_segmentation(annotation["segmentation"], *size)))
    _, _, width, height = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return width * height


def convert_to_coco(
    annotation: dict[str, Any], record: dict[str, Any], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Convert an annotation to COCO's format, without `id` and `image_id`; keep `difficult` and `score`."""
    converted = {
        "category_id": category_ids[annotation["category_id"]],
        "bbox": BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "area": get_area(annotation, record),
    }
    converted |= {key: annotation[key] for key in ("difficult", "score") if key in annotation}
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
            segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
        converted["segmentation"] = segmentation
    if annotation.get("keypoints"):
        converted["keypoints"] = shift_keypoints(annotation["keypoints"], -0.5)
        converted["num_keypoints"] = sum(v > 0 for v in converted["keypoints"][2::3])
    return converted


def scale_annotation(
    annotation: dict[str, Any], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Any]:
    """Scale a valid annotation from the image size `old`, (height, width), to `new`."""
    x = new[1] / old[1]
    y = new[0] / old[0]
    annotation = {**annotation, "bbox": _multiply(annotation["bbox"], (x, y))}
    if annotation.get("area") is not None:
        annotation["area"] *= x * y
    if annotation.get("keypoints"):
        annotation["keypoints"] = _multiply(annotation["keypoints"], (x, y, 1))
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = Image.fromarray(coco_mask.decode(encode_segmentation(segmentation, *old)))
        scaled = mask.resize(new[::-1], Image.Resampling.NEAREST)
        annotation["segmentation"] = coco_mask.encode(np.asfortranarray(scaled))
    elif segmentation:
        annotation["segmentation"] = [_multiply(polygon, (x, y)) for polygon in segmentation]
    return annotation


def _multiply(values, factors):
    return [value * factors[i % len(factors)] for i, value in enumerate(values)]
