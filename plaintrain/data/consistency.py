"""Find implausible boxes, and annotations that contradict each other or themselves."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from plaintrain.data.serialized import AnnotationTable
from plaintrain.structures import encode_segmentation, find_segmentation_problem

TINY = 2  # pixels
# Pixels; in smaller images, boxes of a pixel are plausible.
_SMALL_IMAGE = 16


def classify_boxes(x0: Any, y0: Any, x1: Any, y1: Any, width: Any, height: Any) -> dict[str, Any]:
    """Return {problem type: bool} of a box, or of arrays of boxes; the first true one is reported."""
    return {
        "empty_box": (x1 <= x0) | (y1 <= y0),
        "outside_box": (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0),
        # Rounding may move a box by half a pixel.
        "clipped_box": (x0 < -0.5) | (y0 < -0.5) | (x1 > width + 0.5) | (y1 > height + 0.5),
        "tiny_box": (x1 - x0 < TINY) | (y1 - y0 < TINY),
    }


def iterate_contradictions(
    records: Sequence[dict[str, Any]], table: AnnotationTable
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (problem type, annotation, example) of records with this table."""
    starts = np.searchsorted(table.record, np.arange(len(records)))
    sides = table.boxes[:, 2:] - table.boxes[:, :2]
    box_area = sides.clip(0).prod(axis=1)
    # Masks cover a part of their box, and a box may count its last pixel.
    is_odd = (table.area < 0.05 * box_area) | (table.area > 1.1 * box_area + sides.sum(axis=1) + 1)
    suspects = {
        "normalized_box": _find_normalized(table.boxes),
        "duplicate_object": _find_duplicates(table, sides),
        "wrong_area": is_odd & (box_area > 0),
    }
    for problem_type, mask in suspects.items():
        index = -1
        for i in np.flatnonzero(mask).tolist():
            if table.record[i] != index:
                # Reading a record unpickles all of it.
                index = table.record[i]
                record = records[index]
            annotation = record["annotations"][i - starts[index]]
            size = record["height"], record["width"]
            if problem_type == "wrong_area" and _has_mask_area(annotation, size):
                continue
            if problem_type == "normalized_box" and min(size) < _SMALL_IMAGE:
                continue
            area = f" and the area {annotation['area']}" if problem_type == "wrong_area" else ""
            text = f"{record['file_name']}: an annotation has the box {list(annotation['bbox'])}{area}"
            yield problem_type, annotation, text


def _find_normalized(boxes):
    """Return which boxes lie within the first pixel, or would if x1 and y1 were not width and height."""
    start = boxes[:, :2]
    end = boxes[:, 2:]
    is_normalized = (start >= 0) & (start <= 1) & (end - start <= 1)
    # VOC's reader subtracts 1 from x0 and y0.
    is_normalized |= (start >= -1) & (start < 0) & (end <= 1)
    is_normalized &= end > start.clip(0)
    # An object that the border cuts off starts at the corner.
    return is_normalized.all(axis=1) & (start != 0).any(axis=1) & (boxes % 1 != 0).any(axis=1)


def _find_duplicates(table, sides):
    """Return which annotations repeat an earlier one of their image, class and crowd flag.

    The sides of their boxes are less than a pixel, and a quarter of the box, apart.
    """
    boxes = table.boxes
    tolerance = np.minimum(1, sides.min(axis=1, initial=np.inf) / 4)
    groups = np.stack([table.record, table.labels, table.crowd], axis=1)
    order = np.lexsort((*boxes.T[::-1], *groups.T))
    is_duplicate = np.zeros(len(order), dtype=bool)
    first = np.arange(len(order) - 1)
    offset = 1
    # Equal boxes are neighbours; the limit bounds the time for many boxes with the same x0.
    while len(first) and offset <= 100:
        a = order[first]
        b = order[first + offset]
        is_near = (groups[a] == groups[b]).all(axis=1) & (boxes[b, 0] - boxes[a, 0] < 1)
        is_same = is_near & (np.abs(boxes[a] - boxes[b]).max(axis=1) < tolerance[a])
        is_duplicate[np.maximum(a, b)[is_same]] = True
        offset += 1
        first = first[is_near & (first + offset < len(order))]
    return is_duplicate


def _has_mask_area(annotation, size):
    segmentation = annotation.get("segmentation")
    if not segmentation or find_segmentation_problem(segmentation, *size):
        return False
    mask_area = coco_mask.area(encode_segmentation(segmentation, *size))
    return 0.5 * mask_area <= annotation["area"] <= 2 * mask_area
