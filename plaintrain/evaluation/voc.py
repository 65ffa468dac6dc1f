"""AP of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, 3.4.1)."""

import logging

import numpy as np

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.evaluation.detections import (
    Detections,
    InstanceEvaluator,
    build_object_table,
    compute_overlaps,
)
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_predictions

logger = logging.getLogger(__name__)

_IOUS = np.arange(50, 100, 5)


def voc_ap(recall: np.ndarray, precision: np.ndarray, use_07_metric: bool = False) -> float:
    """Compute the AP of one class in 0..1, from the curves `[N]` over detections by descending score.

    `use_07_metric` averages the precision at recalls 0, 0.1, ..., 1 (VOC 2007), instead of the area under the
    interpolated curve (since VOC 2010).
    """
    if use_07_metric:
        best = [precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]
        return float(np.mean(best))
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def match_to_objects(
    detections: dict[str, np.ndarray], objects: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU (or 0) and the index of the best object of each detection's image and class, `[N]`."""
    detection, target, iou = compute_overlaps(objects, detections)
    # In ascending IoU, so that the best object is written last, of equal ones the first.
    order = np.lexsort((-target, iou))
    order = order[detections["labels"][detection[order]] == objects["labels"][target[order]]]
    ious = np.zeros(len(detections["labels"]))
    ious[detection[order]] = iou[order]
    matches = np.zeros(len(ious), dtype=np.int64)
    matches[detection[order]] = target[order]
    return ious, matches


def voc_eval(
    ious: np.ndarray,
    matches: np.ndarray,
    difficult: np.ndarray,
    num_objects: int,
    use_07_metric: bool = False,
) -> np.ndarray:
    """Compute the AP `[10]` of one class at IoU 0.5, 0.55, ..., 0.95 in 0..1; NaN without objects.

    `ious` and `matches` of `match_to_objects` are by descending score. Detections that match a `difficult`
    object are ignored; `num_objects` is the number of objects of the class that are not difficult.
    """
    if not num_objects:
        return np.full(len(_IOUS), np.nan)
    aps = []
    for iou in _IOUS:
        # VOC requires an IoU above the threshold.
        above = ious > iou / 100
        counts = ~(above & difficult[matches])
        correct = np.zeros(len(ious), dtype=bool)
        candidates = np.flatnonzero(above & counts)
        # Only the first match of an object is correct.
        correct[candidates[np.unique(matches[candidates], return_index=True)[1]]] = True
        true_positives = np.cumsum(correct)
        precision = true_positives / np.maximum(np.cumsum(counts), np.finfo(float).eps)
        aps.append(voc_ap(true_positives / num_objects, precision, use_07_metric))
    return np.array(aps)


class PascalVOCDetectionEvaluator(InstanceEvaluator):
    """Evaluator of AP50, AP75 and AP (mean over IoU 0.5 to 0.95), averaged over classes, in percent.

    By default, `use_07_metric` is that of datasets whose metadata have `year` 2007.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        use_07_metric: bool | None = None,
    ) -> None:
        # Masks and keypoints are only written, not scored.
        super().__init__(dataset_name, distributed, ("masks", "keypoints") if output_dir else ())
        self._output_dir = output_dir
        year = MetadataCatalog.get(dataset_name).get("year")
        self._use_07_metric = year == 2007 if use_07_metric is None else use_07_metric

    def score(self, detections: Detections) -> dict[str, dict[str, float]]:
        """Return {"bbox": {"AP", "AP50", "AP75", "AP50-CLASS"...}} in percent, and write the predictions."""
        if self._output_dir:
            write_predictions(self._output_dir, self.dataset_name, detections)
        objects = build_object_table(self.records)
        table = detections.table
        annotations = [a for record in self.records for a in record["annotations"]]
        difficult = np.array([bool(a.get("difficult") or a.get("iscrowd")) for a in annotations], dtype=bool)
        # VOC's IoU with a crowd is the usual one.
        objects |= {"crowd": np.zeros_like(difficult)}
        predicted = {"image": table[:, 0], "boxes": table[:, 1:5], "labels": table[:, 6]}
        ious, matches = match_to_objects(predicted, objects)
        by_score = np.argsort(-table[:, 5], kind="stable")
        counted = objects["labels"][~difficult & np.isin(objects["image"], detections.seen)]
        num_objects = np.bincount(counted, minlength=len(self.classes))
        per_class = {}
        for label, name in enumerate(self.classes):
            order = by_score[table[by_score, 6] == label]
            aps = voc_eval(ious[order], matches[order], difficult, num_objects[label], self._use_07_metric)
            per_class[name] = 100 * aps
        known = np.array([aps for aps in per_class.values() if not np.isnan(aps).any()]).reshape(-1, 10)
        mean = known.mean(axis=0) if len(known) else np.full(10, np.nan)
        metrics = {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}
        cells = [[name, *map(float, (aps.mean(), aps[0], aps[5]))] for name, aps in per_class.items()]
        year = 2007 if self._use_07_metric else 2010
        logger.info(f"box AP, VOC {year} metric\n" + format_table(cells, ["class", "AP", "AP50", "AP75"]))
        metrics |= {f"AP50-{name}": float(aps[0]) for name, aps in per_class.items()}
        return {"bbox": metrics}
