"""Match detections with the ground truth and classify the errors.

The error types are those of TIDE (Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115); its t_f is
`iou_threshold`, its t_b `BACKGROUND_IOU`.
"""

from collections.abc import Sequence
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

Table = dict[str, np.ndarray]
# Type of a detection, or "missed" for an object: (RGB colour in images, description).
OUTCOMES = {
    "correct": ((0, 160, 80), "correct class and location"),
    "classification": ((150, 70, 230), "correct location, wrong class"),
    "localization": ((255, 140, 0), "correct class, IoU too low"),
    "both": ((140, 90, 50), "wrong class, IoU too low"),
    "duplicate": ((0, 130, 255), "object already detected with a higher score"),
    "background": ((240, 70, 190), "overlaps no object, or only slightly"),
    "missed": ((225, 25, 40), "object without a detection of its class or at its location"),
    "ignored": ((130, 130, 130), "crowd, not counted"),
}
DETECTION_TYPES = [name for name in OUTCOMES if name != "missed"]
ERRORS = [name for name in OUTCOMES if name not in ("correct", "ignored")]
# States of objects.
REAL_STATES = ("detected", "erroneous", "missed")
STATES = (*REAL_STATES, "crowd")
BACKGROUND_IOU = 0.1
# Per class and image, as in COCO's evaluation.
MAX_DETECTIONS = 100


def describe_matching(iou_threshold: float, score_threshold: float, task: str = "bbox") -> str:
    """Return the definition of the error types, to print beside their counts."""
    return (
        f"scores >= {score_threshold:.3f}; correct: IoU >= {iou_threshold:g} of "
        f"{'masks' if task == 'segm' else 'boxes'}; background: IoU < {BACKGROUND_IOU:g} with every object; "
        "missed: no detection is correct or has only a wrong class or location"
    )


@dataclass(frozen=True)
class Errors:
    """The ground truth objects and the detections of a dataset, and how they match.

    Attributes:
        objects: arrays `image` (index of the record, ascending), `boxes` `[G, 4]` (XYXY, pixels), `labels`,
            `crowd` (bool); `state`, one of `STATES` ("erroneous": with classification or localization
            errors only); `detection`, the index of the matched or the best erroneous detection, or -1.
        detections: arrays `image` (ascending), `boxes` `[N, 4]`, `scores`, `labels`; `type`, one of
            `DETECTION_TYPES` ("ignored": on a crowd of its class, or beyond `MAX_DETECTIONS`); `object`, the
            index of the matched, mistaken or nearest object, or -1; `iou` with it (with a crowd, the fraction
            of the detection inside it).
    """

    records: SerializedRecords
    classes: list[str]
    image_ids: list[int | str]
    objects: Table
    detections: Table
    predictions: Detections
    iou_threshold: float
    score_threshold: float = 0.0

    @cached_property
    def score_order(self) -> np.ndarray:
        """Return the indices of the detections by descending score, ties as in COCO's evaluation."""
        return np.lexsort((rank_ids(self.image_ids)[self.detections["image"]], -self.detections["scores"]))

    def filter_by_score(self, score_threshold: float) -> "Errors":
        """Drop detections below a score; the others keep their type."""
        kept = self.detections["scores"] >= score_threshold
        detections = {key: value[kept] for key, value in self.detections.items()}
        objects = _add_states(self.objects, detections)
        return replace(self, detections=detections, objects=objects, score_threshold=score_threshold)

    def get_image_tables(self, index: int) -> tuple[Table, Table]:
        """Return the objects and the detections of one image, with indices within the image."""
        first_object, end = np.searchsorted(self.objects["image"], [index, index + 1])
        objects = {key: value[first_object:end] for key, value in self.objects.items()}
        first_detection, end = np.searchsorted(self.detections["image"], [index, index + 1])
        detections = {key: value[first_detection:end] for key, value in self.detections.items()}
        objects["detection"] = np.maximum(objects["detection"] - first_detection, -1)
        detections["object"] = np.maximum(detections["object"] - first_object, -1)
        return objects, detections


def find_errors(
    dataset_name: str,
    detections: Detections,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.0,
    task: str = "bbox",
) -> Errors:
    """Find the errors among the detections for a dataset.

    Args:
        iou_threshold: minimum IoU of a correct detection, `BACKGROUND_IOU` to 1.
        score_threshold: detections below it are dropped after matching.
        task: "bbox" or "segm", IoU of boxes or of masks.
    """
    records, classes, index = load_ground_truth(dataset_name)
    image, labels = detections.table[:, [0, 6]].astype(np.int64).T
    boxes = detections.table[:, 1:5]
    predicted = {"image": image, "boxes": boxes, "scores": detections.table[:, 5], "labels": labels}
    objects = build_object_table(records)
    masks = None
    if task == "segm":
        if detections.masks is None or not has_annotations(records, task):
            raise UserError(f"errors of masks require masks in the predictions and in {dataset_name}")
        gt = build_coco_gt(task, records, range(len(records)), range(len(classes)))["annotations"]
        objects["crowd"] = np.array([bool(a["iscrowd"]) for a in gt], dtype=bool)
        masks = [a["segmentation"] for a in gt], encode_detection_masks(detections, records)
    overlaps = compute_overlaps(objects, predicted, masks)
    objects, predicted = match_detections(objects, predicted, overlaps, iou_threshold)
    errors = Errors(records, classes, list(index), objects, predicted, detections, iou_threshold)
    return errors.filter_by_score(score_threshold)


