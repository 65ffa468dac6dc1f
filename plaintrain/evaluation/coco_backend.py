"""COCO's precision and recall by pycocotools, or by a library with the same interface and results."""

import contextlib
import io
import pkgutil

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import Params

from plaintrain.utils.errors import UserError

# The classes of each; the first that is installed is used. pycocotools always is, and is the slowest.
BACKENDS = {
    "hotcoco": ("hotcoco:COCO", "hotcoco:COCOeval"),
    "faster_coco_eval": ("faster_coco_eval:COCO", "faster_coco_eval:COCOeval_faster"),
    "pycocotools": ("pycocotools.coco:COCO", "pycocotools.cocoeval:COCOeval"),
}
COCO_SIGMAS = Params("keypoints").kpt_oks_sigmas.tolist()


def get_oks_sigmas(given, num):
    """Return TEST.KEYPOINT_OKS_SIGMAS, checked, or COCO's if it is empty; `num` keypoints, 0 if unknown."""
    sigmas = given or COCO_SIGMAS
    if num and (len(sigmas) != num or min(sigmas) <= 0):
        found = f"not {given}" if given else f"COCO's are for {len(COCO_SIGMAS)}"
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS must be {num} positive numbers, one for each keypoint of the "
            f"dataset, {found}"
        )
    return sigmas


def compute_precision_recall(backend, task, truth, detections, image_ids, sigmas):
    """Compute what COCO's metrics are means of; -1 where there is no ground truth.

    Ids are numbers from 1, in the order that ties are broken by.

    Args:
        backend: one of `BACKENDS`, installed.
        task: "bbox", "segm" or "keypoints".
        truth: a dataset as COCO JSON has it: images, categories, and annotations with an area.
        detections: in COCO's results format; for hotcoco's boxes an array `[N, 7]` of image id, x, y,
            width, height, score, category id.
        image_ids: the images that count.
        sigmas: OKS' standard deviation of each keypoint.

    Returns:
        precision `[IoU, recall, class, area, max detections]`,
        recall `[IoU, class, area, max detections]`
    """
    coco_class, eval_class = map(pkgutil.resolve_name, BACKENDS[backend])
    # They print, and the libraries do not let it be switched off.
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = _index(coco_class, truth)
        if isinstance(detections, np.ndarray):
            coco_dt = coco_gt.load_res(detections)
        else:
            # Not loadRes: to it the area of keypoints is not that of their box.
            annotations = [_annotation(number, detection) for number, detection in enumerate(detections, 1)]
            coco_dt = _index(coco_class, {**truth, "annotations": annotations})
        evaluation = eval_class(coco_gt, coco_dt, task)
        evaluation.params.imgIds = image_ids
        # For keypoints faster-coco-eval would leave out classes that nobody annotated.
        evaluation.params.catIds = sorted(category["id"] for category in truth["categories"])
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _index(coco_class, dataset):
    coco = coco_class()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _annotation(number, detection):
    area = detection["bbox"][2] * detection["bbox"][3]
    if "segmentation" in detection:
        area = float(coco_mask.area(detection["segmentation"]))
    return {**detection, "id": number, "area": area, "iscrowd": 0}
