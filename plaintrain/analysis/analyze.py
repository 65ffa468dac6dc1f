"""Everything that predictions for a dataset say about a detector, as one dict that can be kept as JSON."""

import numpy as np

from plaintrain.analysis.breakdown import (
    best_and_worst,
    best_thresholds,
    calibration,
    confusion,
    count_by,
    object_breakdown,
)
from plaintrain.analysis.error_costs import ap_cost
from plaintrain.analysis.errors import errors_above, errors_of
from plaintrain.evaluation.coco import COCOEvaluator, mean_ap, summary
from plaintrain.evaluation.predictions import plain, read_detections

# Places of IoU 0.5 and 0.75 among COCO's.
_IOUS = {"0.50": 0, "0.75": 5}


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
        dataset_name: a registered dataset, of any format.
        predictions_path: a JSON in COCO's results format, see `read_predictions`.
        iou_threshold: IoU that a correct detection has at least, in all but COCO's metrics and curves.
        score_threshold: what a detection must have to count in what needs one; None for the one with the
            highest F1 over all classes (0 if nothing is correct).
        gallery: how many images to list as the best, and as the worst.
        kpt_oks_sigmas: see `COCOEvaluator`.
        detections: what `read_detections` gave for the file, to save reading it again.

    Returns:
        dict of numbers, strings, lists and dicts, None for what is not known; percent where it says AP,
        otherwise 0 to 1:

        - `dataset`, `predictions`, `class_names`; `images`, `objects`, `crowds`, `detections`: counts
        - `settings`: `iou_threshold`, `score_threshold`, `score_threshold_is` ("given" or "best F1")
        - `metrics`: {task: {metric: percent}}, COCO's, tasks are bbox, segm, keypoints
        - `per_class`: {task: [{`name`, `objects`, `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`}]}; `objects`
          are those that are no crowds, for keypoints too
        - `curves`: {task: {`recall`: [101], `mean`: {"0.50": [101], "0.75": [101]}, `classes`: [{`name`,
          "0.50": [101], "0.75": [101]}]}}: the precision at a recall, by IoU
        - `errors`: {bbox and segm: {`AP`, `costs`, `false_positives`, `false_negatives` (see `ap_cost`),
          and above the score threshold `detections`: {kind: count}, `objects`: {state: count}, `classes`:
          [{`name`, and counts of both}]}}; of `KINDS` and `STATES` in `analysis.errors`
        - `thresholds`, `calibration`, `confusion`, `breakdown`, `gallery`: of boxes, see `best_thresholds`,
          `calibration`, `confusion`, `object_breakdown` and `best_and_worst` in `analysis.breakdown`

    Raises:
        UserError: what `read_predictions` and `COCOEvaluator` refuse.
    """
    evaluator = COCOEvaluator(dataset_name, distributed=False, kpt_oks_sigmas=kpt_oks_sigmas)
    if detections is None:
        detections = read_detections(predictions_path, dataset_name)
    found = _analysis(evaluator, detections, iou_threshold, score_threshold, gallery)
    return plain({"dataset": dataset_name, "predictions": str(predictions_path), **found})


def _analysis(evaluator, detections, iou_threshold, score_threshold, gallery):
    tasks, name = evaluator.tasks_of(detections), evaluator.dataset_name
    by_shape = [task for task in tasks if task != "keypoints"]
    errors = {task: errors_of(name, detections, iou_threshold, task=task) for task in by_shape}
    boxes = errors["bbox"]
    thresholds = best_thresholds(boxes)
    threshold, how = score_threshold, "given"
    if threshold is None:
        threshold, how = thresholds["overall"]["threshold"] or 0.0, "best F1"
    settings = {"iou_threshold": iou_threshold, "score_threshold": threshold, "score_threshold_is": how}
    above = errors_above(boxes, threshold)
    return {
        **_contents(boxes),
        "settings": settings,
        **_coco(evaluator, tasks, detections, boxes),
        "errors": {task: ap_cost(errors[task]) | _error_counts(errors[task], threshold) for task in errors},
        "thresholds": thresholds,
        "calibration": calibration(boxes),
        "confusion": confusion(above),
        "breakdown": object_breakdown(boxes, above),
        "gallery": best_and_worst(above, gallery),
    }


def _contents(errors):
    crowds = int(errors.objects["crowd"].sum())
    return {
        "class_names": errors.classes,
        "images": len(errors.image_ids),
        "objects": len(errors.objects["crowd"]) - crowds,
        "crowds": crowds,
        "detections": len(errors.detections["scores"]),
    }


def _coco(evaluator, tasks, detections, errors):
    """`metrics`, `per_class` and `curves`."""
    labels = errors.objects["labels"][~errors.objects["crowd"]]
    objects = np.bincount(labels, minlength=len(errors.classes)).tolist()
    found = {"metrics": {}, "per_class": {}, "curves": {}}
    for task in tasks:
        precision, recall = evaluator.precision_recall(task, detections)
        found["metrics"][task] = summary(precision, recall, task)
        found["per_class"][task] = _per_class(precision, task, errors.classes, objects)
        found["curves"][task] = _curves(precision, errors.classes)
    return found


def _per_class(precision, task, names, objects):
    """COCO's AP of each class, over all and at single IoUs, and by size."""
    sizes = "ml" if task == "keypoints" else "sml"
    rows = []
    for k, (name, number) in enumerate(zip(names, objects, strict=True)):
        mine = precision[:, :, k, :, -1]
        row = {"name": name, "objects": number, "AP": mean_ap(mine[..., 0])}
        row |= {"AP50": mean_ap(mine[0, :, 0]), "AP75": mean_ap(mine[5, :, 0]), "APs": float("nan")}
        rows.append(row | {f"AP{size}": mean_ap(mine[..., i]) for i, size in enumerate(sizes, start=1)})
    return rows


def _curves(precision, names):
    def curve(values):
        # [recall, classes], of which one has no objects where it is -1.
        values = values[:, (values > -1).all(axis=0)]
        return values.mean(axis=1).round(4).tolist() if values.size else None

    at = {name: precision[i, :, :, 0, -1] for name, i in _IOUS.items()}
    classes = [
        {"name": name, **{iou: curve(values[:, k : k + 1]) for iou, values in at.items()}}
        for k, name in enumerate(names)
    ]
    recall = np.linspace(0, 1, precision.shape[1]).round(4).tolist()
    return {"recall": recall, "mean": {iou: curve(values) for iou, values in at.items()}, "classes": classes}


def _error_counts(errors, score_threshold):
    """How often each kind and each state there is above a score, in all and by class."""
    kinds, states = count_by(errors_above(errors, score_threshold), "labels", len(errors.classes))
    classes = [
        {"name": name, **{key: int(counts[k]) for key, counts in {**kinds, **states}.items()}}
        for k, name in enumerate(errors.classes)
    ]
    totals = ({key: int(counts.sum()) for key, counts in part.items()} for part in (kinds, states))
    return {**dict(zip(("detections", "objects"), totals, strict=True)), "classes": classes}
