"""Images with their objects and their detections, each in the colour of its outcome."""

import numpy as np
import torch

from plaintrain.analysis.errors import OUTCOMES
from plaintrain.evaluation.predictions import detections_of_image
from plaintrain.visualization.drawing import (
    default_captions,
    draw_instances,
    record_instances,
    scale_to,
    select,
)

# With more instances only the wrong ones have a label.
_LABELLED = 12


def concerns(objects, detections, labels):
    """Return whether each detection has one of some labels, or is taken for an object that has it."""
    about, types = detections["labels"].copy(), detections["type"]
    confused = np.isin(types, ("class", "both"))
    about[confused] = objects["labels"][detections["object"][confused]]
    return np.isin(about, labels) | np.isin(detections["labels"], labels)


def draw_matches(errors, index, image, *, side, skeleton=(), labels=()):
    """Draw the objects of an image, and its detections.

    Args:
        errors: `Errors` of the detections that count.
        index: of the image's record.
        image: uint8 `[3, H, W]`.
        side: pixels of the longer side of what is drawn.
        skeleton: see `skeleton_of`.
        labels: of the classes that are drawn, all if it is empty.

    Returns:
        (image with the objects, image with the detections)
    """
    record, (objects, detections) = errors.records[index], errors.of_image(index)
    predicted = detections_of_image(errors.predictions, index, errors.score_threshold, record)
    # Of the objects nothing that detections do not have, either.
    truth = {k: v for k, v in record_instances(record).items() if k in predicted or k == "crowds"}
    states = {"found": "correct", "missed": "missed", "crowd": "ignored"}
    outcomes = [
        states.get(state) or detections["type"][i].item()
        for state, i in zip(objects["state"].tolist(), objects["detection"].tolist(), strict=True)
    ]
    kept = np.isin(objects["labels"], labels), concerns(objects, detections, labels)
    texts = default_captions(truth, errors.classes), _captions(predicted, objects, detections, errors.classes)
    drawn = []
    for instances, types, keep, captions in zip(
        (truth, predicted), (outcomes, detections["type"].tolist()), kept, texts, strict=True
    ):
        chosen = np.flatnonzero(keep).tolist() if labels else list(range(len(types)))
        scaled, instances = scale_to(image, select(instances, torch.tensor(chosen, dtype=torch.int64)), side)
        types, captions = [types[i] for i in chosen], [captions[i] for i in chosen]
        if len(chosen) > _LABELLED:
            captions = [c if t != "correct" else "" for c, t in zip(captions, types, strict=True)]
        colors = [OUTCOMES[t][0] for t in types]
        drawn.append(draw_instances(scaled, instances, errors.classes, skeleton, captions, colors))
    return drawn


def _captions(predicted, objects, detections, names):
    """Return the class and score of each detection, and of a wrong one the right class or the IoU."""
    captions = default_captions(predicted, names)
    for i, (type_, target) in enumerate(zip(detections["type"], detections["object"], strict=True)):
        if type_ in ("class", "both"):
            captions[i] += f" is {names[objects['labels'][target]]}"
        elif type_ in ("localisation", "duplicate"):
            captions[i] += f" IoU {detections['iou'][i]:.2f}"
    return captions
