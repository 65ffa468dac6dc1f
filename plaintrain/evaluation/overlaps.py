"""Which detections and objects overlap, and how much."""

import numpy as np
from pycocotools import mask as coco_mask

# Pairs of boxes that are looked at in one go.
_PAIRS = 1_000_000


def box_overlaps(objects, detections):
    """All pairs of a detection and an object of the same image whose boxes overlap.

    Args:
        objects, detections: dicts of `image` and `boxes`, and of objects `crowd`, as in `Errors`.

    Returns:
        (index of the detection, index of the object, IoU), `[P]` each, the detections ascending. Of a crowd
        the IoU is as COCO has it, the share of the detection inside it.
    """
    order = np.argsort(objects["image"], kind="stable")
    starts, ends = (
        np.searchsorted(objects["image"][order], detections["image"], side) for side in ("left", "right")
    )
    numbers, parts = ends - starts, [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)]
    for first, last in _pieces(numbers):
        number = numbers[first:last]
        detection = np.repeat(np.arange(first, last), number)
        place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        thing = order[starts[detection] + place]
        found, there = detections["boxes"][detection], objects["boxes"][thing]
        sides = np.minimum(found[:, 2:], there[:, 2:]) - np.maximum(found[:, :2], there[:, :2])
        common = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0)
        area = (found[:, 2:] - found[:, :2]).prod(axis=1)
        union = area + (there[:, 2:] - there[:, :2]).prod(axis=1) - common
        kept = common > 0
        iou = common[kept] / np.where(objects["crowd"][thing], area, union)[kept]
        parts.append((detection[kept], thing[kept], iou))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _pieces(numbers):
    """Spans (first, last) of detections with some `_PAIRS` pairs each."""
    piece = np.cumsum(numbers) // _PAIRS
    ends = [*np.flatnonzero(np.diff(piece)) + 1, len(numbers)]
    return zip([0, *ends[:-1]], ends, strict=True)


def mask_overlaps(objects, detections, masks, object_masks):
    """As `box_overlaps`, by masks: RLEs of all detections and objects, both ordered by image."""
    parts = [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)]
    for image in np.unique(detections["image"]):
        spans = [np.searchsorted(table["image"], [image, image + 1]) for table in (detections, objects)]
        (d0, d1), (o0, o1) = spans
        if o1 > o0:
            crowd = objects["crowd"][o0:o1].astype(np.uint8)
            iou = coco_mask.iou(masks[d0:d1], object_masks[o0:o1], crowd)
            detection, thing = np.nonzero(iou)
            parts.append((detection + d0, thing + o0, iou[detection, thing]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
