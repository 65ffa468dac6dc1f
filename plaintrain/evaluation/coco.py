"""COCO's AP and AR (https://cocodataset.org/#detection-eval), and the recall of proposals."""

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.data.datasets.write import get_area, get_category_ids
from plaintrain.evaluation.coco_backend import BACKENDS, compute_precision_recall, get_oks_sigmas
from plaintrain.evaluation.coco_gt import build_coco_gt, get_num_keypoints, has_annotations, rank_ids
from plaintrain.evaluation.detections import Detections, InstanceEvaluator, build_object_table
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import convert_to_coco_results, write_predictions
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# With more classes, only log.txt has the AP of each class.
_MAX_CLASSES = 20

# Task -> key of the model's outputs that it scores.
TASKS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints", "box_proposals": "boxes"}
# Numbers of proposals per image, and IoU thresholds, of the average recall.
_PROPOSAL_LIMITS = (100, 1000)
_IOUS = np.linspace(0.5, 0.95, 10)
# Suffix of the metric -> range of areas in pixels, inclusive.
_AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


class COCOEvaluator(InstanceEvaluator):
    """Evaluator of COCO's AP and AR, and of the AP of each class for boxes and masks, in percent.

    The records of the dataset are the ground truth. The size of an object is the `area` of its annotation, or
    else that of its segmentation or box. As in pycocotools, crowds and, for keypoints, objects without
    labelled keypoints are ignored. `backend`, one of `coco_backend.BACKENDS`, may be changed.
    """

    # Of an image and category.
    max_detections = 100

    def __init__(  # noqa: PLR0913 - Detectron2's signature
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        kpt_oks_sigmas: Sequence[float] = (),
        use_fast_impl: bool = True,
    ) -> None:
        """
        Args:
            tasks: some of bbox, segm, keypoints and box_proposals (class-agnostic recall). None for bbox,
                and segm and keypoints if both the model and the dataset have them.
            kpt_oks_sigmas: OKS standard deviation of each keypoint; COCO's if empty.
            use_fast_impl: use hotcoco or faster-coco-eval, if installed; the results are identical.
        """
        if tasks is not None and (not tasks or set(tasks) - set(TASKS)):
            raise UserError(f"tasks of COCOEvaluator must be some of {', '.join(TASKS)}, got {tasks}")
        super().__init__(dataset_name, distributed, [TASKS[task] for task in tasks or TASKS])
        for task in tasks or ():
            if not has_annotations(self.records, task):
                raise UserError(f"the task {task} cannot be scored: {dataset_name} has no annotations for it")
        self._tasks = tasks
        self._output_dir = output_dir
        self.backend = "pycocotools"
        if use_fast_impl:
            self.backend = next(name for name in BACKENDS if importlib.util.find_spec(name))
        metadata = MetadataCatalog.get(dataset_name)
        self._category_ids = get_category_ids(metadata)
        self._sigmas = [float(sigma) for sigma in kpt_oks_sigmas]
        if "keypoints" in (tasks or ()):
            names = metadata.get("keypoint_names") or ()
            get_oks_sigmas(self._sigmas, len(names) or get_num_keypoints(self.records))

    def score(self, detections: Detections) -> dict[str, dict[str, float]]:
        """Return {task: {metric: percent}}; NaN without ground truth."""
        tasks = self.select_tasks(detections)
        if self._output_dir and tasks != ["box_proposals"]:
            write_predictions(self._output_dir, self.dataset_name, detections)
        results = {}
        for task in tasks:
            if task == "box_proposals":
                results[task] = compute_average_recall(self._iterate_proposals(detections))
                logger.info("box proposals\n" + format_table(results[task].items(), ["metric", "value"]))
            else:
                results[task] = self._score_task(task, detections)
        return results

    def select_tasks(self, detections: Detections) -> list[str]:
        """Return the tasks that the detections are scored in."""
        if self._tasks:
            missing = [task for task in self._tasks if getattr(detections, TASKS[task], ()) is None]
            if missing and len(detections.table):
                raise UserError(f"the task {missing[0]} needs {TASKS[missing[0]]} in the model outputs")
            return [task for task in TASKS if task in self._tasks]
        tasks = ["bbox"]
        for task in ("segm", "keypoints"):
            if getattr(detections, TASKS[task]) is None:
                continue
            if has_annotations(self.records, task):
                tasks.append(task)
            else:
                logger.warning(f"skipping {task}: no annotation of {self.dataset_name} has {TASKS[task]}")
        return tasks

    def get_ground_truth(self) -> Sequence[dict[str, Any]]:
        return self.records

    def compute_curves(self, task: str, detections: Detections) -> tuple[np.ndarray, np.ndarray]:
        """Return `coco_backend.compute_precision_recall`, with the classes in the order of the labels."""
        image_ids = rank_ids([record["image_id"] for record in self.records])
        category_ids = rank_ids(self._category_ids)
        ids = image_ids.tolist(), category_ids.tolist()
        ground_truth = build_coco_gt(task, self.get_ground_truth(), *ids)
        params: dict[str, Any] = {"maxDets": [1, 10, self.max_detections]}
        if task == "keypoints":
            sigmas = get_oks_sigmas(self._sigmas, get_num_keypoints(self.records))
            points = detections.keypoints
            if points is not None and len(points) and points.shape[1] != len(sigmas):
                expected = f"{len(sigmas)} keypoints of {self.dataset_name}"
                raise UserError(f"the model must predict the {expected}, got {points.shape[1]}")
            params = {"kpt_oks_sigmas": np.array(sigmas)}
        if task == "bbox" and self.backend == "hotcoco":
            # One array is faster than half a million dicts.
            table = detections.table
            boxes = np.concatenate([table[:, 1:3], table[:, 3:5] - table[:, 1:3]], axis=1)
            image, label = table[:, [0, 6]].astype(int).T
            results: Any = np.column_stack([image_ids[image], boxes, table[:, 5], category_ids[label]])
        else:
            results = convert_to_coco_results(detections, self.records, *ids, fields=[TASKS[task]])
        seen = sorted(image_ids[detections.seen].tolist())
        precision, recall = compute_precision_recall(self.backend, task, ground_truth, results, seen, params)
        order = category_ids - 1
        return precision[:, :, order], recall[:, order]

    def _score_task(self, task: str, detections: Detections) -> dict[str, float]:
        logger.debug(f"{task} is scored by {self.backend}")
        precision, recall = self.compute_curves(task, detections)
        metrics = summarize(precision, recall, task)
        if task == "keypoints":
            return metrics
        per_class = {name: compute_mean_ap(precision[:, :, k, 0, -1]) for k, name in enumerate(self.classes)}
        if len(per_class) > 1:
            level = logging.INFO if len(per_class) <= _MAX_CLASSES else logging.DEBUG
            logger.log(level, f"{task} AP by class\n" + format_table(per_class.items(), ["class", "AP"]))
        return metrics | {f"AP-{name}": value for name, value in per_class.items()}

    def _iterate_proposals(self, detections: Detections) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the arguments of `compute_average_recall` for each processed image."""
        objects = build_object_table(self.records)
        areas = np.array([get_area(a, record) for record in self.records for a in record["annotations"]])
        table = detections.table
        for index in detections.seen:
            proposals = table[slice(*np.searchsorted(table[:, 0], [index, index + 1]))]
            boxes = proposals[np.argsort(-proposals[:, 5], kind="stable"), 1:5]
            targets = (objects["image"] == index) & ~objects["crowd"]
            yield boxes, objects["boxes"][targets], areas[targets]


def compute_mean_ap(values: np.ndarray) -> float:
    """Return the mean in percent of precision or recall values; NaN if all are -1 (no ground truth)."""
    # Rounded, since faster-coco-eval omits the 2.2e-16 that pycocotools adds to a denominator.
    values = values[values > -1]
    return round(100 * float(np.mean(values)), 10) if values.size else float("nan")


def summarize(precision: np.ndarray, recall: np.ndarray, task: str) -> dict[str, float]:
    """Return COCO's metrics, {name: percent}: 12 for bbox and segm, 10 for keypoints.

    `precision` and `recall` are those of `coco_backend.compute_precision_recall`.
    """
    sizes = "ml" if task == "keypoints" else "sml"
    means = {"AP": precision[..., 0, -1], "AP50": precision[0, ..., 0, -1], "AP75": precision[5, ..., 0, -1]}
    means |= {f"AP{size}": precision[..., i, -1] for i, size in enumerate(sizes, start=1)}
    if task == "keypoints":
        means |= {"AR": recall[..., 0, -1], "AR50": recall[0, ..., 0, -1], "AR75": recall[5, ..., 0, -1]}
    else:
        means |= {f"AR{limit}": recall[..., 0, i] for i, limit in enumerate((1, 10, 100))}
    means |= {f"AR{size}": recall[..., i, -1] for i, size in enumerate(sizes, start=1)}
    return {name: compute_mean_ap(values) for name, values in means.items()}


def compute_proposal_coverage(ious: np.ndarray) -> np.ndarray:
    """Match `[proposals, objects]` greedily by IoU; return the IoU of each object, in no order, or 0."""
    ious = ious.copy()
    covered = np.zeros(ious.shape[1])
    for i in range(min(ious.shape)):
        box, target = np.unravel_index(ious.argmax(), ious.shape)
        covered[i] = ious[box, target]
        ious[box] = -1
        ious[:, target] = -1
    return covered


def compute_average_recall(images: Iterable[tuple[np.ndarray, ...]]) -> dict[str, float]:
    """Return AR@100, ARs@100, ..., ARl@1000 in percent, the recall averaged over IoU 0.5 to 0.95.

    As in Detectron2's `_evaluate_box_proposals`, but objects in images without proposals count as missed.
    Images are proposals `[P, 4]` XYXY by descending score, objects `[G, 4]`, and their areas `[G]` in pixels.
    """
    covered = {(limit, suffix): [np.zeros(0)] for limit in _PROPOSAL_LIMITS for suffix in _AREAS}
    for boxes, objects, areas in images:
        proposals = torch.from_numpy(boxes[: max(_PROPOSAL_LIMITS)])
        # The IoU of two empty boxes is NaN.
        ious = box_iou(proposals, torch.from_numpy(objects)).nan_to_num().numpy()
        for (limit, suffix), values in covered.items():
            low, high = _AREAS[suffix]
            values.append(compute_proposal_coverage(ious[:limit, (areas >= low) & (areas <= high)]))
    metrics = {}
    for (limit, suffix), values in covered.items():
        coverage = np.concatenate(values)
        recall = (coverage >= _IOUS[:, None]).mean() if len(coverage) else np.nan
        metrics[f"AR{suffix}@{limit}"] = 100 * float(recall)
    return metrics
