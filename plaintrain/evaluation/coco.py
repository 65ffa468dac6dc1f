"""AP of boxes, masks and keypoints as COCO defines it, and recall of proposals.

https://cocodataset.org/#detection-eval and https://cocodataset.org/#keypoints-eval
"""

import importlib.util
import logging

import numpy as np
import torch
from torchvision.ops import box_iou

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.data.datasets.write import get_area, get_category_ids
from plaintrain.evaluation.coco_backend import BACKENDS, COCO_SIGMAS, compute_precision_recall, get_oks_sigmas
from plaintrain.evaluation.coco_gt import build_coco_gt, get_num_keypoints, has_annotations, rank_ids
from plaintrain.evaluation.detections import InstanceEvaluator, build_object_table
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import convert_to_coco_results, write_predictions
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Task -> the part of a model's output that it scores.
TASKS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints", "box_proposals": "boxes"}
# Of proposals: how many of an image, and the IoUs that recall is averaged over.
_LIMITS = (100, 1000)
_IOUS = np.linspace(0.5, 0.95, 10)
# Suffix of the metric -> areas in pixels, both ends included.
_AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


class COCOEvaluator(InstanceEvaluator):
    """COCO's numbers, in percent: AP and AR, and for boxes and masks each class' AP.

    Ground truth are the dataset's records, so any format can be scored. An annotation's own `area`
    decides its size, or else that of its segmentation or its box. Crowds, and for keypoints
    objects without a labelled one, are ignored as pycocotools does. `backend` is who computes it,
    one of `coco_backend.BACKENDS`; it may be set.
    """

    def __init__(  # noqa: PLR0913 - Detectron2's signature
        self,
        dataset_name,
        tasks=None,
        distributed=True,
        output_dir=None,
        *,
        kpt_oks_sigmas=(),
        use_fast_impl=True,
    ):
        """
        Args:
            dataset_name: a registered dataset.
            tasks: which of bbox, segm, keypoints and box_proposals (class-agnostic recall); None
                for bbox, and for what else the model's outputs and the dataset hold.
            distributed: gather the detections of all ranks.
            output_dir: folder for `coco_instances_results.json` (COCO's results format, with the
                dataset's own image and category ids), or None.
            kpt_oks_sigmas: standard deviation of each keypoint in OKS; may be empty for 17.
            use_fast_impl: compute by hotcoco or faster-coco-eval where one is installed; the
                results are those of pycocotools.
        """
        if tasks is not None and (not tasks or set(tasks) - set(TASKS)):
            raise UserError(f"COCOEvaluator's tasks are some of {', '.join(TASKS)}, not {tasks}")
        super().__init__(
            dataset_name, distributed, [TASKS[task] for task in TASKS if task in (tasks or TASKS)]
        )
        for task in tasks or ():
            if not has_annotations(self.records, task):
                raise UserError(f"the task {task} cannot be scored: {dataset_name} has no annotations for it")
        self._tasks, self._output_dir = tasks, output_dir
        self.backend = "pycocotools"
        if use_fast_impl:
            self.backend = next(name for name in BACKENDS if importlib.util.find_spec(name))
        metadata = MetadataCatalog.get(dataset_name)
        self._category_ids = get_category_ids(metadata)
        self._sigmas = [float(sigma) for sigma in kpt_oks_sigmas]
        if "keypoints" in (tasks or ()):
            names = metadata.get("keypoint_names") or ()
            get_oks_sigmas(self._sigmas, len(names) or get_num_keypoints(self.records))

    def score(self, detections):
        """{task: {metric: number}}, in percent; NaN where there is no ground truth of a kind."""
        tasks = self.tasks_of(detections)
        if self._output_dir and tasks != ["box_proposals"]:
            write_predictions(self._output_dir, self.dataset_name, detections)
        results = {}
        for task in tasks:
            if task == "box_proposals":
                results[task] = compute_average_recall(self._proposals(detections))
                logger.info("box proposals\n" + format_table(results[task].items(), ["metric", "value"]))
            else:
                results[task] = self._score_task(task, detections)
        return results

    def tasks_of(self, detections):
        """The tasks that `Detections` are scored in; a `UserError` if they lack a part that one needs."""
        if self._tasks:
            missing = [task for task in self._tasks if getattr(detections, TASKS[task], ()) is None]
            if missing and len(detections.rows):
                raise UserError(
                    f"the task {missing[0]} needs {TASKS[missing[0]]} in the model's outputs, which have none"
                )
            return [task for task in TASKS if task in self._tasks]
        tasks = ["bbox"]
        for task in ("segm", "keypoints"):
            if getattr(detections, TASKS[task]) is None:
                continue
            if has_annotations(self.records, task):
                tasks.append(task)
            else:
                logger.warning(
                    f"{task} is not scored: no annotation of {self.dataset_name} has {TASKS[task]}"
                )
        return tasks

    def precision_recall(self, task, detections):
        """What the metrics are means of, see `coco_backend.precision_recall`; classes by label."""
        image_numbers = rank_ids([record["image_id"] for record in self.records])
        category_numbers = rank_ids(self._category_ids)
        numbers = image_numbers.tolist(), category_numbers.tolist()
        truth, sigmas = build_coco_gt(task, self.records, *numbers), COCO_SIGMAS
        if task == "keypoints":
            sigmas = get_oks_sigmas(self._sigmas, get_num_keypoints(self.records))
            points = detections.keypoints
            if len(points) and points.shape[1] != len(sigmas):
                raise UserError(
                    f"the model finds {points.shape[1]} keypoints, {self.dataset_name} has {len(sigmas)}"
                )
        if task == "bbox" and self.backend == "hotcoco":
            # An array instead of half a million dicts.
            rows = detections.rows
            image_ids, labels = image_numbers[rows[:, 0].astype(int)], rows[:, 6].astype(int)
            boxes = np.concatenate([rows[:, 1:3], rows[:, 3:5] - rows[:, 1:3]], axis=1)
            results = np.column_stack([image_ids, boxes, rows[:, 5], category_numbers[labels]])
        else:
            results = convert_to_coco_results(detections, self.records, *numbers, parts=[TASKS[task]])
        seen = sorted(image_numbers[detections.seen].tolist())
        precision, recall = compute_precision_recall(self.backend, task, truth, results, seen, sigmas)
        order = category_numbers - 1
        return precision[:, :, order], recall[:, order]

    def _score_task(self, task, detections):
        logger.info(f"{task} is scored by {self.backend}")
        precision, recall = self.precision_recall(task, detections)
        metrics = summarize(precision, recall, task)
        if task == "keypoints":
            return metrics
        per_class = {name: compute_mean_ap(precision[:, :, k, 0, -1]) for k, name in enumerate(self.classes)}
        if len(per_class) > 1:
            logger.info(f"{task} AP by class\n" + format_table(per_class.items(), ["class", "AP"]))
        return metrics | {f"AP-{name}": value for name, value in per_class.items()}

    def _proposals(self, detections):
        """What `compute_average_recall` takes, of each image that was seen."""
        objects, rows = build_object_table(self.records), detections.rows
        areas = np.array([get_area(a, record) for record in self.records for a in record["annotations"]])
        for index in detections.seen:
            found = rows[slice(*np.searchsorted(rows[:, 0], [index, index + 1]))]
            wanted = (objects["image"] == index) & ~objects["crowd"]
            boxes = found[np.argsort(-found[:, 5], kind="stable"), 1:5]
            yield boxes, objects["boxes"][wanted], areas[wanted]


