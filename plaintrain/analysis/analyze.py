"""What predictions say about a detector, as one dict that can be kept as JSON.

Numbers are percent where it says AP, otherwise 0 to 1; None is not known.

- `dataset`, `predictions`, `class_names`; `images`, `objects`, `crowds`, `detections`: counts
- `settings`: `iou_threshold`, `score_threshold`, `score_threshold_is` ("given" or "best F1")
- `metrics`: {task: {metric: percent}}, COCO's, tasks are bbox, segm, keypoints
- `per_class`: {task: [{`name`, `objects`, `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`}]}; `objects`
  are those that are no crowds, for keypoints too
- `curves`: {task: {`recall`: [101], `mean`: {"0.50": [101], "0.75": [101]}, `classes`: [{`name`,
  "0.50": [101], "0.75": [101]}]}}: the precision at a recall, by IoU
- `errors`: {bbox and segm: {`AP`, `costs`, `false_positives`, `false_negatives` (see
  `compute_delta_ap`), and above the score threshold `detections`: {type: count}, `objects`: {state:
  count}, `classes`: [{`name`, and counts of both}]}}; see `errors.match`
- `thresholds`, `calibration`, `confusion`, `breakdown`, `gallery`: of boxes, see `compute_best_thresholds`,
  `calibration`, `confusion`, `compute_object_breakdown` and `select_best_and_worst` in `analysis.breakdown`
"""

import numpy as np

from plaintrain.analysis import breakdown
from plaintrain.analysis.breakdown import count_by, count_objects
from plaintrain.analysis.errors import ERRORS, REAL_STATES, find_errors
from plaintrain.evaluation.coco import COCOEvaluator, summarize
from plaintrain.evaluation.predictions import convert_to_json_types, read_detections

# Indices of IoU 0.5 and 0.75 among COCO's.
_IOUS = {"0.50": 0, "0.75": 5}
_RECALLS = np.linspace(0, 1, 101)
# There are no small objects with keypoints.
_CLASS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def analyze(  # noqa: PLR0913 - all but the first two have defaults
    dataset_name,
    predictions_path,
    iou_threshold=0.5,
    score_threshold=None,
    gallery=12,
    kpt_oks_sigmas=(),
    detections=None,
):
    """Analyse the predictions for a dataset.

    Args:
        dataset_name: a registered dataset.
        predictions_path: a JSON in COCO's results format.
        iou_threshold: IoU of a correct detection, in all but COCO's metrics and curves.
        score_threshold: of the detections that are counted; None for the one with the highest F1 over all
            classes (0 if nothing is correct).
        gallery: number of images to list as the best, and as the worst.
        kpt_oks_sigmas: see `COCOEvaluator`.
        detections: what `read_detections` gave for the file, to save reading it again.

    Returns:
        dict for a JSON file, see the module.
    """
    evaluator = COCOEvaluator(dataset_name, distributed=False, kpt_oks_sigmas=kpt_oks_sigmas)
    if detections is None:
        detections = read_detections(predictions_path, dataset_name)
    tasks = evaluator.select_tasks(detections)
    errors = {
        t: find_errors(dataset_name, detections, iou_threshold, task=t) for t in tasks if t != "keypoints"
    }
    boxes = errors["bbox"]
    thresholds = breakdown.compute_best_thresholds(boxes)
    threshold = score_threshold
    if threshold is None:
        threshold = thresholds["overall"]["threshold"] or 0.0
    above = {task: of_task.above(threshold) for task, of_task in errors.items()}
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
        **_coco_metrics(evaluator, tasks, detections, boxes),
        "errors": {task: compute_delta_ap(errors[task]) | _count_errors(above[task]) for task in errors},
        "thresholds": thresholds,
        "calibration": breakdown.compute_calibration(boxes),
        "confusion": breakdown.compute_confusion_matrix(above["bbox"]),
        "breakdown": breakdown.compute_object_breakdown(boxes, above["bbox"]),
        "gallery": breakdown.select_best_and_worst(above["bbox"], gallery),
    }
    return convert_to_json_types(content)


def _coco_metrics(evaluator, tasks, detections, errors):
    """Return `metrics`, `per_class` and `curves`."""
    content = {"metrics": {}, "per_class": {}, "curves": {}}
    for task in tasks:
        precision, recall = evaluator.compute_curves(task, detections)
        content["metrics"][task] = summarize(precision, recall, task)
        content["per_class"][task] = _per_class(precision, recall, task, errors)
        content["curves"][task] = _curves(precision, errors.classes)
    return content


