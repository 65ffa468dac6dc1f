"""How much AP each kind of error costs, as TIDE measures it: mend one kind, leave the rest as it is.

Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115
"""

import numpy as np

from plaintrain.evaluation.coco_truth import ranks

# What can be mended, in TIDE's order: kinds of detections, and missed objects.
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")
_RECALLS = np.linspace(0, 1, 101)


def ap_cost(errors):
    """The AP at one IoU, and how much higher it would be without the errors of each kind.

    Mended, a detection of a wrong class or place is a correct one of the object it is wrong about, if that
    was not found and no other detection that is mended with it has a higher score; all others are
    dropped. Missed objects are taken away. The costs do not add up to what is lacking: each is what is
    gained by mending one kind alone.

    Args:
        errors: `Errors` of all detections, or of those with a score that is high enough.

    Returns:
        dict of `AP` (percent; NaN without objects), `costs` (`{kind: percentage points}`, of `ERRORS`),
        `false_positives` (of all wrong detections, were they dropped), `false_negatives` (of all objects
        that were not found, were they taken away)
    """
    order = score_order(errors)
    ap = fixed_ap(errors, (), order)
    correct, counts = errors.matches.kinds == "correct", _objects_per_class(errors)
    labels, number = errors.detections["labels"], len(errors.classes)
    kept = order[correct[order]]
    found = np.bincount(labels[correct], minlength=number)
    real = order[errors.matches.kinds[order] != "ignored"]
    without_false = _mean_ap(labels[kept], correct[kept], counts, counts > 0)
    without_missed = _mean_ap(labels[real], correct[real], found, counts > 0)
    return {
        "AP": ap,
        "costs": {kind: fixed_ap(errors, (kind,), order) - ap for kind in ERRORS},
        "false_positives": without_false - ap,
        "false_negatives": without_missed - ap,
    }


def fixed_ap(errors, kinds=(), order=None):
    """AP in percent at the errors' IoU, as if there were no errors of some kinds (of `ERRORS`).

    Args:
        errors, kinds: `Errors`, and which to mend; without any it is COCO's AP.
        order: what `score_order` gives, if it is at hand.
    """
    order = score_order(errors) if order is None else order
    matches, labels = errors.matches, errors.detections["labels"].copy()
    correct = matches.kinds == "correct"
    kept = ~np.isin(matches.kinds, ["ignored", *kinds])
    blamed = order[np.isin(matches.kinds[order], [k for k in kinds if k in ("class", "localisation")])]
    blamed = blamed[matches.states[matches.objects[blamed]] != "found"]
    # The first of each object has the highest score.
    _, first = np.unique(matches.objects[blamed], return_index=True)
    mended = blamed[first]
    correct[mended] = kept[mended] = True
    labels[mended] = errors.objects["labels"][matches.objects[mended]]
    counts = _objects_per_class(errors)
    left = counts.copy()
    if "missed" in kinds:
        missed = errors.objects["labels"][matches.states == "missed"]
        left -= np.bincount(missed, minlength=len(counts))
    chosen = order[kept[order]]
    return _mean_ap(labels[chosen], correct[chosen], left, counts > 0)


def score_order(errors):
    """Indices of the detections by score, the highest first, and ties as in COCO's evaluation."""
    image_ranks = ranks(errors.image_ids)
    return np.lexsort((image_ranks[errors.detections["image"]], -errors.detections["scores"]))


def _objects_per_class(errors):
    labels = errors.objects["labels"][~errors.objects["crowd"]]
    return np.bincount(labels, minlength=len(errors.classes))


def _mean_ap(labels, correct, counts, known):
    """Mean of the classes' AP, percent.

    Args:
        labels, correct: of detections in the order of `score_order`.
        counts: objects of each class.
        known: the classes that count. One that has no objects has an AP of 0, or, where nothing is found
            either, of 100.
    """
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(len(counts) + 1))
    aps = [_ap(correct[by_class[ends[k] : ends[k + 1]]], counts[k]) for k in np.flatnonzero(known)]
    # As many decimals as the evaluators give.
    return round(100 * float(np.mean(aps)), 10) if aps else float("nan")


def _ap(correct, count):
    """AP, 0 to 1, at 101 values of recall, of a class' detections by score."""
    if not count:
        return float(not len(correct))
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(correct) + 1)
    # The highest precision at this recall or a higher one; 0 at a recall that is not reached.
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return precision[np.searchsorted(found / count, _RECALLS)].mean()
