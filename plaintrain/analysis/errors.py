"""What is wrong with each detection, and what became of each object.

The kinds of errors are those of TIDE (Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115): t_f is
`iou_threshold` here, t_b `background_threshold`.
"""

from dataclasses import dataclass, replace

import numpy as np

from plaintrain.data.serialized import SerializedRecords
from plaintrain.evaluation.coco_gt import annotated, coco_truth
from plaintrain.evaluation.detections import ground_truth
from plaintrain.evaluation.overlaps import box_overlaps, mask_overlaps
from plaintrain.evaluation.predictions import rles
from plaintrain.utils.errors import UserError

# Of detections; a wrong one is of the first that fits, but for "both", which is the rest.
KINDS = ("correct", "localisation", "class", "duplicate", "background", "both", "ignored")
# Of objects; the first three are real ones.
STATES = ("found", "erroneous", "missed", "crowd")
# Of an object that no detection has found, what may come close to it.
_BLAMED = ("localisation", "class")
# Of one class in an image, the best that COCO counts.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Matches:
    """What became of N detections and G objects; indices are of them, -1 for none.

    Attributes:
        kinds: `[N]` of `KINDS`. "correct": it has found an object of its class. "localisation": an object of
            its class overlaps too little. "class": an object of another class is there. "duplicate": a
            detection with a higher score has found the object. "background": hardly anything is there.
            "both": an object of another class overlaps too little. "ignored": on a crowd of its class, or
            not one of the 100 best of its class in the image.
        objects: `[N]`, the object that a detection has found, or that it is wrong about, or is the nearest.
        ious: `[N]`, the IoU with that object, 0 to 1; with a crowd, the share of the detection inside it.
        states: `[G]` of `STATES`. "found": by a correct detection. "erroneous": only by detections of a wrong
            class or place. "missed": by none of these. "crowd": does not count.
        detections: `[G]`, the detection that has found the object, or the best wrong one about it.
    """

    kinds: np.ndarray
    objects: np.ndarray
    ious: np.ndarray
    states: np.ndarray
    detections: np.ndarray


@dataclass(frozen=True)
class Errors:
    """The objects and the detections of a dataset, and how they match.

    Attributes:
        records, classes, image_ids: the dataset's records, class names, and the records' image ids.
        objects: dict of arrays `image` (index of the record, ascending), `boxes` `[G, 4]` (XYXY, pixels),
            `labels`, `crowd` (bool), `[G]` each, in the order of the records' annotations.
        detections: dict of arrays `image` (ascending), `boxes` `[N, 4]`, `scores`, `labels`, `[N]` each.
        matches: the `Matches`.
        iou_threshold: what they were matched at.
    """

    records: SerializedRecords
    classes: list
    image_ids: list
    objects: dict
    detections: dict
    matches: Matches
    iou_threshold: float

    def of_image(self, index):
        """(objects, detections, `Matches`) of the image at an index, matched alone."""
        tables = []
        for table in (self.objects, self.detections):
            first, last = np.searchsorted(table["image"], [index, index + 1])
            tables.append({key: value[first:last] for key, value in table.items()})
        return *tables, match_image(*tables, self.iou_threshold)


def match_image(objects, detections, iou_threshold=0.5, background_threshold=0.1):
    """The `Matches` of one image, by boxes.

    Args:
        objects: dict of `boxes` `[G, 4]` (XYXY), `labels` `[G]` and, if any is one, `crowd` `[G]`, bool.
        detections: dict of `boxes` `[N, 4]`, `scores` `[N]`, `labels` `[N]`; tensors will do as well.
        iou_threshold: what a correct detection has at least.
        background_threshold: what a detection of anything at all has at least.
    """
    objects = _image_table(objects, ("labels", "crowd"))
    detections = _image_table(detections, ("labels", "scores"))
    overlaps = box_overlaps(objects, detections)
    return match(objects, detections, overlaps, iou_threshold, background_threshold)


def _image_table(table, keys):
    boxes = np.asarray(table["boxes"], dtype=np.float64).reshape(-1, 4)
    arrays = {key: np.asarray(table.get(key, np.zeros(len(boxes), dtype=bool))) for key in keys}
    return {"image": np.zeros(len(boxes), dtype=np.int64), "boxes": boxes, **arrays}


def errors_of(dataset_name, found, iou_threshold=0.5, score_threshold=0.0, task="bbox"):
    """What is wrong with the detections for a dataset.

    Args:
        dataset_name: a registered dataset.
        found: `Detections` (`evaluation.detections`), such as those of `read_detections`.
        iou_threshold: IoU that a correct detection has at least.
        score_threshold: detections below it are left out.
        task: whose IoU counts, "bbox" or "segm".

    Returns:
        `Errors`

    Raises:
        UserError: masks asked for and not there.
    """
    records, classes, index = ground_truth(dataset_name)
    image, label = (found.rows[:, i].astype(np.int64) for i in (0, 6))
    detections = {"image": image, "boxes": found.rows[:, 1:5], "scores": found.rows[:, 5], "labels": label}
    table = records.annotations or SerializedRecords(list(records)).annotations
    objects = {"image": table.record, "boxes": table.boxes, "labels": table.labels, "crowd": table.crowd}
    if task == "bbox":
        overlaps = box_overlaps(objects, detections)
    else:
        if found.masks is None or not annotated(records, task):
            raise UserError(f"errors of masks need masks in the predictions and in {dataset_name}")
        truth = coco_truth(task, records, range(len(records)), range(len(classes)))["annotations"]
        objects["crowd"] = np.array([bool(a["iscrowd"]) for a in truth], dtype=bool)
        masks = rles(found, records), [a["segmentation"] for a in truth]
        overlaps = mask_overlaps(objects, detections, *masks)
    matches = match(objects, detections, overlaps, iou_threshold)
    errors = Errors(records, classes, list(index), objects, detections, matches, iou_threshold)
    return errors_above(errors, score_threshold)


