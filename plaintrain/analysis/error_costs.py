"""How much AP each kind of error costs, as TIDE measures it: mend one kind, leave the rest as it is.

Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115
"""

import numpy as np

from plaintrain.analysis.errors import STATES
from plaintrain.evaluation.coco_gt import ranks

# What can be mended, in TIDE's order: kinds of detections, and missed objects.
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")
_REAL = STATES[:3]
_RECALLS = np.linspace(0, 1, 101)


def ap_cost(errors):
    """The AP at one IoU, and how much higher it would be without the errors of each kind.

    Mended, a detection of a wrong class or place is a correct one of the object it is wrong about, if that
    was not found and no other detection that is mended with it has a higher score; all others are
    dropped. Missed objects are taken away; of a class that has none left, AP is 0, or, if nothing is found
    either, 100 (TIDE leaves it out). The costs do not add up to what is lacking: each is what is gained by
    mending one kind alone.

    Args:
        errors: `Errors` of all detections, or of those with a score that is high enough.

    Returns:
        dict of `AP` (percent; NaN without objects), `costs` (`{kind: percentage points}`, of `ERRORS`),
        `false_positives` (of all wrong detections, were they dropped), `false_negatives` (of all objects
        that were not found, were they taken away)
    """
    order = score_order(errors)
    ap, kinds, labels = fixed_ap(errors, (), order), errors.matches.kinds[order], errors.detections["labels"]
    without_false = _mean_ap(errors, order[kinds == "correct"], labels)
    without_missed = _mean_ap(errors, order[kinds != "ignored"], labels, states=("found",))
    costs = {kind: fixed_ap(errors, (kind,), order) - ap for kind in ERRORS}
    gains = {"false_positives": without_false - ap, "false_negatives": without_missed - ap}
    return {"AP": ap, "costs": costs, **gains}


def fixed_ap(errors, kinds=(), order=None):
    """AP in percent at the errors' IoU, as if there were no errors of some kinds (of `ERRORS`).

    Args:
        errors, kinds: `Errors`, and which to mend; without any it is COCO's AP.
        order: what `score_order` gives, if it is at hand.
    """
    order = score_order(errors) if order is None else order
    matches, labels = errors.matches, errors.detections["labels"].copy()
    kept = ~np.isin(matches.kinds, ["ignored", *kinds])
    blamed = order[np.isin(matches.kinds[order], [k for k in kinds if k in ("class", "localisation")])]
    blamed = blamed[matches.states[matches.objects[blamed]] != "found"]
    # The first of each object has the highest score.
    _, first = np.unique(matches.objects[blamed], return_index=True)
    mended = blamed[first]
    kept[mended] = True
    labels[mended] = errors.objects["labels"][matches.objects[mended]]
    states = [state for state in _REAL if state not in kinds]
    return _mean_ap(errors, order[kept[order]], labels, mended, states)


def score_order(errors):
    """Indices of the detections by score, the highest first, and ties as in COCO's evaluation."""
    image_ranks = ranks(errors.image_ids)
    return np.lexsort((image_ranks[errors.detections["image"]], -errors.detections["scores"]))


def _mean_ap(errors, chosen, labels, mended=slice(0), states=_REAL):
    """Mean of the classes' AP, percent.

    Args:
        errors: `Errors`.
        chosen: the detections that count, in the order of `score_order`.
        labels: of all detections.
        mended: those that are correct beside those that were.
        states: of the objects that are there.
    """
    correct = errors.matches.kinds == "correct"
    correct[mended] = True
    known, left = (
        np.bincount(
            errors.objects["labels"][np.isin(errors.matches.states, s)], minlength=len(errors.classes)
        )
        for s in (_REAL, states)
    )
    labels, correct = labels[chosen], correct[chosen]
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(len(known) + 1))
    aps = [_ap(correct[by_class[ends[k] : ends[k + 1]]], left[k]) for k in np.flatnonzero(known)]
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