def compute_mean_ap(values):
    """Mean in percent of parts of `coco_backend.precision_recall`; NaN where there is no ground truth."""
    # -1 is pycocotools' word for "no ground truth of this kind". faster-coco-eval leaves out the
    # 2.2e-16 that pycocotools adds to a denominator; ten decimals are the same for both.
    values = values[values > -1]
    return round(100 * float(np.mean(values)), 10) if values.size else float("nan")


def summarize(precision, recall, task):
    """The means that COCO reports: 12 for boxes and masks, 10 for keypoints.

    Args:
        precision: `[IoU, recall, class, area, max detections]`, -1 where nothing is known.
        recall: `[IoU, class, area, max detections]`.
        task: "bbox", "segm" or "keypoints", which has no small objects and one limit.

    Returns:
        {metric: percent}
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


def compute_proposal_coverage(ious):
    """IoU with which each object is covered: the best pair first, and each box and object only once.

    Args:
        ious: `[proposals, objects]`.

    Returns:
        `[objects]` in 0..1, in no order; 0 for objects that no proposal was left for.
    """
    ious, covered = ious.copy(), np.zeros(ious.shape[1])
    for i in range(min(ious.shape)):
        box, thing = np.unravel_index(ious.argmax(), ious.shape)
        covered[i] = ious[box, thing]
        ious[box], ious[:, thing] = -1, -1
    return covered


def compute_average_recall(images):
    """AR@100, ARs@100, ..., ARl@1000: recall averaged over IoU 0.5 to 0.95, in percent.

    As Detectron2's `_evaluate_box_proposals`, but the objects of images without a proposal count as missed.

    Args:
        images: of each image, proposals `[P, 4]` XYXY with the best score first, objects
            `[G, 4]`, and the areas `[G]` of the objects in pixels.

    Returns:
        {metric: number}; NaN where no object is of that size.
    """
    covered = {(limit, suffix): [np.zeros(0)] for limit in _LIMITS for suffix in _AREAS}
    for boxes, objects, areas in images:
        boxes = torch.from_numpy(boxes[: max(_LIMITS)])
        # Of two without an area it is NaN.
        ious = box_iou(boxes, torch.from_numpy(objects)).nan_to_num().numpy()
        for (limit, suffix), values in covered.items():
            low, high = _AREAS[suffix]
            values.append(compute_proposal_coverage(ious[:limit, (areas >= low) & (areas <= high)]))
    metrics = {}
    for (limit, suffix), values in covered.items():
        values = np.concatenate(values)
        recall = (values >= _IOUS[:, None]).mean() if len(values) else np.nan
        metrics[f"AR{suffix}@{limit}"] = 100 * float(recall)
    return metrics
