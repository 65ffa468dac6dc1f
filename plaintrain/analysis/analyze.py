"""Analyze the predictions of a detector; the result is one JSON-compatible dict.

AP and `metrics` are in percent, other fractions 0 to 1; unknown values are None.

- `dataset`, `predictions`, `class_names`; `images`, `objects`, `crowds`, `detections`: counts
- `settings`: `iou_threshold`, `score_threshold`, `score_threshold_is` ("given" or "best F1")
- `metrics`: {task: {metric: percent}}, COCO's; tasks are bbox, segm, keypoints
- `per_class`: {task: [{`name`, `objects` (without crowds), `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`}]}
- `curves`: {task: {`recall`: [101], `mean`: {"0.50": [101], "0.75": [101]}, `classes`: [{`name`,
  "0.50": [101], "0.75": [101]}]}}: precision at each recall, by IoU
- `errors`: {bbox and segm: {the result of `compute_delta_ap`, and above the score threshold `detections`:
  {type: count}, `objects`: {state: count}, `classes`: [{`name` and both counts}]}}
- `thresholds`, `calibration`, `confusion`, `breakdown`, `gallery`: of boxes, see `analysis.breakdown`
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from plaintrain.analysis import breakdown
from plaintrain.analysis.breakdown import count_by, count_objects
from plaintrain.analysis.errors import ERRORS, REAL_STATES, Errors, find_errors
from plaintrain.evaluation.coco import COCOEvaluator, summarize
from plaintrain.evaluation.detections import Detections
from plaintrain.evaluation.predictions import convert_to_json_types, read_detections

# Indices into COCO's IoU thresholds.
_IOUS = {"0.50": 0, "0.75": 5}
_RECALLS = np.linspace(0, 1, 101)
_CLASS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def analyze(  # noqa: PLR0913 - all but the first two have defaults
    dataset_name: str,
    predictions_path: str | os.PathLike,
    iou_threshold: float = 0.5,
    score_threshold: float | None = None,
    gallery: int = 12,
    kpt_oks_sigmas: Sequence[float] = (),
    detections: Detections | None = None,
) -> dict[str, Any]:
    """Analyze predictions in COCO's results format; see the module for the result.

    Args:
        iou_threshold: minimum IoU of a correct detection, except in COCO's metrics and curves.
        score_threshold: minimum score of counted detections; None for the one with the highest F1 over all
            classes (0 if no detection is correct).
        gallery: number of images in each list of `gallery`.
        detections: the result of `read_detections` for the file, to avoid reading it again.
    """
    evaluator = COCOEvaluator(dataset_name, distributed=False, kpt_oks_sigmas=kpt_oks_sigmas)
    if detections is None:
        detections = read_detections(predictions_path, dataset_name)
    tasks = evaluator.select_tasks(detections)
    scored = [task for task in tasks if task != "keypoints"]
    errors = {task: find_errors(dataset_name, detections, iou_threshold, task=task) for task in scored}
    boxes = errors["bbox"]
    thresholds = breakdown.compute_best_thresholds(boxes)
    best = thresholds["overall"]["threshold"] or 0.0
    threshold = best if score_threshold is None else score_threshold
    filtered = {task: task_errors.filter_by_score(threshold) for task, task_errors in errors.items()}
    crowds = int(boxes.objects["crowd"].sum())
    content = {
        "dataset": dataset_name,
        "predictions": str(predictions_path),
        "class_names": boxes.classes,
        "images": len(boxes.image_ids),
        "objects": len(boxes.objects["crowd"]) - crowds,
        "crowds": crowds,
        "detections": len(boxes.detections["scores"]),
        "settings": {
            "iou_threshold": iou_threshold,
            "score_threshold": threshold,
            "score_threshold_is": "best F1" if score_threshold is None else "given",
        },
        **_compute_coco_metrics(evaluator, tasks, detections, boxes),
        "errors": {task: compute_delta_ap(errors[task]) | _count_errors(filtered[task]) for task in errors},
        "thresholds": thresholds,
        "calibration": breakdown.compute_calibration(boxes),
        "confusion": breakdown.compute_confusion_matrix(filtered["bbox"]),
        "breakdown": breakdown.compute_object_breakdown(boxes, filtered["bbox"]),
        "gallery": breakdown.select_best_and_worst(filtered["bbox"], gallery),
    }
    return convert_to_json_types(content)


def _compute_coco_metrics(evaluator, tasks, detections, errors):
    """Return `metrics`, `per_class` and `curves`."""
    content = {"metrics": {}, "per_class": {}, "curves": {}}
    counts = count_objects(errors).tolist()
    for task in tasks:
        precision, recall = evaluator.compute_curves(task, detections)
        content["metrics"][task] = summarize(precision, recall, task)
        content["curves"][task] = _compute_curves(precision, errors.classes)
        content["per_class"][task] = class_metrics = []
        for k, name in enumerate(errors.classes):
            metrics = summarize(precision[:, :, [k]], recall[:, [k]], task)
            # Keypoints have no metrics of small objects.
            selected = {key: metrics.get(key) for key in _CLASS_METRICS}
            class_metrics.append({"name": name, "objects": counts[k], **selected})
    return content


def _compute_curves(precision, names):
    def compute_mean_curve(values):
        # `[recall, classes]`; classes without objects have -1.
        values = values[:, (values > -1).all(axis=0)]
        return values.mean(axis=1).round(4).tolist() if values.size else None

    by_iou = {name: precision[i, :, :, 0, -1] for name, i in _IOUS.items()}
    classes = [
        {"name": name, **{iou: compute_mean_curve(values[:, k : k + 1]) for iou, values in by_iou.items()}}
        for k, name in enumerate(names)
    ]
    mean = {iou: compute_mean_curve(values) for iou, values in by_iou.items()}
    return {"recall": _RECALLS.round(4).tolist(), "mean": mean, "classes": classes}


def _count_errors(errors):
    types, states = count_by(errors, "labels", len(errors.classes))
    classes = [
        {"name": name, **{key: int(counts[k]) for key, counts in {**types, **states}.items()}}
        for k, name in enumerate(errors.classes)
    ]
    detections, objects = ({key: int(n.sum()) for key, n in counts.items()} for counts in (types, states))
    return {"detections": detections, "objects": objects, "classes": classes}


def compute_delta_ap(errors: Errors) -> dict[str, Any]:
    """Return TIDE's delta AP: the AP gained by fixing one error type.

    For classification and localization errors, the highest-scoring detection of each undetected object
    becomes correct and the others are dropped; for other types the detections are dropped, or missed objects
    removed. A class without remaining objects has AP 0, or 100 if it has no detections (TIDE skips it).

    Returns:
        `AP` (percent; NaN without objects), `delta_ap` (percentage points for each of `ERRORS`),
        `false_positives` (dropping all wrong detections), `false_negatives` (removing all objects that are
        not detected)
    """
    ap = compute_fixed_ap(errors)
    types = errors.detections["type"]
    labels = errors.detections["labels"]
    is_correct = types == "correct"
    without_false = _compute_mean_ap(errors, is_correct, is_correct, labels)
    without_missed = _compute_mean_ap(errors, types != "ignored", is_correct, labels, states=("detected",))
    gains = {"false_positives": without_false - ap, "false_negatives": without_missed - ap}
    return {"AP": ap, "delta_ap": {e: compute_fixed_ap(errors, (e,)) - ap for e in ERRORS}, **gains}


def compute_fixed_ap(errors: Errors, fixed: Sequence[str] = ()) -> float:
    """Return the AP in percent at `errors.iou_threshold` after fixing some error types."""
    detections = errors.detections
    objects = errors.objects
    order = errors.score_order
    types = detections["type"]
    labels = detections["labels"].copy()
    wrong = order[np.isin(types[order], [t for t in fixed if t in ("classification", "localization")])]
    wrong = wrong[objects["state"][detections["object"][wrong]] != "detected"]
    # The first detection of each object has the highest score.
    _, first = np.unique(detections["object"][wrong], return_index=True)
    corrected = wrong[first]
    labels[corrected] = objects["labels"][detections["object"][corrected]]
    kept = ~np.isin(types, ["ignored", *fixed])
    is_correct = types == "correct"
    kept[corrected] = is_correct[corrected] = True
    states = [state for state in REAL_STATES if state not in fixed]
    return _compute_mean_ap(errors, kept, is_correct, labels, states)


def _compute_mean_ap(errors, kept, is_correct, labels, states=REAL_STATES):
    """Return the mean AP in percent, counting only `kept` detections and objects in `states`."""
    order = errors.score_order[kept[errors.score_order]]
    labels = labels[order]
    is_correct = is_correct[order]
    counts = count_objects(errors, states)
    known = np.flatnonzero(count_objects(errors))
    aps = [_compute_ap(is_correct[labels == k], counts[k]) for k in known]
    # The evaluators round to as many decimals.
    return round(100 * float(np.mean(aps)), 10) if aps else float("nan")


def _compute_ap(is_correct, count):
    """Return the 101-point AP, 0 to 1, of a class from its detections by descending score."""
    if not count:
        return float(not len(is_correct))
    num_correct = np.cumsum(is_correct)
    precision = num_correct / np.arange(1, len(is_correct) + 1)
    # Interpolate: the highest precision at this or a higher recall, 0 if the recall is not reached.
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return precision[np.searchsorted(num_correct / count, _RECALLS)].mean()
