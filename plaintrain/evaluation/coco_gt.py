"""Conversion of records to the ground truth of COCO's metrics."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from plaintrain.data.datasets.write import convert_to_coco
from plaintrain.structures import encode_segmentation
from plaintrain.utils.errors import UserError

_REQUIRED_KEYS = {"segm": "segmentation", "keypoints": "keypoints"}


def has_annotations(records: Sequence[dict[str, Any]], task: str) -> bool:
    """Return whether any annotation can be scored in a task, or there are no annotations at all."""
    if task not in _REQUIRED_KEYS:
        return True
    usable = (bool(a.get(_REQUIRED_KEYS[task])) for record in records for a in record["annotations"])
    # True by default, if there are no annotations.
    return next(usable, True) or any(usable)


def get_num_keypoints(records: Sequence[dict[str, Any]]) -> int:
    """Return the number of keypoints of the first annotation that has any, or 0."""
    annotations = (a for record in records for a in record["annotations"])
    return next((len(a["keypoints"]) // 3 for a in annotations if a.get("keypoints")), 0)


def rank_ids(ids: Sequence[int | str]) -> np.ndarray:
    """Return new ids from 1, `[N]`, in the order of pycocotools: by value, or by position for names."""
    if not all(isinstance(i, numbers.Integral) for i in ids):
        return np.arange(1, len(ids) + 1)
    return np.argsort(np.argsort(ids)) + 1


def build_coco_gt(
    task: str, records: Sequence[dict[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Convert records to COCO's JSON format, with new ids of the images and (by label) of the categories."""
    images = []
    annotations: list[dict[str, Any]] = []
    blank: dict[str, Any] = {}
    if task == "keypoints":
        blank = {"keypoints": [0] * 3 * get_num_keypoints(records), "num_keypoints": 0}
    for image_id, record in zip(image_ids, records, strict=True):
        images.append({"id": image_id, "height": record["height"], "width": record["width"]})
        for a in record["annotations"]:
            try:
                annotation = {**blank, **convert_to_coco(a, record, category_ids)}
                mask = _encode_mask(annotation, record) if task == "segm" else {"segmentation": None}
            except UserError as e:
                raise UserError(f"an annotation of image {record['image_id']} cannot be scored: {e}") from e
            annotations.append({**annotation, **mask, "id": len(annotations) + 1, "image_id": image_id})
    categories = [{"id": category_id, "name": str(category_id)} for category_id in category_ids]
    return {"images": images, "categories": categories, "annotations": annotations}


def _encode_mask(annotation: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    size = record["height"], record["width"]
    if annotation.get("segmentation"):
        return {"segmentation": encode_segmentation(annotation["segmentation"], *size)}
    # Without a mask, the box is a crowd: detections in it are ignored.
    x, y, width, height = annotation["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"segmentation": encode_segmentation([corners], *size), "iscrowd": 1}
