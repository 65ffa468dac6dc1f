"""Images with their objects and their detections, each in the colour of its outcome."""

import numpy as np

from plaintrain.analysis.errors import OUTCOMES
from plaintrain.evaluation.predictions import get_image_detections
from plaintrain.visualization.drawing import (
    draw_instances,
    filter_instances,
    format_captions,
    get_record_instances,
    scale_longer_side,
)

# With more instances only the wrong ones have a label.
_LABELLED = 12


def involves_labels(objects, detections, labels):
    """Return whether each detection has one of some labels, or is taken for an object that has it."""
    labels_about, types = detections["labels"].copy(), detections["type"]
    confused = np.isin(types, ("classification", "both"))
    labels_about[confused] = objects["labels"][detections["object"][confused]]
    return np.isin(labels_about, labels) | np.isin(detections["labels"], labels)


def draw_matches(errors, index, image, *, side, skeleton=(), labels=()):
    """Draw the objects of an image, and on another image its detections.

    Args:
        errors: `Errors` of the detections that count.
        index: of the image's record.
        image: uint8 `[3, H, W]`.
        side: pixels of the longer side of what is drawn.
        skeleton: see `get_skeleton`.
        labels: of the classes that are drawn, all if it is empty.
    """
    record, (objects, detections) = errors.records[index], errors.get_image_tables(index)
    predicted = get_image_detections(errors.predictions, index, errors.score_threshold, record)
    # Of the objects nothing that detections do not have, either.
    truth = {k: v for k, v in get_record_instances(record).items() if k in predicted or k == "crowds"}
    states = {"detected": "correct", "missed": "missed", "crowd": "ignored"}
    outcomes = [
        states.get(state) or detections["type"][i].item()
        for state, i in zip(objects["state"].tolist(), objects["detection"].tolist(), strict=True)
    ]
    names, drawn = errors.classes, []
    texts = format_captions(truth, names), _captions(predicted, objects, detections, names)
    for instances, types, captions, is_chosen in (
        (truth, outcomes, texts[0], np.isin(objects["labels"], labels)),
        (predicted, detections["type"].tolist(), texts[1], involves_labels(objects, detections, labels)),
    ):
        chosen = np.flatnonzero(is_chosen if labels else np.ones_like(is_chosen)).tolist()
        scaled, instances = scale_longer_side(image, filter_instances(instances, chosen), side)
        types, captions = [types[i] for i in chosen], [captions[i] for i in chosen]
        if len(chosen) > _LABELLED:
            captions = [c if t != "correct" else "" for c, t in zip(captions, types, strict=True)]
        colors = [OUTCOMES[t][0] for t in types]
        drawn.append(draw_instances(scaled, instances, names, skeleton, captions, colors))
    return drawn


def _captions(predicted, objects, detections, names):
    """Return the class and score of each detection, and of a wrong one the right class or the IoU."""
    captions = format_captions(predicted, names)
    for i, (type_, target) in enumerate(zip(detections["type"], detections["object"], strict=True)):
        if type_ in ("classification", "both"):
            captions[i] += f" is {names[objects['labels'][target]]}"
        elif type_ in ("localization", "duplicate"):
            captions[i] += f" IoU {detections['iou'][i]:.2f}"
    return captions
