"""Average precision as Pascal VOC defines it.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, 3.4.1
"""

import logging

import numpy as np

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.evaluation.detections import InstanceEvaluator, build_object_table, compute_overlaps
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_predictions

logger = logging.getLogger(__name__)

_IOUS = np.arange(50, 100, 5)


def voc_ap(recall, precision, use_07_metric=False):
    """Average precision of one class.

    Args:
        recall, precision: `[N]`, after each detection, scores descending.
        use_07_metric: the mean of the precision at recalls 0, 0.1, ..., 1 (VOC 2007), instead of
            the area under the interpolated curve (since VOC 2010).

    Returns:
        A number in 0..1.
    """
    if use_07_metric:
        best = [precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]
        return float(np.mean(best))
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def match_to_objects(detections, objects):
    """Return the IoU of each detection with the object of its image and class that it overlaps most, 0 if it
    overlaps none, and the index of that object.
    """
    row, number, iou = compute_overlaps(objects, detections)
    same = detections["labels"][row] == objects["labels"][number]
    row, number, iou = row[same], number[same], iou[same]
    best, claimed = np.zeros(len(detections["labels"])), np.zeros(len(detections["labels"]), dtype=np.int64)
    # The best object is written last, of equal ones the first.
    order = np.lexsort((-number, iou))
    best[row[order]], claimed[row[order]] = iou[order], number[order]
    return best, claimed


def voc_eval(best, claimed, difficult, total, use_07_metric=False):
    """AP of one class at IoU 0.5, 0.55, ..., 0.95: each detection claims the object it overlaps most, once.

    Args:
        best, claimed: what `match_to_objects` returns, of the detections of the class, scores descending.
        difficult: bool for each object; a detection of a difficult one counts neither for nor against.
        total: number of the class' objects that are not difficult.
        use_07_metric: see `voc_ap`.

    Returns:
        `[10]` in 0..1, or NaN if there are no such objects.
    """
    if not total:
        return np.full(len(_IOUS), np.nan)
    aps = []
    for iou in _IOUS:
        # An IoU of just the threshold is not enough.
        above = best > iou / 100
        counts = ~(above & difficult[claimed])
        hits = np.zeros(len(best), dtype=bool)
        candidates = np.flatnonzero(above & counts)
        # The first to claim an object has it.
        hits[candidates[np.unique(claimed[candidates], return_index=True)[1]]] = True
        found, scored = np.cumsum(hits), np.cumsum(counts)
        precision = found / np.maximum(scored, np.finfo(float).eps)
        aps.append(voc_ap(found / total, precision, use_07_metric))
    return np.array(aps)


class PascalVOCDetectionEvaluator(InstanceEvaluator):
    """AP50, AP75 and AP (mean over IoU 0.5 to 0.95), in percent, averaged over classes.

    Uses VOC's 2007 metric for a dataset whose metadata says `year` 2007, else the later one; an annotation's
    `difficult` is respected.
    """

    def __init__(self, dataset_name, distributed=True, output_dir=None, use_07_metric=None):
        """Arguments are those of `COCOEvaluator`; `use_07_metric` None asks the dataset's year."""
        # Masks and keypoints are not scored, only written.
        super().__init__(dataset_name, distributed, ("masks", "keypoints") if output_dir else ())
        self._output_dir = output_dir
        year = MetadataCatalog.get(dataset_name).get("year")
        self._use_07_metric = year == 2007 if use_07_metric is None else use_07_metric

    def score(self, detections):
        """{"bbox": AP, AP50, AP75 and each class' AP50}, in percent."""
        if self._output_dir:
            write_predictions(self._output_dir, self.dataset_name, detections)
        objects, rows = build_object_table(self.records), detections.rows
        annotations = [a for record in self.records for a in record["annotations"]]
        difficult = np.array(
            [bool(a.get("difficult", 0) or a.get("iscrowd", 0)) for a in annotations], dtype=bool
        )
        # Here the IoU with a crowd is as that with any other object.
        objects |= {"crowd": np.zeros_like(difficult)}
        found = {"image": rows[:, 0], "boxes": rows[:, 1:5], "labels": rows[:, 6]}
        best, claimed = match_to_objects(found, objects)
        by_score = np.argsort(-rows[:, 5], kind="stable")
        counted = objects["labels"][~difficult & np.isin(objects["image"], detections.seen)]
        totals = np.bincount(counted, minlength=len(self.classes))
        table = {}
        for label, name in enumerate(self.classes):
            chosen = by_score[rows[by_score, 6] == label]
            aps = voc_eval(best[chosen], claimed[chosen], difficult, totals[label], self._use_07_metric)
            table[name] = 100 * aps
        known = np.array([aps for aps in table.values() if not np.isnan(aps).any()]).reshape(-1, 10)
        mean = known.mean(axis=0) if len(known) else np.full(10, np.nan)
        metrics = {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}
        per_class = [[name, *map(float, (aps.mean(), aps[0], aps[5]))] for name, aps in table.items()]
        which = "VOC 2007 metric" if self._use_07_metric else "VOC 2010 metric"
        header = ["class", "AP", "AP50", "AP75"]
        logger.info(f"box AP, {which}\n" + format_table([*per_class, ["all", *metrics.values()]], header))
        metrics |= {f"AP50-{name}": float(aps[0]) for name, aps in table.items()}
        return {"bbox": metrics}
