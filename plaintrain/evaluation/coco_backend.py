"""COCO's precision and recall by pycocotools, or by a library with the same interface and results."""

import contextlib
import io
import pkgutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import Params

from plaintrain.utils.errors import UserError

# Library -> its classes, fastest first; pycocotools is always installed.
BACKENDS = {
    "hotcoco": ("hotcoco:COCO", "hotcoco:COCOeval"),
    "faster_coco_eval": ("faster_coco_eval:COCO", "faster_coco_eval:COCOeval_faster"),
    "pycocotools": ("pycocotools.coco:COCO", "pycocotools.cocoeval:COCOeval"),
}
COCO_SIGMAS = Params("keypoints").kpt_oks_sigmas.tolist()


def get_oks_sigmas(sigmas: Sequence[float], num_keypoints: int) -> Sequence[float]:
    """Return `sigmas`, or COCO's if empty, after checking them if `num_keypoints` is not 0."""
    used = sigmas or COCO_SIGMAS
    if num_keypoints and (len(used) != num_keypoints or min(used) <= 0):
        expected = f"{num_keypoints} positive numbers, one per keypoint of the dataset"
        actual = sigmas or f"none (the default is for {len(COCO_SIGMAS)} keypoints)"
        raise UserError(f"TEST.KEYPOINT_OKS_SIGMAS must be {expected}, got {actual}")
    return used


def compute_precision_recall(
    backend: str,
    task: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]] | np.ndarray,
    image_ids: list[int],
    params: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall, which COCO's metrics are means of; -1 without ground truth.

    The ground truth is in COCO's JSON format, with areas, and detections in its results format, or for boxes
    with hotcoco `[N, 7]` of image id, x, y, width, height, score, category id. Image and category ids count
    from 1, in the order of pycocotools, which breaks ties. `image_ids` are the images to score,
    `params` other attributes of pycocotools' Params.

    Precision is `[IoU, recall, class, area, max detections]`, recall `[IoU, class, area, max detections]`.
    """
    coco_class, eval_class = map(pkgutil.resolve_name, BACKENDS[backend])
    # The libraries print, without an option to disable it.
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = _build_coco(coco_class, ground_truth)
        if isinstance(detections, np.ndarray):
            coco_dt = coco_gt.load_res(detections)
        else:
            # Not loadRes, which computes other areas for keypoints.
            annotations = [_convert_to_annotation(i, detection) for i, detection in enumerate(detections, 1)]
            coco_dt = _build_coco(coco_class, {**ground_truth, "annotations": annotations})
        evaluation = eval_class(coco_gt, coco_dt, task)
        evaluation.params.imgIds = image_ids
        # For keypoints, faster-coco-eval would skip classes without annotations.
        evaluation.params.catIds = sorted(category["id"] for category in ground_truth["categories"])
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _build_coco(coco_class, dataset):
    coco = coco_class()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _convert_to_annotation(annotation_id, detection):
    area = detection["bbox"][2] * detection["bbox"][3]
    if "segmentation" in detection:
        area = float(coco_mask.area(detection["segmentation"]))
    return {**detection, "id": annotation_id, "area": area, "iscrowd": 0}