def _per_class(precision, recall, task, errors):
    """Return COCO's AP of each class, over all and at single IoUs, and by size."""
    rows = []
    for k, (name, count) in enumerate(zip(errors.classes, count_objects(errors).tolist(), strict=True)):
        metrics = summarize(precision[:, :, [k]], recall[:, [k]], task)
        rows.append({"name": name, "objects": count} | {key: metrics.get(key) for key in _CLASS_METRICS})
    return rows


def _curves(precision, names):
    def mean_curve(values):
        # [recall, classes]; a class without objects has -1.
        values = values[:, (values > -1).all(axis=0)]
        return values.mean(axis=1).round(4).tolist() if values.size else None

    by_iou = {name: precision[i, :, :, 0, -1] for name, i in _IOUS.items()}
    classes = [
        {"name": name, **{iou: mean_curve(values[:, k : k + 1]) for iou, values in by_iou.items()}}
        for k, name in enumerate(names)
    ]
    mean = {iou: mean_curve(values) for iou, values in by_iou.items()}
    return {"recall": _RECALLS.round(4).tolist(), "mean": mean, "classes": classes}


def _count_errors(above):
    types, states = count_by(above, "labels", len(above.classes))
    classes = [
        {"name": name, **{key: int(counts[k]) for key, counts in {**types, **states}.items()}}
        for k, name in enumerate(above.classes)
    ]
    totals = [{key: int(counts.sum()) for key, counts in of_table.items()} for of_table in (types, states)]
    return {"detections": totals[0], "objects": totals[1], "classes": classes}


def compute_delta_ap(errors):
    """Return TIDE's delta AP: how much higher the AP would be without the errors of one type.

    Fixed, a detection of a wrong class or place is a correct one of the object it is wrong about, if that
    was not found and no other detection that is fixed with it has a higher score; all other errors are
    dropped. Missed objects are removed; of a class that has none left, AP is 0, or, if nothing is detected
    either, 100 (TIDE leaves it out).

    Returns:
        dict of `AP` (percent; NaN without objects), `costs` (`{type: percentage points}`, of `ERRORS`),
        `false_positives` (dropping all wrong detections), `false_negatives` (removing all objects that were
        not found)
    """
    ap, types, labels = compute_fixed_ap(errors), errors.detections["type"], errors.detections["labels"]
    is_correct = types == "correct"
    without_false = _mean_ap(errors, is_correct, is_correct, labels)
    without_missed = _mean_ap(errors, types != "ignored", is_correct, labels, states=("found",))
    gains = {"false_positives": without_false - ap, "false_negatives": without_missed - ap}
    return {"AP": ap, "costs": {e: compute_fixed_ap(errors, (e,)) - ap for e in ERRORS}, **gains}


def compute_fixed_ap(errors, fixed=()):
    """Return the AP in percent, at the IoU of the errors, as if there were no errors of the `fixed` types."""
    detections, objects, order = errors.detections, errors.objects, errors.score_order
    types, labels = detections["type"], detections["labels"].copy()
    wrong = order[np.isin(types[order], [t for t in fixed if t in ("class", "localisation")])]
    wrong = wrong[objects["state"][detections["object"][wrong]] != "found"]
    # The first of each object has the highest score.
    _, first = np.unique(detections["object"][wrong], return_index=True)
    corrected = wrong[first]
    labels[corrected] = objects["labels"][detections["object"][corrected]]
    kept, is_correct = ~np.isin(types, ["ignored", *fixed]), types == "correct"
    kept[corrected] = is_correct[corrected] = True
    return _mean_ap(errors, kept, is_correct, labels, [state for state in REAL_STATES if state not in fixed])


def _mean_ap(errors, kept, is_correct, labels, states=REAL_STATES):
    """Return the mean AP in percent over the classes with objects, of the detections that are `kept`.

    `states` are those of the objects that count.
    """
    order = errors.score_order[kept[errors.score_order]]
    labels, is_correct, counts = labels[order], is_correct[order], count_objects(errors, states)
    known = np.flatnonzero(count_objects(errors))
    aps = [_compute_ap(is_correct[labels == k], counts[k]) for k in known]
    # As many decimals as the evaluators give.
    return round(100 * float(np.mean(aps)), 10) if aps else float("nan")


def _compute_ap(is_correct, count):
    """Return the AP, 0 to 1, at 101 values of recall, of a class' detections by score."""
    if not count:
        return float(not len(is_correct))
    num_correct = np.cumsum(is_correct)
    precision = num_correct / np.arange(1, len(is_correct) + 1)
    # The highest precision at this recall or a higher one; 0 at a recall that is not reached.
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return precision[np.searchsorted(num_correct / count, _RECALLS)].mean()
