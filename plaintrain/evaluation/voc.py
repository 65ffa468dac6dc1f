"""Average precision as Pascal VOC defines it.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, 3.4.1
"""

import logging

import numpy as np

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.evaluation.detections import InstanceEvaluator
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.overlaps import box_overlaps
from plaintrain.evaluation.predictions import write_predictions
from plaintrain.structures import BoxMode

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


def best_overlaps(detections, truths):
    """The truth of its image that each detection overlaps most.

    Args:
        detections: `[N, 5]`, rows [image, x0, y0, x1, y1].
        truths: `[M, 5]`, likewise.

    Returns:
        IoU `[N]` in 0..1 (0 in an image without truths), number of the truth `[N]`.
    """
    found, objects = ({"image": rows[:, 0], "boxes": rows[:, 1:]} for rows in (detections, truths))
    row, number, iou = box_overlaps({**objects, "crowd": np.zeros(len(truths), dtype=bool)}, found)
    best, claimed = np.zeros(len(detections)), np.zeros(len(detections), dtype=np.int64)
    # Of an image's truths the best is written last, of equal ones the first.
    order = np.lexsort((-number, iou))
    best[row[order]], claimed[row[order]] = iou[order], number[order]
    return best, claimed


def voc_eval(detections, truths, difficult, use_07_metric=False):
    """AP of one class at IoU 0.5, 0.55, ..., 0.95: each detection claims the truth it overlaps most, once.

    Args:
        detections: `[N, 6]`, rows [image, x0, y0, x1, y1, score].
        truths: `[M, 5]`, rows [image, x0, y0, x1, y1].
        difficult: `[M]` bool; a detection of a difficult truth counts neither for nor against.
        use_07_metric: see `voc_ap`.

    Returns:
        `[10]` in 0..1, or NaN if the class has no truth that is not difficult.
    """
    total = int((~difficult).sum())
    if not total:
        return np.full(len(_IOUS), np.nan)
    detections = detections[np.argsort(-detections[:, 5], kind="stable")]
    best, claimed = best_overlaps(detections[:, :5], truths)
    aps = []
    for iou in _IOUS:
        # An IoU of just the threshold is not enough.
        above = best > iou / 100
        counts = ~(above & difficult[claimed])
        hits = np.zeros(len(detections), dtype=bool)
        candidates = np.flatnonzero(above & counts)
        # The first to claim a truth has it.
        hits[candidates[np.unique(claimed[candidates], return_index=True)[1]]] = True
        found, scored = np.cumsum(hits), np.cumsum(counts)
        precision = found / np.maximum(scored, np.finfo(float).eps)
        aps.append(voc_ap(found / total, precision, use_07_metric))
    return np.array(aps)


class PascalVOCDetectionEvaluator(InstanceEvaluator):
    """AP50, AP75 and AP (mean over IoU 0.5 to 0.95), in percent, averaged over classes.

    Uses VOC's 2007 metric for a dataset whose metadata says `year` 2007, else the later one.
    """

    def __init__(self, dataset_name, distributed=True, output_dir=None, use_07_metric=None):
        """
        Args:
            dataset_name: a registered dataset; `difficult` in its annotations is respected.
            distributed: gather the detections of all ranks.
            output_dir: folder for `coco_instances_results.json` (the predictions, masks and
                keypoints too, in COCO's results format), or None.
            use_07_metric: None decides by the year.
        """
        # Masks and keypoints are not scored, only written.
        super().__init__(dataset_name, distributed, ("masks", "keypoints") if output_dir else ())
        self._output_dir = output_dir
        year = MetadataCatalog.get(dataset_name).get("year")
        self._use_07_metric = year == 2007 if use_07_metric is None else use_07_metric

    def _truths(self, seen):
        """Label, difficult (0 or 1), image and box of every annotation, `[M, 7]`."""
        rows = [
            [
                a["category_id"],
                bool(a.get("difficult", 0) or a.get("iscrowd", 0)),
                index,
                *BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
            ]
            for index in seen.tolist()
            for a in self.records[index]["annotations"]
        ]
        return np.array(rows, dtype=float).reshape(-1, 7)

    def score(self, detections):
        """{"bbox": AP, AP50, AP75 and each class' AP50}, in percent."""
        if self._output_dir:
            write_predictions(self._output_dir, self.dataset_name, detections)
        rows, truths = detections.rows, self._truths(detections.seen)
        table = {}
        for label, name in enumerate(self.classes):
            found, truth = rows[rows[:, 6] == label, :6], truths[truths[:, 0] == label]
            table[name] = 100 * voc_eval(found, truth[:, 2:], truth[:, 1] > 0, self._use_07_metric)
        known = np.array([aps for aps in table.values() if not np.isnan(aps).any()]).reshape(-1, 10)
        mean = known.mean(axis=0) if len(known) else np.full(10, np.nan)
        metrics = {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}
        per_class = [[name, *map(float, (aps.mean(), aps[0], aps[5]))] for name, aps in table.items()]
        which = "VOC 2007 metric" if self._use_07_metric else "VOC 2010 metric"
        header = ["class", "AP", "AP50", "AP75"]
        logger.info(f"box AP, {which}\n" + format_table([*per_class, ["all", *metrics.values()]], header))
        metrics |= {f"AP50-{name}": float(aps[0]) for name, aps in table.items()}
        return {"bbox": metrics}
