"""What detections are like in parts: by score, by class, by object, by image. Numbers that go into JSON."""

import numpy as np

from plaintrain.analysis.dataset import ASPECTS, bin_names
from plaintrain.analysis.error_costs import score_order
from plaintrain.analysis.errors import KINDS, STATES, choose
from plaintrain.evaluation.coco_gt import area
from plaintrain.evaluation.overlaps import box_overlaps

# What objects are sorted by: the lowest values of the bins. COCO's sizes, 32 and 96, are among those of the
# root of the area, in pixels.
_BINS = {
    "size": (0, 16, 32, 64, 96, 192),
    "aspect": ASPECTS,
    "overlaps": (0, 1, 2, 3, 5),
    "objects_per_image": (1, 2, 4, 8, 16, 32),
}
# IoU from which on two objects are in each other's way.
OVERLAP_IOU = 0.1


def best_thresholds(errors):
    """The score threshold with the highest F1, overall and for each class.

    Args:
        errors: `Errors` of all detections.

    Returns:
        dict of `overall` (all classes at one threshold) and `classes` (a list by label, with `name`): each
        has `threshold`, `f1`, `precision` and `recall` (0 to 1; detections with at least the threshold
        count), None where there are no objects or nothing correct.
    """
    order = score_order(errors)
    order = order[errors.matches.kinds[order] != "ignored"]
    labels, scores = errors.detections["labels"][order], errors.detections["scores"][order]
    correct = errors.matches.kinds[order] == "correct"
    counts = np.bincount(errors.objects["labels"][~errors.objects["crowd"]], minlength=len(errors.classes))
    classes = []
    for k, name in enumerate(errors.classes):
        mine = labels == k
        classes.append({"name": name, **_best_threshold(scores[mine], correct[mine], counts[k])})
    return {"overall": _best_threshold(scores, correct, counts.sum()), "classes": classes}


def _best_threshold(scores, correct, count):
    if not count or not correct.any():
        return dict.fromkeys(("threshold", "f1", "precision", "recall"))
    # Detections of the same score are all above a threshold, or none is.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    found = np.cumsum(correct)[ends]
    f1 = 2 * found / (ends + 1 + count)
    i = int(f1.argmax())
    rates = {"f1": f1[i], "precision": found[i] / (ends[i] + 1), "recall": found[i] / count}
    return {"threshold": float(scores[ends[i]]), **{key: float(value) for key, value in rates.items()}}


def calibration(errors, bins=10):
    """Whether a score says how often a detection is correct.

    Returns:
        dict of `bins`, each with `low`, `high`, `count`, `score` and `precision` (means, 0 to 1, None where
        nothing is), and `expected_error`, the mean over detections of the difference of the two in their
        bin; None without detections
    """
    real = errors.matches.kinds != "ignored"
    scores, correct = errors.detections["scores"][real], errors.matches.kinds[real] == "correct"
    place = np.clip((scores * bins).astype(int), 0, bins - 1)
    counts, found = (np.bincount(place, weights, bins) for weights in (None, correct))
    total = np.bincount(place, scores, bins)
    parts = [
        {"low": i / bins, "high": (i + 1) / bins, "count": int(count)}
        | {"score": _share(total[i], count), "precision": _share(found[i], count)}
        for i, count in enumerate(counts)
    ]
    return {"bins": parts, "expected_error": _share(np.abs(total - found).sum(), counts.sum())}


