"""COCO's precision and recall by pycocotools, or by hotcoco, which has the same results and interface."""

import contextlib
import importlib
import importlib.util
import io
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params

from plaintrain.utils.errors import UserError

# The first that is installed is used; pycocotools always is, and is the slowest.
BACKENDS = ("hotcoco", "pycocotools")
COCO_SIGMAS = Params("keypoints").kpt_oks_sigmas.tolist()


def oks_sigmas(given, num):
    """TEST.KEYPOINT_OKS_SIGMAS for `num` keypoints (0: nobody knows how many), or COCO's if it is empty.

    Raises:
        UserError: another number of them, or one that is not positive.
    """
    sigmas = given or COCO_SIGMAS
    if num and (len(sigmas) != num or min(sigmas) <= 0):
        found = f"not {given}" if given else f"COCO's are for {len(COCO_SIGMAS)}"
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS must be {num} positive numbers, one for each keypoint of the "
            f"dataset, {found}"
        )
    return sigmas


@dataclass(frozen=True)
class Problem:
    """What is to be scored: ids are numbers from 1, in the order that ties are broken by.

    Attributes:
        task: "bbox", "segm" or "keypoints".
        truth: a dataset as COCO JSON has it: images, categories, and annotations with an area.
        rows: detections `[N, 7]`: image id, x, y, width, height, score, category id.
        areas: `[N]`, which decide what is small, medium and large.
        shapes: for segm N RLEs, for keypoints N flat lists `[x, y, score, ...]`, else None.
        image_ids: the images that count.
        sigmas: OKS' standard deviation of each keypoint.
    """

    task: str
    truth: dict
    rows: np.ndarray
    areas: np.ndarray
    shapes: list | None
    image_ids: list
    sigmas: list


def choose_backend(use_fast_impl=True):
    """The first of `BACKENDS` that is installed; pycocotools if a fast one is not wanted."""
    installed = (name for name in BACKENDS if importlib.util.find_spec(name))
    return next(installed) if use_fast_impl else "pycocotools"


def precision_recall(backend, problem):
    """What COCO's metrics are means of; -1 where there is no ground truth.

    Args:
        backend: one of `BACKENDS`, installed.
        problem: a `Problem`.

    Returns:
        precision `[IoU, recall, class, area, max detections]`,
        recall `[IoU, class, area, max detections]`
    """
    fast = backend == "hotcoco"
    coco_class = importlib.import_module("hotcoco" if fast else "pycocotools.coco").COCO
    eval_class = importlib.import_module("hotcoco" if fast else "pycocotools.cocoeval").COCOeval
    # They print, and the libraries do not let it be switched off.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(coco_class, problem.truth)
        if fast and problem.task == "bbox":
            # An array instead of half a million dicts; for boxes it says all there is to say.
            detections = truth.load_res(problem.rows)
        else:
            detections = _index(coco_class, {**problem.truth, "annotations": _annotations(problem)})
        evaluation = eval_class(truth, detections, problem.task)
        evaluation.params.imgIds = problem.image_ids
        evaluation.params.kpt_oks_sigmas = np.array(problem.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _index(coco_class, dataset):
    coco = coco_class()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _annotations(problem):
    """The detections as COCO's annotations."""
    annotations = []
    for i, (row, area) in enumerate(zip(problem.rows.tolist(), problem.areas.tolist(), strict=True)):
        image_id, *box, score, category_id = row
        ids = {"id": i + 1, "image_id": int(image_id), "category_id": int(category_id)}
        annotations.append({**ids, "bbox": box, "score": score, "area": area, "iscrowd": 0})
    if problem.shapes is not None:
        key = "segmentation" if problem.task == "segm" else "keypoints"
        for annotation, shape in zip(annotations, problem.shapes, strict=True):
            annotation[key] = shape
    return annotations