def errors_above(errors, score_threshold):
    """The `Errors` without the detections below a score; it does not change what the others are."""
    kept, old = errors.detections["scores"] >= score_threshold, errors.matches
    detections = {key: value[kept] for key, value in errors.detections.items()}
    kinds, chosen = old.kinds[kept], old.objects[kept]
    states = _states(errors.objects["crowd"], kinds, chosen, _score_ranks(detections["scores"]))
    matches = Matches(kinds, chosen, old.ious[kept], *states)
    return replace(errors, detections=detections, matches=matches)


def match(objects, detections, overlaps, iou_threshold=0.5, background_threshold=0.1):
    """The `Matches` of objects and detections that overlap as `box_overlaps` says.

    As in COCO, detections choose in the order of their scores, each the object of its class that it
    overlaps most among those that are left.

    Raises:
        UserError: thresholds out of order or range.
    """
    if not 0 < background_threshold <= iou_threshold <= 1:
        bound = f"{background_threshold:g}, below which there is only background,"
        raise UserError(f"the IoU that a correct detection has must be {bound} to 1, not {iou_threshold:g}")
    number = len(detections["image"])
    iou_threshold = min(iou_threshold, 1 - 1e-10)
    rank = _score_ranks(detections["scores"])
    # Of two objects that are overlapped alike, COCO takes the later one.
    order = np.lexsort((-overlaps[1], -overlaps[2], rank[overlaps[0]]))
    pairs = tuple(part[order] for part in overlaps)
    detection, thing, iou = pairs
    late = _place_in_class(detections) >= MAX_DETECTIONS
    real, same = ~objects["crowd"][thing], detections["labels"][detection] == objects["labels"][thing]
    able = np.flatnonzero(real & same & (iou >= iou_threshold) & ~late[detection])
    found = _first(number, pairs, able[choose(detection[able], thing[able])])
    own, other = _first(number, pairs, real & same), _first(number, pairs, real & ~same)
    nearest, crowd = _first(number, pairs, real), _first(number, pairs, ~real & same)
    # kind -> (where, unless it is of one before, the object and the IoU that go with it)
    cases = {
        "correct": (found[0] >= 0, found),
        "ignored": (late | (crowd[1] >= iou_threshold), crowd),
        "localisation": ((own[1] >= background_threshold) & (own[1] < iou_threshold), own),
        "class": (other[1] >= iou_threshold, other),
        "duplicate": (own[1] >= iou_threshold, own),
        "background": (nearest[1] < background_threshold, nearest),
        "both": (np.ones(number, dtype=bool), nearest),
    }
    conditions = [condition for condition, _ in cases.values()]
    kinds = np.select(conditions, [np.array(kind) for kind in cases], "")
    chosen, ious = (np.select(conditions, [pair[i] for _, pair in cases.values()]) for i in (0, 1))
    return Matches(kinds, chosen, ious, *_states(objects["crowd"], kinds, chosen, rank))


def _score_ranks(scores):
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return rank


def choose(detection, thing):
    """Places of the pairs in which both are still free, when pairs are gone through in their order."""
    chosen, used, taken = [], set(), set()
    for place, (d, o) in enumerate(zip(detection.tolist(), thing.tolist(), strict=True)):
        if d not in used and o not in taken:
            used.add(d)
            taken.add(o)
            chosen.append(place)
    return np.array(chosen, dtype=np.int64)


def _first(number, pairs, chosen):
    """Of some pairs the first of each of `number` detections: its object, or -1, and its IoU, or 0."""
    detection, thing, iou = (part[chosen][::-1] for part in pairs)
    objects, ious = np.full(number, -1), np.zeros(number)
    # The first is written last.
    objects[detection], ious[detection] = thing, iou
    return objects, ious


def _place_in_class(detections):
    """Place of each detection among those of its class in its image, by score, from 0."""
    image, label = detections["image"], detections["labels"]
    order = np.lexsort((-detections["scores"], label, image))
    group = np.stack([image[order], label[order]])
    starts = np.flatnonzero(np.append(True, (group[:, 1:] != group[:, :-1]).any(axis=0))[: len(order)])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return place


def _states(crowd, kinds, chosen, rank):
    """`states` and `detections` of `Matches`."""
    detections, states = np.full(len(crowd), -1), np.full(len(crowd), "missed", dtype="U9")
    for state, mask in (("erroneous", np.isin(kinds, _BLAMED)), ("found", kinds == "correct")):
        by_rank = np.flatnonzero(mask)
        by_rank = by_rank[np.argsort(-rank[by_rank])]
        # The best is written last.
        detections[chosen[by_rank]], states[chosen[by_rank]] = by_rank, state
    states[crowd] = "crowd"
    return states, detections