def confusion(errors, most=20):
    """What objects of each class are found as.

    Each object and each detection that is not ignored counts once. Objects that are found correctly are;
    of the rest, in the order of scores, detections and objects of other classes with enough IoU are put
    together.

    Args:
        errors: `Errors` of the detections that count.
        most: how many pairs of classes to list.

    Returns:
        dict of `labels` (class names, then "background"), `counts` (rows: what there is, columns: what it
        is found as; an object that is not found is found as background), `shares` (`counts` by the row's
        sum) and `pairs`, those of two classes that are mistaken most often: `truth`, `found`, `count` and
        `share`
    """
    matches, objects, found = errors.matches, errors.objects, errors.detections
    detection, thing, iou = box_overlaps(objects, found)
    able = ~np.isin(matches.kinds, ["correct", "ignored"])[detection] & (iou >= errors.iou_threshold)
    able &= np.isin(matches.states, ["missed", "erroneous"])[thing]
    able = np.flatnonzero(able)
    able = able[np.lexsort((-iou[able], -found["scores"][detection[able]]))]
    able = able[choose(detection[able], thing[able])]
    background = len(errors.classes)
    found_as = np.where(matches.states == "found", objects["labels"], background)
    found_as[thing[able]] = found["labels"][detection[able]]
    alone = ~np.isin(matches.kinds, ["correct", "ignored"])
    alone[detection[able]] = False
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    real = ~objects["crowd"]
    np.add.at(counts, (objects["labels"][real], found_as[real]), 1)
    np.add.at(counts, (background, found["labels"][alone]), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts[:-1, :-1] * ~np.eye(background, dtype=bool)
    pairs = [
        {"truth": errors.classes[i], "found": errors.classes[j], "count": int(wrong[i, j])}
        | {"share": float(shares[i, j])}
        for i, j in np.argwhere(wrong).tolist()
    ]
    pairs = sorted(pairs, key=lambda pair: -pair["count"])[:most]
    labels = [*errors.classes, "background"]
    return {"labels": labels, "counts": counts.tolist(), "shares": shares.tolist(), "pairs": pairs}


def object_breakdown(errors, above):
    """How many objects are found, by their size, aspect, and by what is around them.

    Args:
        errors, above: `Errors` of all detections, and of those with a high enough score.

    Returns:
        dict of `size` (root of the area in pixels), `aspect` (width by height), `overlaps` (other objects of
        the image with an IoU of at least 0.1) and `objects_per_image`: a list of bins, each with `name`,
        `low`, `high` (not in it; None for no limit), `objects`, `recall` (by all detections),
        `recall_above` (by those above the threshold), `mean_iou` (of the objects found), and how many
        objects are `found`, `erroneous` and `missed` above the threshold; None where there are no objects
    """
    real = ~errors.objects["crowd"]
    sides = (errors.objects["boxes"][:, 2:] - errors.objects["boxes"][:, :2])[real]
    areas = np.array([area(a, record) for record in errors.records for a in record["annotations"]])
    image = errors.objects["image"][real]
    alone = {
        "image": image,
        "boxes": errors.objects["boxes"][real],
        "crowd": np.zeros(len(image), dtype=bool),
    }
    first, second, iou = box_overlaps(alone, alone)
    near = (first != second) & (iou >= OVERLAP_IOU)
    with np.errstate(divide="ignore", invalid="ignore"):
        aspects = sides[:, 0] / sides[:, 1]
    values = {
        "size": np.sqrt(areas[real]),
        "aspect": aspects,
        "overlaps": np.bincount(first[near], minlength=len(image)),
        "objects_per_image": np.bincount(image)[image] if len(image) else image,
    }
    return {key: _bins(errors, above, np.flatnonzero(real), values[key], lows) for key, lows in _BINS.items()}


def _bins(errors, above, things, values, lows):
    place, parts = np.digitize(values, lows[1:]), []
    names = bin_names(lows, values.dtype.kind == "i")
    for i, (name, high) in enumerate(zip(names, [*lows[1:], None], strict=True)):
        mine = things[place == i]
        found = mine[errors.matches.states[mine] == "found"]
        states = {state: int((above.matches.states[mine] == state).sum()) for state in STATES[:3]}
        part = {"name": name, "low": lows[i], "high": high, "objects": len(mine)}
        part |= {"recall": _share(len(found), len(mine)), "recall_above": _share(states["found"], len(mine))}
        ious = errors.matches.ious[errors.matches.detections[found]]
        parts.append({**part, "mean_iou": _share(ious.sum(), len(found)), **states})
    return parts


def count_by(errors, key, number):
    """({kind: counts}, {state: counts}) by the value, 0 to `number` - 1, of "image" or "labels"."""
    parts = (KINDS, errors.matches.kinds, errors.detections), (STATES, errors.matches.states, errors.objects)
    return tuple(
        {name: np.bincount(table[key][values == name], minlength=number) for name in names}
        for names, values, table in parts
    )


def image_scores(above):
    """What went well and wrong in each image, arrays of a number for each record.

    Args:
        above: `Errors` of the detections that count.

    Returns:
        dict of the counts of each of `KINDS`, `wrong` (all but "correct" and "ignored"), `found`, `erroneous`
        and `missed`, and of `f1` (0 to 1; 1 where nothing is and nothing is found)
    """
    kinds, states = count_by(above, "image", len(above.image_ids))
    counts = {**kinds, **states}
    del counts["crowd"]
    counts["wrong"] = sum(counts[kind] for kind in KINDS if kind not in ("correct", "ignored"))
    total = 2 * counts["found"] + counts["wrong"] + counts["erroneous"] + counts["missed"]
    f1 = np.where(total > 0, 2 * counts["found"] / np.maximum(total, 1), 1.0)
    return {**counts, "f1": f1}


def best_and_worst(above, number=12):
    """The images with the highest and the lowest F1, of equal ones those with more in them.

    Returns:
        dict of `best` (with objects) and `worst` (not perfect), up to `number` images each, none in both:
        `image_id`, `file_name`, `index` of the record, `f1`, and the counts of `image_scores`
    """
    scores = image_scores(above)
    size = scores["found"] + scores["erroneous"] + scores["missed"]
    best = np.lexsort((-size, -scores["f1"]))
    best = best[size[best] > 0]
    best = best[: min(number, (len(best) + 1) // 2)]
    worst = np.lexsort((-size - scores["wrong"], scores["f1"]))
    worst = worst[(scores["f1"][worst] < 1) & ~np.isin(worst, best)][:number]

    def entry(i):
        numbers = {name: values[i].item() for name, values in scores.items()}
        file_name = above.records[i]["file_name"]
        return {"image_id": above.image_ids[i], "file_name": file_name, "index": i, **numbers}

    return {name: [entry(i) for i in chosen.tolist()] for name, chosen in (("best", best), ("worst", worst))}


def _share(part, whole):
    return float(part / whole) if whole else None
