"""LVIS' AP: the objects of an image are annotated for some categories only (arXiv 1908.03195)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.data.datasets.write import get_category_ids
from plaintrain.evaluation.coco import COCOEvaluator, compute_mean_ap, summarize
from plaintrain.evaluation.detections import Detections
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

_MAX_DETECTIONS = 300


class LVISEvaluator(COCOEvaluator):
    """Evaluator of LVIS' AP for boxes and masks, with APr, APc and APf by the frequency of classes.

    Records name the dataset's ids of categories without objects (`neg_category_ids`) and with more objects
    than are annotated (`not_exhaustive_category_ids`); see `data.datasets.lvis`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        if tasks is not None and set(tasks) - {"bbox", "segm"}:
            raise UserError(f"tasks of LVISEvaluator must be some of bbox and segm, got {tasks}")
        super().__init__(dataset_name, tasks, distributed, output_dir)
        self.max_detections = max_dets_per_image or _MAX_DETECTIONS
        metadata = MetadataCatalog.get(dataset_name)
        self._frequencies = np.array(metadata.get("class_frequencies") or [""] * len(self.classes))
        self._labels = {category_id: label for label, category_id in enumerate(get_category_ids(metadata))}

    def select_tasks(self, detections: Detections) -> list[str]:
        return [task for task in super().select_tasks(detections) if task != "keypoints"]

    def _get_labels(self, record, key):
        return {self._labels[i] for i in record.get(key, ()) if i in self._labels}

    def get_ground_truth(self) -> list[dict[str, Any]]:
        """Return the records with a crowd around each image for each category that is not exhaustive.

        Unmatched detections in a crowd are ignored, which is LVIS' rule for these categories.
        """
        records = []
        for record in self.records:
            width = record["width"]
            height = record["height"]
            outline = [[0, 0, width, 0, width, height, 0, height]]
            crowd = {"bbox": [-1e6, -1e6, 1e6, 1e6], "bbox_mode": BoxMode.XYXY_ABS, "segmentation": outline}
            labels = sorted(self._get_labels(record, "not_exhaustive_category_ids"))
            crowds = [{**crowd, "category_id": label, "iscrowd": 1, "area": 1} for label in labels]
            records.append({**record, "annotations": [*record["annotations"], *crowds]})
        return records

    def compute_curves(self, task: str, detections: Detections) -> tuple[np.ndarray, np.ndarray]:
        """Return COCO's curves of the best detections of each image, if their category was verified in it."""
        table = detections.table
        image = table[:, 0].astype(int)
        order = np.lexsort([-table[:, 5], image])
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(len(order)) - np.searchsorted(image[order], image[order])
        verified = [
            self._get_labels(record, "neg_category_ids") | {a["category_id"] for a in record["annotations"]}
            for record in self.records
        ]
        judged = [label in verified[i] for i, label in zip(image, table[:, 6].astype(int), strict=True)]
        # As the lvis package, without empty detections.
        has_area = (table[:, 3:5] - table[:, 1:3]).prod(axis=1) > 0
        if task == "segm":
            # The area depends on the runs only.
            rles = [{"size": [1, 1], "counts": counts} for counts in detections.masks or ()]
            has_area = coco_mask.area(rles) > 0
        keep = np.flatnonzero(np.array(judged, dtype=bool) & (rank < self.max_detections) & has_area)
        masks = [detections.masks[i] for i in keep] if detections.masks is not None else None
        detections = replace(detections, table=table[keep], masks=masks, keypoints=None)
        return super().compute_curves(task, detections)

    def _score_task(self, task: str, detections: Detections) -> dict[str, float]:
        precision, recall = self.compute_curves(task, detections)
        metrics = {k: v for k, v in summarize(precision, recall, task).items() if k.startswith("AP")}
        for frequency in "rcf":
            metrics[f"AP{frequency}"] = compute_mean_ap(
                precision[:, :, self._frequencies == frequency, 0, -1]
            )
        return metrics
