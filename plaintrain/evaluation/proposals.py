"""Recall of proposals, whatever their class, as Detectron2's `_evaluate_box_proposals` defines it.

Difference: images without a proposal count, and all their objects as missed.
"""

import numpy as np
import torch
from torchvision.ops import box_iou

_LIMITS = (100, 1000)
_IOUS = np.linspace(0.5, 0.95, 10)
# Suffix of the metric -> areas in pixels, both ends included.
_AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def coverage(ious):
    """IoU with which each object is covered: the best pair first, and each box and object only once.

    Args:
        ious: `[proposals, objects]`.

    Returns:
        `[objects]` in 0..1, in no order; 0 for objects that no proposal was left for.
    """
    ious, covered = ious.copy(), np.zeros(ious.shape[1])
    for i in range(min(ious.shape)):
        box, thing = np.unravel_index(ious.argmax(), ious.shape)
        covered[i] = ious[box, thing]
        ious[box], ious[:, thing] = -1, -1
    return covered


def average_recall(images):
    """AR@100, ARs@100, ..., ARl@1000: recall averaged over IoU 0.5 to 0.95, in percent.

    Args:
        images: of each image, proposals `[P, 4]` XYXY with the best score first, objects
            `[G, 4]`, and the areas `[G]` of the objects in pixels.

    Returns:
        {metric: number}; NaN where no object is of that size.
    """
    covered = {(limit, suffix): [np.zeros(0)] for limit in _LIMITS for suffix in _AREAS}
    for boxes, objects, areas in images:
        boxes = torch.from_numpy(boxes[: max(_LIMITS)])
        # Of two without an area it is NaN.
        ious = box_iou(boxes, torch.from_numpy(objects)).nan_to_num().numpy()
        for (limit, suffix), values in covered.items():
            low, high = _AREAS[suffix]
            values.append(coverage(ious[:limit, (areas >= low) & (areas <= high)]))
    metrics = {}
    for (limit, suffix), values in covered.items():
        values = np.concatenate(values)
        recall = (values >= _IOUS[:, None]).mean() if len(values) else np.nan
        metrics[f"AR{suffix}@{limit}"] = 100 * float(recall)
    return metrics
