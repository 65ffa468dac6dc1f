"""Average precision as Pascal VOC defines it.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, 3.4.1
"""

import json
import logging
import os

import numpy as np

from plaintrain.data.catalog import MetadataCatalog, class_names
from plaintrain.evaluation.boxes import BoxEvaluator
from plaintrain.evaluation.loop import format_table
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write

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


def _iou(box, others):
    """IoU of `[4]` with `[N, 4]`."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    overlap = np.clip(sides, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return overlap / np.maximum((box[2:] - box[:2]).prod() + areas - overlap, 1e-12)


def voc_eval(detections, truths, threshold, use_07_metric=False):
    """AP of one class: each detection claims the truth it overlaps most, once.

    Args:
        detections: `[N, 6]`, rows [image, x0, y0, x1, y1, score].
        truths: image -> (boxes `[M, 4]`, difficult `[M]` bool). A detection on a difficult one
            counts neither for nor against.
        threshold: IoU a detection must exceed, in 0..1.
        use_07_metric: see `voc_ap`.

    Returns:
        A number in 0..1, or NaN if the class has no truth that is not difficult.
    """
    total = sum(int((~difficult).sum()) for _, difficult in truths.values())
    if not total:
        return float("nan")
    order = np.argsort(-detections[:, 5], kind="stable")
    hits, misses = np.zeros(len(order)), np.zeros(len(order))
    claimed = {image: np.zeros(len(boxes), bool) for image, (boxes, _) in truths.items()}
    for i, row in enumerate(detections[order]):
        boxes, difficult = truths.get(int(row[0]), (np.zeros((0, 4)), None))
        overlaps = _iou(row[1:5], boxes)
        if not len(boxes) or overlaps.max() <= threshold:
            misses[i] = 1
            continue
        best = int(overlaps.argmax())
        if not difficult[best]:
            (misses if claimed[int(row[0])][best] else hits)[i] = 1
            claimed[int(row[0])][best] = True
    hits, misses = np.cumsum(hits), np.cumsum(misses)
    precision = hits / np.maximum(hits + misses, np.finfo(float).eps)
    return voc_ap(hits / total, precision, use_07_metric)


class PascalVOCDetectionEvaluator(BoxEvaluator):
    """AP50, AP75 and AP (mean over IoU 0.5 to 0.95), in percent, averaged over classes.

    Uses VOC's 2007 metric for a dataset whose metadata says `year` 2007, else the later one.
    """

    def __init__(self, dataset_name, distributed=True, output_dir=None, use_07_metric=None):
        """
        Args:
            dataset_name: a registered dataset; `difficult` in its annotations is respected.
            distributed: gather the detections of all ranks.
            output_dir: folder for `voc_results.json`, or None.
            use_07_metric: None decides by the year.
        """
        super().__init__(dataset_name, distributed)
        self._classes, self._output_dir = class_names(dataset_name), output_dir
        if not self._classes:
            raise UserError(f"the dataset {dataset_name} has no classes to score")
        year = MetadataCatalog.get(dataset_name).get("year")
        self._use_07_metric = year == 2007 if use_07_metric is None else use_07_metric

    def _truths(self, label, seen):
        truths = {}
        for index in seen:
            rows = [a for a in self.records[index]["annotations"] if a["category_id"] == label]
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in rows]
            difficult = [bool(a.get("difficult", 0) or a.get("iscrowd", 0)) for a in rows]
            truths[int(index)] = np.array(boxes).reshape(-1, 4), np.array(difficult, dtype=bool)
        return truths

    def score(self, rows, seen):
        """{"bbox": AP, AP50, AP75 and each class' AP50}, in percent; see `BoxEvaluator`."""
        table = {}
        for label, name in enumerate(self._classes):
            detections, truths = rows[rows[:, 6] == label, :6], self._truths(label, seen)
            table[name] = [
                100 * voc_eval(detections, truths, iou / 100, self._use_07_metric) for iou in _IOUS
            ]
        known = np.array([aps for aps in table.values() if not np.isnan(aps).any()]).reshape(-1, 10)
        mean = known.mean(axis=0) if len(known) else np.full(10, np.nan)
        metrics = {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}
        per_class = [[name, float(np.mean(aps)), aps[0], aps[5]] for name, aps in table.items()]
        which = "VOC 2007 metric" if self._use_07_metric else "VOC 2010 metric"
        header = ["class", "AP", "AP50", "AP75"]
        logger.info(f"box AP, {which}\n" + format_table([*per_class, ["all", *metrics.values()]], header))
        metrics |= {f"AP50-{name}": aps[0] for name, aps in table.items()}
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            with atomic_write(os.path.join(self._output_dir, "voc_results.json")) as f:
                json.dump({k: None if np.isnan(v) else v for k, v in metrics.items()}, f, indent=1)
        return {"bbox": metrics}