def match_detections(
    objects: Table, detections: Table, overlaps: Sequence[np.ndarray], iou_threshold: float = 0.5
) -> tuple[Table, Table]:
    """Match as in COCO's evaluation; add the columns of the match to both tables.

    In descending order of scores, each detection is matched with the free object of its class with the
    highest IoU. `overlaps` is the result of `compute_overlaps`.
    """
    if not BACKGROUND_IOU <= iou_threshold <= 1:
        limits = f"{BACKGROUND_IOU:g} to 1, got {iou_threshold:g}"
        raise UserError(f"the IoU of a correct detection must be {limits}")
    num = len(detections["image"])
    iou_threshold = min(iou_threshold, 1 - 1e-10)
    # Of two objects with the same IoU, COCO matches the later one.
    order = np.lexsort((-overlaps[1], -overlaps[2], overlaps[0], -detections["scores"][overlaps[0]]))
    pairs = detection, target, iou = [column[order] for column in overlaps]
    excess = _rank_in_class(detections) >= MAX_DETECTIONS
    real = ~objects["crowd"][target]
    same = detections["labels"][detection] == objects["labels"][target]
    candidates = np.flatnonzero(real & same & (iou >= iou_threshold) & ~excess[detection])
    chosen = candidates[match_greedily(detection[candidates], target[candidates])]
    matched = _get_first_pairs(num, pairs, chosen)
    own = _get_first_pairs(num, pairs, real & same)
    other = _get_first_pairs(num, pairs, real & ~same)
    nearest = _get_first_pairs(num, pairs, real)
    crowd = _get_first_pairs(num, pairs, ~real & same)
    # type: (condition, (objects, IoUs)); the first condition that holds decides.
    cases = {
        "correct": (matched[0] >= 0, matched),
        "ignored": (excess | (crowd[1] >= iou_threshold), crowd),
        "localization": ((own[1] >= BACKGROUND_IOU) & (own[1] < iou_threshold), own),
        "classification": (other[1] >= iou_threshold, other),
        "duplicate": (own[1] >= iou_threshold, own),
        "background": (nearest[1] < BACKGROUND_IOU, nearest),
        "both": (np.ones(num, dtype=bool), nearest),
    }
    conditions = [condition for condition, _ in cases.values()]
    columns = {"type": np.select(conditions, [np.array(name) for name in cases], "")}
    for i, key in enumerate(("object", "iou")):
        columns[key] = np.select(conditions, [pair[i] for _, pair in cases.values()])
    detections = {**detections, **columns}
    return _add_states(objects, detections), detections


def match_greedily(detection: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the indices of the pairs whose detection and target are in no earlier selected pair."""
    selected = []
    used_detections = set()
    used_targets = set()
    for i, (d, t) in enumerate(zip(detection.tolist(), target.tolist(), strict=True)):
        if d not in used_detections and t not in used_targets:
            used_detections.add(d)
            used_targets.add(t)
            selected.append(i)
    return np.array(selected, dtype=np.int64)


def _get_first_pairs(num, pairs, selected):
    """Return the object (or -1) and the IoU (or 0) of each detection's first selected pair."""
    detection, target, iou = (column[selected][::-1] for column in pairs)
    objects = np.full(num, -1)
    ious = np.zeros(num)
    # The pairs are reversed, so that the first of a detection is written last.
    objects[detection] = target
    ious[detection] = iou
    return objects, ious


def _rank_in_class(detections):
    """Return the rank of each detection by score within its class and image, from 0."""
    groups = detections["image"] * (detections["labels"].max(initial=0) + 1) + detections["labels"]
    order = np.lexsort((-detections["scores"], groups))
    ranks_in_class = np.empty_like(order)
    ranks_in_class[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return ranks_in_class


def _add_states(objects, detections):
    crowd = objects["crowd"]
    matched = np.full(len(crowd), -1)
    states = np.full(len(crowd), "missed", dtype="U9")
    # The detection with the highest score is written last.
    ascending = np.argsort(-detections["scores"], kind="stable")[::-1]
    types = detections["type"][ascending]
    for state, names in (("erroneous", ("localization", "classification")), ("detected", ("correct",))):
        selected = ascending[np.isin(types, names)]
        targets = detections["object"][selected]
        matched[targets] = selected
        states[targets] = state
    states[crowd] = "crowd"
    return {**objects, "state": states, "detection": matched}
