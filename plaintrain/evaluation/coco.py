"""Box AP as COCO defines it, computed by pycocotools."""

import contextlib
import io
import json
import logging
import os

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plaintrain.data.catalog import MetadataCatalog, class_names
from plaintrain.evaluation.boxes import BoxEvaluator
from plaintrain.evaluation.loop import format_table
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class COCOEvaluator(BoxEvaluator):
    """The 12 COCO numbers, in percent, and each class' AP.

    Ground truth are the dataset's records, so any format can be scored; an annotation's own
    `area` is used where there is one, and crowds are ignored as pycocotools does.
    """

    def __init__(self, dataset_name, tasks=None, distributed=True, output_dir=None):
        """
        Args:
            dataset_name: a registered dataset.
            tasks: None or ("bbox",).
            distributed: gather the detections of all ranks.
            output_dir: folder for `coco_instances_results.json` (COCO's results format, with the
                dataset's own image and category ids), or None.
        """
        if tasks is not None and tuple(tasks) != ("bbox",):
            raise UserError(f'COCOEvaluator scores the tasks ("bbox",), not {tasks}')
        super().__init__(dataset_name, distributed)
        self._output_dir = output_dir
        self._classes = class_names(dataset_name)
        mapping = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
        ids = {label: dataset_id for dataset_id, label in (mapping or {}).items()}
        self._category_ids = [ids.get(i, i + 1) for i in range(len(self._classes))]

    def score(self, rows, seen):
        """{"bbox": the 12 COCO numbers and each class' AP}, in percent; see `BoxEvaluator`."""
        image_ids = [record["image_id"] for record in self.records]
        results = self._results(rows, image_ids)
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            with atomic_write(os.path.join(self._output_dir, "coco_instances_results.json")) as f:
                json.dump(results, f)
        # pycocotools sorts by id: numbers as they are, names by their place in the dataset.
        if not all(isinstance(image_id, int) for image_id in image_ids):
            number = {image_id: i for i, image_id in enumerate(image_ids)}
            results = [{**result, "image_id": number[result["image_id"]]} for result in results]
            image_ids = list(range(len(image_ids)))
        truth = self._dataset(self._annotations(image_ids), image_ids)
        found = self._dataset(results, image_ids)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids[i] for i in seen)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {"bbox": self._metrics(evaluation)}

    def _results(self, rows, image_ids):
        return [
            {
                "image_id": image_ids[int(index)],
                "category_id": self._category_ids[int(label)],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for index, x0, y0, x1, y1, score, label in rows.tolist()
        ]

    def _annotations(self, image_ids):
        annotations = []
        for image_id, record in zip(image_ids, self.records, strict=True):
            for a in record["annotations"]:
                box = a["bbox"]
                if a["bbox_mode"] != BoxMode.XYWH_ABS:
                    box = BoxMode.convert(box, a["bbox_mode"], BoxMode.XYWH_ABS)
                annotation = {
                    "image_id": image_id,
                    "category_id": self._category_ids[a["category_id"]],
                    "bbox": box,
                    "iscrowd": a.get("iscrowd", 0),
                }
                if "area" in a:
                    annotation["area"] = a["area"]
                annotations.append(annotation)
        return annotations

    def _dataset(self, annotations, image_ids):
        """A pycocotools `COCO` made in memory, with what its loaders would add."""
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in image_ids],
            "categories": [{"id": i} for i in self._category_ids],
            "annotations": [
                {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": i + 1}
                for i, a in enumerate(annotations)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _metrics(self, evaluation):
        # -1 is pycocotools' word for "no ground truth of this kind".
        stats = [float(s) * 100 if s > -1 else float("nan") for s in evaluation.stats]
        metrics = dict(zip(METRICS, stats, strict=True))
        logger.info("box AP\n" + format_table([list(metrics.values())[:6]], list(METRICS[:6])))
        logger.info("box AR\n" + format_table([list(metrics.values())[6:]], list(METRICS[6:])))
        # [IoU, recall, class, area, max detections]
        precision = evaluation.eval["precision"]
        order = {category: i for i, category in enumerate(evaluation.params.catIds)}
        per_class = {}
        for name, category in zip(self._classes, self._category_ids, strict=True):
            values = precision[:, :, order[category], 0, -1]
            values = values[values > -1]
            per_class[name] = float(np.mean(values)) * 100 if values.size else float("nan")
        if len(per_class) > 1:
            logger.info("box AP by class\n" + format_table(per_class.items(), ["class", "AP"]))
        return metrics | {f"AP-{name}": value for name, value in per_class.items()}
