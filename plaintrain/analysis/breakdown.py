"""Break detections and objects down by score, class, object and image."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from plaintrain.analysis.dataset import ASPECTS, format_bins
from plaintrain.analysis.errors import DETECTION_TYPES, REAL_STATES, STATES, Errors, Table
from plaintrain.data.datasets.write import get_area
from plaintrain.evaluation.detections import compute_overlaps

# (title, description, lower edges of the bins, with COCO's sizes 32 and 96).
GROUPS = {
    "size": ("Size", "square root of the area in pixels", (0, 16, 32, 64, 96, 192)),
    "aspect": ("Shape", "width / height", ASPECTS),
    "overlaps": ("Crowdedness", "number of other objects with IoU >= 0.1", (0, 1, 2, 3, 5)),
    "objects_per_image": ("Objects in the image", "number", (1, 2, 4, 8, 16, 32)),
}
OVERLAP_IOU = 0.1


def count_objects(errors: Errors, states: Sequence[str] = REAL_STATES) -> np.ndarray:
    """Return the number of objects of each class in some states."""
    labels = errors.objects["labels"][np.isin(errors.objects["state"], states)]
    return np.bincount(labels, minlength=len(errors.classes))


def count_by(errors: Errors, key: str, length: int) -> tuple[Table, Table]:
    """Count detections of each type and objects of each state by `key`, "image" or "labels"."""
    detections = errors.detections
    objects = errors.objects
    return (
        {t: np.bincount(detections[key][detections["type"] == t], minlength=length) for t in DETECTION_TYPES},
        {s: np.bincount(objects[key][objects["state"] == s], minlength=length) for s in STATES},
    )


def compute_best_thresholds(errors: Errors) -> dict[str, Any]:
    """Return the score threshold with the highest F1: `overall` (one for all classes) and by class.

    Each has `threshold`, `f1`, `precision` and `recall` of detections with score >= threshold, or None
    without objects or correct detections; those of `classes` have a `name`.
    """
    order = errors.score_order
    types, labels, scores = (errors.detections[key][order] for key in ("type", "labels", "scores"))
    counted = types != "ignored"
    is_correct = types == "correct"
    counts = count_objects(errors)
    classes = []
    for k, name in enumerate(errors.classes):
        selected = counted & (labels == k)
        best = _find_best_threshold(scores[selected], is_correct[selected], counts[k])
        classes.append({"name": name, **best})
    overall = _find_best_threshold(scores[counted], is_correct[counted], counts.sum())
    return {"overall": overall, "classes": classes}


def _find_best_threshold(scores, is_correct, count):
    if not count or not is_correct.any():
        return dict.fromkeys(("threshold", "f1", "precision", "recall"))
    # A threshold cannot separate detections with the same score.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    num_correct = np.cumsum(is_correct)[ends]
    f1 = 2 * num_correct / (ends + 1 + count)
    i = int(f1.argmax())
    precision = num_correct[i] / (ends[i] + 1)
    recall = num_correct[i] / count
    return {"threshold": scores[ends[i]], "f1": f1[i], "precision": precision, "recall": recall}


def compute_calibration(errors: Errors, bins: int = 10) -> dict[str, Any]:
    """Compute the reliability diagram and the expected calibration error.

    Returns:
        `bins`, each with `low`, `high`, `count` and the means `score` and `precision`, and `expected_error`
    """
    counted = errors.detections["type"] != "ignored"
    scores = errors.detections["scores"][counted]
    is_correct = errors.detections["type"][counted] == "correct"
    index = np.clip((scores * bins).astype(int), 0, bins - 1)
    counts, correct, total = (np.bincount(index, weights, bins) for weights in (None, is_correct, scores))
    histogram = [
        {"low": i / bins, "high": (i + 1) / bins, "count": int(count)}
        | {"score": _divide(total[i], count), "precision": _divide(correct[i], count)}
        for i, count in enumerate(counts)
    ]
    return {"bins": histogram, "expected_error": _divide(np.abs(total - correct).sum(), counts.sum())}


def _divide(numerator, denominator):
    return float(numerator / denominator) if denominator else None


def compute_confusion_matrix(errors: Errors, max_pairs: int = 20) -> dict[str, Any]:
    """Compute the confusion matrix (rows: ground truth, columns: predictions).

    Each object and each detection that is not ignored counts once, by its state and type in `errors`: the
    first classification error of an object that is not detected is its confusion.

    Returns:
        `labels` (class names, then "other error" and "background", in the columns missed objects), `counts`,
        `normalized` (by the sums of the rows), and `pairs`, the most frequent confusions: `ground_truth`,
        `detected_as`, `count` and `fraction`
    """
    objects = errors.objects
    detections = errors.detections
    other = len(errors.classes)
    states = objects["state"]
    wrong = errors.score_order[detections["type"][errors.score_order] == "classification"]
    wrong = wrong[states[detections["object"][wrong]] == "erroneous"]
    # The first detection of each object has the highest score.
    confused, first = np.unique(detections["object"][wrong], return_index=True)
    detected_as = np.select([states == "detected", states == "missed"], [objects["labels"], other + 1], other)
    detected_as[confused] = detections["labels"][wrong[first]]
    row_of = np.where(detections["type"] == "background", other + 1, other)
    is_alone = ~np.isin(detections["type"], ["correct", "ignored"])
    is_alone[wrong[first]] = False
    counts = np.zeros((other + 2, other + 2), dtype=np.int64)
    real = ~objects["crowd"]
    np.add.at(counts, (objects["labels"][real], detected_as[real]), 1)
    np.add.at(counts, (row_of[is_alone], detections["labels"][is_alone]), 1)
    normalized = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    confused = counts[:-2, :-2] * ~np.eye(other, dtype=bool)
    order = np.argsort(-confused, axis=None, kind="stable")[: min(max_pairs, np.count_nonzero(confused))]
    labels = [*errors.classes, "other error", "background"]
    pairs = [
        {"ground_truth": labels[i], "detected_as": labels[j]}
        | {"count": counts[i, j].item(), "fraction": normalized[i, j].item()}
        for i, j in zip(*np.unravel_index(order, confused.shape), strict=True)
    ]
    return {"labels": labels, "counts": counts.tolist(), "normalized": normalized.tolist(), "pairs": pairs}


def compute_object_breakdown(errors: Errors, filtered: Errors) -> dict[str, list[dict[str, Any]]]:
    """Compute the recall by size, aspect, overlaps and number of objects in the image (see `GROUPS`).

    `filtered` are the errors above the score threshold.

    Returns:
        for each group a list of bins with `name`, `low`, `high` (exclusive, or None), `objects`, `recall`,
        `mean_iou` (of detected objects); above the threshold `recall_above` and the counts of `REAL_STATES`
    """
    real = np.flatnonzero(~errors.objects["crowd"])
    objects = {key: errors.objects[key][real] for key in ("image", "boxes", "crowd")}
    sides = objects["boxes"][:, 2:] - objects["boxes"][:, :2]
    areas = np.array([get_area(a, record) for record in errors.records for a in record["annotations"]])
    counts = np.bincount(objects["image"], minlength=1)
    first, second, iou = compute_overlaps(objects, objects)
    near = (first != second) & (iou >= OVERLAP_IOU)
    with np.errstate(divide="ignore", invalid="ignore"):
        aspects = sides[:, 0] / sides[:, 1]
    values = {
        "size": np.sqrt(areas[real]),
        "aspect": aspects,
        "overlaps": np.bincount(first[near], minlength=len(real)),
        "objects_per_image": counts[objects["image"]],
    }
    return {
        key: _count_bins(errors, filtered, real, values[key], lows) for key, (_, _, lows) in GROUPS.items()
    }


def _count_bins(errors, filtered, indices, values, lows):
    bins = []
    bin_of = np.digitize(values, lows[1:])
    names = format_bins(lows, values.dtype.kind == "i")
    for i, (name, high) in enumerate(zip(names, [*lows[1:], None], strict=True)):
        members = indices[bin_of == i]
        detected = members[errors.objects["state"][members] == "detected"]
        states = {state: int((filtered.objects["state"][members] == state).sum()) for state in REAL_STATES}
        ious = errors.detections["iou"][errors.objects["detection"][detected]]
        counts = {"name": name, "low": lows[i], "high": high, "objects": len(members), **states}
        recall, recall_above = (_divide(n, len(members)) for n in (len(detected), states["detected"]))
        mean_iou = _divide(ious.sum(), len(detected))
        bins.append({**counts, "recall": recall, "recall_above": recall_above, "mean_iou": mean_iou})
    return bins


def select_best_and_worst(errors: Errors, max_images: int = 12) -> dict[str, list[dict[str, Any]]]:
    """List the images with the highest and the lowest F1; ties are sorted by the number of objects.

    Returns:
        `best` (with objects) and `worst` (with errors), disjoint lists of up to `max_images` images:
        `image_id`, `file_name`, `index` of the record, `f1` (1 without objects and detections), and the
        counts of detections by type (`wrong`: all errors) and of objects by state
    """
    types, states = count_by(errors, "image", len(errors.image_ids))
    num_wrong = np.sum([types[name] for name in types if name not in ("correct", "ignored")], axis=0)
    num_objects = np.sum([states[state] for state in REAL_STATES], axis=0)
    total = states["detected"] + num_objects + num_wrong
    f1 = np.where(total > 0, 2 * states["detected"] / np.maximum(total, 1), 1.0)
    columns = {**types, **{state: states[state] for state in REAL_STATES}, "wrong": num_wrong, "f1": f1}
    best = np.lexsort((-num_objects, -f1))
    best = best[num_objects[best] > 0]
    best = best[: min(max_images, (len(best) + 1) // 2)]
    worst = np.lexsort((-num_objects - num_wrong, f1))
    worst = worst[(f1[worst] < 1) & ~np.isin(worst, best)][:max_images]

    def describe(i):
        counts = {name: values[i].item() for name, values in columns.items()}
        file_name = errors.records[i]["file_name"]
        return {"image_id": errors.image_ids[i], "file_name": file_name, "index": i, **counts}

    return {"best": [*map(describe, best.tolist())], "worst": [*map(describe, worst.tolist())]}
