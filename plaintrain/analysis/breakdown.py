"""Detections in groups: by score, by class, by object, by image."""

import numpy as np

from plaintrain.analysis.dataset import ASPECTS, format_bins
from plaintrain.analysis.errors import DETECTION_TYPES, REAL_STATES, STATES, match_greedily
from plaintrain.data.datasets.write import get_area
from plaintrain.evaluation.detections import compute_overlaps

# Lower edges of the bins of objects; the root of the area in pixels has COCO's sizes, 32 and 96, among them.
_BINS = {
    "size": (0, 16, 32, 64, 96, 192),
    "aspect": ASPECTS,
    "overlaps": (0, 1, 2, 3, 5),
    "objects_per_image": (1, 2, 4, 8, 16, 32),
}
# What these are: (title, description).
GROUPS = {
    "size": ("Size", "root of the area in pixels"),
    "aspect": ("Shape", "width : height"),
    "overlaps": ("Crowdedness", "other objects that overlap it (IoU from 0.1)"),
    "objects_per_image": ("Objects in the image", "number"),
}
# IoU from which on two objects are in each other's way.
OVERLAP_IOU = 0.1


def count_objects(errors, states=REAL_STATES):
    """Return the number of objects of each class, of those in some states."""
    labels = errors.objects["labels"][np.isin(errors.objects["state"], states)]
    return np.bincount(labels, minlength=len(errors.classes))


def count_by(errors, key, length):
    """Return ({type: counts}, {state: counts}) by the value, 0 to `length` - 1, of "image" or "labels"."""
    detections, objects = errors.detections, errors.objects
    return (
        {t: np.bincount(detections[key][detections["type"] == t], minlength=length) for t in DETECTION_TYPES},
        {s: np.bincount(objects[key][objects["state"] == s], minlength=length) for s in STATES},
    )


def compute_best_thresholds(errors):
    """Return the score threshold with the highest F1, `overall` (all classes at one) and for all `classes`.

    Each has `threshold`, `f1`, `precision` and `recall` (0 to 1; detections with at least the threshold
    count), None where there are no objects or nothing correct; a class has a `name`.
    """
    order = errors.score_order
    types, labels, scores = (errors.detections[key][order] for key in ("type", "labels", "scores"))
    counted, is_correct, counts = types != "ignored", types == "correct", count_objects(errors)
    classes = []
    for k, name in enumerate(errors.classes):
        chosen = counted & (labels == k)
        classes.append({"name": name, **_best_threshold(scores[chosen], is_correct[chosen], counts[k])})
    overall = _best_threshold(scores[counted], is_correct[counted], counts.sum())
    return {"overall": overall, "classes": classes}


def _best_threshold(scores, is_correct, count):
    if not count or not is_correct.any():
        return dict.fromkeys(("threshold", "f1", "precision", "recall"))
    # Detections of the same score are all above a threshold, or none is.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    num_correct = np.cumsum(is_correct)[ends]
    f1 = 2 * num_correct / (ends + 1 + count)
    i = int(f1.argmax())
    precision, recall = num_correct[i] / (ends[i] + 1), num_correct[i] / count
    return {"threshold": scores[ends[i]], "f1": f1[i], "precision": precision, "recall": recall}


def compute_calibration(errors, bins=10):
    """Compare the scores with the fraction of detections that are correct.

    Returns:
        dict of `bins`, each with `low`, `high`, `count`, `score` and `precision` (means, 0 to 1), and
        `expected_error`, the mean over detections of the difference of the two in their bin
    """
    counted = errors.detections["type"] != "ignored"
    scores, is_correct = errors.detections["scores"][counted], errors.detections["type"][counted] == "correct"
    index = np.clip((scores * bins).astype(int), 0, bins - 1)
    counts, correct, total = (np.bincount(index, weights, bins) for weights in (None, is_correct, scores))
    histogram = [
        {"low": i / bins, "high": (i + 1) / bins, "count": int(count)}
        | {"score": _divide(total[i], count), "precision": _divide(correct[i], count)}
        for i, count in enumerate(counts)
    ]
    return {"bins": histogram, "expected_error": _divide(np.abs(total - correct).sum(), counts.sum())}


def _divide(part, whole):
    return float(part / whole) if whole else None


