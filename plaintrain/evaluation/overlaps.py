"""Which detections and objects overlap, and how much."""

import numpy as np
from pycocotools import mask as coco_mask


def compute_overlaps(objects, detections, masks=None):
    """Return all pairs of a detection and an object of the same image that overlap.

    Args:
        objects, detections: dicts of `image` (ascending), `boxes`, and of objects `crowd`, as in `Errors`.
        masks: RLEs of the objects and of the detections, to compare in place of the boxes.

    Returns:
        (index of the detection, index of the object, IoU), `[P]` each, the detections ascending. Of a crowd
        the IoU is as COCO has it, the share of the detection inside it.
    """
    object_shapes, shapes = masks or (_to_xywh(table["boxes"]) for table in (objects, detections))
    parts = [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)]
    for image in np.unique(detections["image"]):
        spans = [np.searchsorted(table["image"], [image, image + 1]) for table in (detections, objects)]
        (d0, d1), (o0, o1) = spans
        if o1 > o0:
            crowd = objects["crowd"][o0:o1].astype(np.uint8)
            iou = coco_mask.iou(shapes[d0:d1], object_shapes[o0:o1], crowd)
            detection, target = np.nonzero(iou)
            parts.append((detection + d0, target + o0, iou[detection, target]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _to_xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
