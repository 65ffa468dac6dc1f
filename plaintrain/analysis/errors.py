"""Matching of detections with the ground truth, and the errors among them.

The types of errors are those of TIDE (Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115): t_f is
`iou_threshold` here, t_b `BACKGROUND_IOU`.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from plaintrain.data.serialized import SerializedRecords
from plaintrain.evaluation.coco_gt import build_coco_gt, has_annotations, rank_ids
from plaintrain.evaluation.detections import (
    Detections,
    build_object_table,
    compute_overlaps,
    load_ground_truth,
)
from plaintrain.evaluation.predictions import encode_detection_masks
from plaintrain.utils.errors import UserError

# Outcome of a detection, or "missed" of an object: (RGB colour in images, description).
OUTCOMES = {
    "correct": ((0, 160, 80), "the right class and place"),
    "class": ((150, 70, 230), "an object of another class"),
    "localisation": ((255, 140, 0), "the right class, placed poorly"),
    "both": ((140, 90, 50), "another class, placed poorly"),
    "duplicate": ((0, 130, 255), "detected already, with a higher score"),
    "background": ((240, 70, 190), "nothing is there"),
    "missed": ((225, 25, 40), "an object that no detection is near"),
    "ignored": ((130, 130, 130), "a crowd: does not count"),
}
DETECTION_TYPES = [name for name in OUTCOMES if name != "missed"]
# What TIDE can fix.
ERRORS = [name for name in OUTCOMES if name not in ("correct", "ignored")]
# Of objects.
REAL_STATES = ("found", "erroneous", "missed")
STATES = (*REAL_STATES, "crowd")
# With less IoU there is only background.
BACKGROUND_IOU = 0.1
# Of one class in an image, the best that COCO counts.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Errors:
    """The objects and the detections of a dataset, and how they match.

    Attributes:
        records, classes, image_ids: of the dataset.
        objects: dict of arrays `image` (index of the record, ascending), `boxes` `[G, 4]` (XYXY, pixels),
            `labels`, `crowd` (bool); of the match `state`, of `STATES` ("erroneous": only detections of a
            wrong class or place are about it), and `detection`, the index of the one that has found it, or of
            the best wrong one, or -1.
        detections: dict of arrays `image` (ascending), `boxes` `[N, 4]`, `scores`, `labels`; of the match
            `type`, of `DETECTION_TYPES` ("ignored": on a crowd of its class, or not one of the 100 best),
            `object`, the index of the one that it has found, is wrong about, or is nearest to, or -1, and
            `iou` with that (with a crowd, the fraction of the detection inside it).
        predictions: the `Detections` that the table is of.
        iou_threshold: IoU of a correct detection.
        score_threshold: detections below it are not in the table.
    """

    records: SerializedRecords
    classes: list
    image_ids: list
    objects: dict
    detections: dict
    predictions: Detections
    iou_threshold: float
    score_threshold: float = 0.0

    @cached_property
    def score_order(self):
        """Indices of the detections by descending score, ties as in COCO's evaluation."""
        return np.lexsort((rank_ids(self.image_ids)[self.detections["image"]], -self.detections["scores"]))

    def above(self, score_threshold):
        """The `Errors` without the detections below a score; the others keep their type."""
        kept = self.detections["scores"] >= score_threshold
        detections = {key: value[kept] for key, value in self.detections.items()}
        objects = _with_states(self.objects, detections)
        return replace(self, detections=detections, objects=objects, score_threshold=score_threshold)

    def of_image(self, index):
        """(objects, detections) of one image, with indices from 0 on."""
        tables, starts = [], []
        for table in (self.objects, self.detections):
            first, last = np.searchsorted(table["image"], [index, index + 1])
            tables.append({key: value[first:last] for key, value in table.items()})
            starts.append(first)
        objects, detections = tables
        for table, key, start in ((objects, "detection", starts[1]), (detections, "object", starts[0])):
            table[key] = np.where(table[key] < 0, -1, table[key] - start)
        return objects, detections


def find_errors(dataset_name, detections, iou_threshold=0.5, score_threshold=0.0, task="bbox"):
    """Return the `Errors` of the `Detections` for a dataset.

    Args:
        dataset_name: a registered dataset.
        detections: such as those of `read_detections`.
        iou_threshold: IoU of a correct detection, `BACKGROUND_IOU` to 1.
        score_threshold: detections below it are dropped after matching.
        task: "bbox" or "segm", whether the IoU is that of boxes or of masks.
    """
    records, classes, index = load_ground_truth(dataset_name)
    image, labels = detections.table[:, [0, 6]].astype(np.int64).T
    boxes, scores = detections.table[:, 1:5], detections.table[:, 5]
    predicted = {"image": image, "boxes": boxes, "scores": scores, "labels": labels}
    objects, masks = build_object_table(records), None
    if task == "segm":
        if detections.masks is None or not has_annotations(records, task):
            raise UserError(f"errors of masks need masks in the predictions and in {dataset_name}")
        truth = build_coco_gt(task, records, range(len(records)), range(len(classes)))["annotations"]
        objects["crowd"] = np.array([bool(a["iscrowd"]) for a in truth], dtype=bool)
        masks = [a["segmentation"] for a in truth], encode_detection_masks(detections, records)
    overlaps = compute_overlaps(objects, predicted, masks)
    objects, predicted = match_detections(objects, predicted, overlaps, iou_threshold)
    errors = Errors(records, classes, list(index), objects, predicted, detections, iou_threshold)
    return errors.above(score_threshold)