def compute_confusion_matrix(errors, most=20):
    """Count what objects of each class are detected as.

    Each object and each detection that is not ignored counts once: first the correct ones, then, in the
    order of scores, detections and objects of other classes with enough IoU are paired.

    Returns:
        dict of `labels` (class names, then "background"), `counts` (rows: ground truth, columns: detected
        as), `shares` (`counts` by the row's sum) and `pairs`, the `most` pairs of two classes that are
        mistaken most often: `truth`, `found`, `count` and `share`
    """
    objects, detections, background = errors.objects, errors.detections, len(errors.classes)
    is_wrong = ~np.isin(detections["type"], ["correct", "ignored"])
    detection, target, iou = compute_overlaps(objects, detections)
    able = is_wrong[detection] & (iou >= errors.iou_threshold)
    able = np.flatnonzero(able & np.isin(objects["state"], ["missed", "erroneous"])[target])
    able = able[np.lexsort((-iou[able], -detections["scores"][detection[able]]))]
    able = able[match_greedily(detection[able], target[able])]
    detected_as = np.where(objects["state"] == "found", objects["labels"], background)
    detected_as[target[able]] = detections["labels"][detection[able]]
    is_wrong[detection[able]] = False
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    real = ~objects["crowd"]
    np.add.at(counts, (objects["labels"][real], detected_as[real]), 1)
    np.add.at(counts, (background, detections["labels"][is_wrong]), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistaken = counts[:-1, :-1] * ~np.eye(background, dtype=bool)
    order = np.argsort(-mistaken, axis=None, kind="stable")[: min(most, np.count_nonzero(mistaken))]
    labels = [*errors.classes, "background"]
    pairs = [
        {"truth": labels[i], "found": labels[j], "count": counts[i, j].item(), "share": shares[i, j].item()}
        for i, j in zip(*np.unravel_index(order, mistaken.shape), strict=True)
    ]
    return {"labels": labels, "counts": counts.tolist(), "shares": shares.tolist(), "pairs": pairs}


def compute_object_breakdown(errors, above):
    """Count the objects that are found, by their size, aspect, and by what is around them.

    Args:
        errors, above: `Errors` of all detections, and of those with a high enough score.

    Returns:
        dict of `size` (root of the area in pixels), `aspect` (width by height), `overlaps` (number of other
        objects with an IoU of at least 0.1) and `objects_per_image`: a list of bins, each with `name`, `low`,
        `high` (exclusive, or None), `objects`, `recall`, `recall_above` (the threshold), `mean_iou` (of the
        objects found), and the number that are `found`, `erroneous` and `missed` above the threshold
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
    return {key: _count_bins(errors, above, real, values[key], lows) for key, lows in _BINS.items()}


def _count_bins(errors, above, indices, values, lows):
    bins, bin_of = [], np.digitize(values, lows[1:])
    names = format_bins(lows, values.dtype.kind == "i")
    for i, (name, high) in enumerate(zip(names, [*lows[1:], None], strict=True)):
        members = indices[bin_of == i]
        found = members[errors.objects["state"][members] == "found"]
        states = {state: int((above.objects["state"][members] == state).sum()) for state in REAL_STATES}
        ious = errors.detections["iou"][errors.objects["detection"][found]]
        counts = {"name": name, "low": lows[i], "high": high, "objects": len(members), **states}
        recall, above_recall = (_divide(n, len(members)) for n in (len(found), states["found"]))
        mean_iou = _divide(ious.sum(), len(found))
        bins.append({**counts, "recall": recall, "recall_above": above_recall, "mean_iou": mean_iou})
    return bins


def select_best_and_worst(above, number=12):
    """List the images with the highest and the lowest F1, of equal ones those with more in them.

    Returns:
        dict of `best` (with objects) and `worst` (not perfect), up to `number` images, none in both, of
        `image_id`, `file_name`, `index` of the record, `f1` (0 to 1; 1 where nothing is and nothing is
        detected), and the numbers of detections by type (`wrong`: all errors) and of objects by state
    """
    types, states = count_by(above, "image", len(above.image_ids))
    wrong = sum(counts for name, counts in types.items() if name not in ("correct", "ignored"))
    size = sum(states[state] for state in REAL_STATES)
    total = states["found"] + size + wrong
    f1 = np.where(total > 0, 2 * states["found"] / np.maximum(total, 1), 1.0)
    columns = {**types, **{state: states[state] for state in REAL_STATES}, "wrong": wrong, "f1": f1}
    best = np.lexsort((-size, -f1))
    best = best[size[best] > 0]
    best = best[: min(number, (len(best) + 1) // 2)]
    worst = np.lexsort((-size - wrong, f1))
    worst = worst[(f1[worst] < 1) & ~np.isin(worst, best)][:number]

    def describe(i):
        numbers = {name: values[i].item() for name, values in columns.items()}
        file_name = above.records[i]["file_name"]
        return {"image_id": above.image_ids[i], "file_name": file_name, "index": i, **numbers}

    return {"best": [*map(describe, best.tolist())], "worst": [*map(describe, worst.tolist())]}
