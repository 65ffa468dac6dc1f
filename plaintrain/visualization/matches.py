"""Draw the ground truth and the detections of an image, each in the color of its outcome."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from plaintrain.analysis.errors import OUTCOMES, Errors
from plaintrain.evaluation.predictions import get_image_detections
from plaintrain.visualization.drawing import (
    Edges,
    draw_instances,
    filter_instances,
    format_captions,
    get_record_instances,
    scale_longer_side,
)

# With more instances, only the wrong ones have a caption.
_MAX_CAPTIONS = 12
_OBJECT_OUTCOMES = {"detected": "correct", "missed": "missed", "crowd": "ignored"}


def involves_labels(
    objects: Mapping[str, np.ndarray], detections: Mapping[str, np.ndarray], labels: Sequence[int]
) -> np.ndarray:
    """Return whether each detection has one of the labels, or is matched with an object that has one."""
    target_labels = detections["labels"].copy()
    confused = np.isin(detections["type"], ("classification", "both"))
    target_labels[confused] = objects["labels"][detections["object"][confused]]
    return np.isin(target_labels, labels) | np.isin(detections["labels"], labels)


def draw_matches(
    errors: Errors, index: int, image: Tensor, *, side: int, skeleton: Edges = (), labels: Sequence[int] = ()
) -> list[Tensor]:
    """Draw the ground truth and the detections of a record on two copies of its image, uint8 `[3, H, W]`.

    Args:
        side: longer side of the drawn images, pixels.
        labels: classes to draw; empty for all.
    """
    record = errors.records[index]
    objects, detections = errors.get_image_tables(index)
    predictions = get_image_detections(errors.predictions, index, errors.score_threshold, record)
    # Show masks and keypoints of the ground truth only if the predictions have them too.
    gt = {k: v for k, v in get_record_instances(record).items() if k in predictions or k == "crowds"}
    outcomes = [
        _OBJECT_OUTCOMES.get(state) or detections["type"][i].item()
        for state, i in zip(objects["state"].tolist(), objects["detection"].tolist(), strict=True)
    ]
    names = errors.classes

    def draw(instances, types, captions, is_chosen):
        chosen = np.flatnonzero(is_chosen if labels else np.ones_like(is_chosen)).tolist()
        scaled, instances = scale_longer_side(image, filter_instances(instances, chosen), side)
        types = [types[i] for i in chosen]
        captions = [captions[i] for i in chosen]
        if len(chosen) > _MAX_CAPTIONS:
            captions = [c if t != "correct" else "" for c, t in zip(captions, types, strict=True)]
        return draw_instances(scaled, instances, names, skeleton, captions, [OUTCOMES[t][0] for t in types])

    captions = _format_detections(predictions, objects, detections, names)
    involved = involves_labels(objects, detections, labels)
    return [
        draw(gt, outcomes, format_captions(gt, names), np.isin(objects["labels"], labels)),
        draw(predictions, detections["type"].tolist(), captions, involved),
    ]


def _format_detections(predictions, objects, detections, names):
    """Return the class and score of each detection, with the true class or the IoU of a wrong one."""
    captions = format_captions(predictions, names)
    for i, (type_, target) in enumerate(zip(detections["type"], detections["object"], strict=True)):
        if type_ in ("classification", "both"):
            captions[i] += f" is {names[objects['labels'][target]]}"
        elif type_ in ("localization", "duplicate"):
            captions[i] += f" IoU {detections['iou'][i]:.2f}"
    return captions