def match_detections(objects, detections, overlaps, iou_threshold=0.5):
    """Match the tables of objects and detections as COCO does, and return them with the columns of the match.

    Detections choose in the order of their scores, each the object of its class that it overlaps most among
    those that are left. `overlaps` are the pairs of `compute_overlaps`.
    """
    if not BACKGROUND_IOU <= iou_threshold <= 1:
        raise UserError(
            f"the IoU of a correct detection must be {BACKGROUND_IOU:g} to 1, got {iou_threshold:g}"
        )
    num, iou_threshold = len(detections["image"]), min(iou_threshold, 1 - 1e-10)
    # Of two objects that are overlapped alike, COCO takes the later one.
    order = np.lexsort((-overlaps[1], -overlaps[2], overlaps[0], -detections["scores"][overlaps[0]]))
    pairs = detection, target, iou = [column[order] for column in overlaps]
    late = _rank_in_class(detections) >= MAX_DETECTIONS
    real, same = ~objects["crowd"][target], detections["labels"][detection] == objects["labels"][target]
    able = np.flatnonzero(real & same & (iou >= iou_threshold) & ~late[detection])
    correct = _first_pairs(num, pairs, able[match_greedily(detection[able], target[able])])
    own, other = _first_pairs(num, pairs, real & same), _first_pairs(num, pairs, real & ~same)
    nearest, crowd = _first_pairs(num, pairs, real), _first_pairs(num, pairs, ~real & same)
    # type: (condition, unless an earlier one holds; the object and the IoU that go with it)
    cases = {
        "correct": (correct[0] >= 0, correct),
        "ignored": (late | (crowd[1] >= iou_threshold), crowd),
        "localisation": ((own[1] >= BACKGROUND_IOU) & (own[1] < iou_threshold), own),
        "class": (other[1] >= iou_threshold, other),
        "duplicate": (own[1] >= iou_threshold, own),
        "background": (nearest[1] < BACKGROUND_IOU, nearest),
        "both": (np.ones(num, dtype=bool), nearest),
    }
    conditions = [condition for condition, _ in cases.values()]
    columns = {"type": np.select(conditions, [np.array(name) for name in cases], "")}
    for i, key in enumerate(("object", "iou")):
        columns[key] = np.select(conditions, [pair[i] for _, pair in cases.values()])
    detections = {**detections, **columns}
    return _with_states(objects, detections), detections


def match_greedily(detection, target):
    """Return the indices of the pairs in which both are still free, in the order of the pairs."""
    chosen, used, taken = [], set(), set()
    for i, (d, t) in enumerate(zip(detection.tolist(), target.tolist(), strict=True)):
        if d not in used and t not in taken:
            used.add(d)
            taken.add(t)
            chosen.append(i)
    return np.array(chosen, dtype=np.int64)


def _first_pairs(num, pairs, chosen):
    """Return the first of some pairs of each of `num` detections: its object, or -1, and its IoU, or 0."""
    detection, target, iou = (column[chosen][::-1] for column in pairs)
    objects, ious = np.full(num, -1), np.zeros(num)
    # The first is written last.
    objects[detection], ious[detection] = target, iou
    return objects, ious


def _rank_in_class(detections):
    """Return the rank of each detection among those of its class in its image, by score, from 0."""
    groups = detections["image"] * (detections["labels"].max(initial=0) + 1) + detections["labels"]
    order = np.lexsort((-detections["scores"], groups))
    ranks_in_class = np.empty_like(order)
    ranks_in_class[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return ranks_in_class


def _with_states(objects, detections):
    crowd = objects["crowd"]
    matched, states = np.full(len(crowd), -1), np.full(len(crowd), "missed", dtype="U9")
    # The best is written last.
    ascending = np.argsort(-detections["scores"], kind="stable")[::-1]
    types = detections["type"][ascending]
    for state, names in (("erroneous", ("localisation", "class")), ("found", ("correct",))):
        chosen = ascending[np.isin(types, names)]
        targets = detections["object"][chosen]
        matched[targets], states[targets] = chosen, state
    states[crowd] = "crowd"
    return {**objects, "state": states, "detection": matched}
