"""Who computes COCO's precision and recall: hotcoco, faster-coco-eval, or else pycocotools."""

import contextlib
import importlib.util
import io
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params

from plaintrain.utils.errors import UserError

# The first that is installed is used; they agree with each other, and pycocotools is the slowest.
BACKENDS = ("hotcoco", "faster_coco_eval", "pycocotools")
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
    found = (name for name in BACKENDS if importlib.util.find_spec(name))
    return next(found) if use_fast_impl else "pycocotools"


def precision_recall(backend, problem):
    """What COCO's metrics are means of; -1 where there is no ground truth.

    Args:
        backend: one of `BACKENDS`, installed.
        problem: a `Problem`.

    Returns:
        precision `[IoU, recall, class, area, max detections]`,
        recall `[IoU, class, area, max detections]`
    """
    # They print, and the libraries do not let it be switched off.
    with contextlib.redirect_stdout(io.StringIO()):
        if backend == "hotcoco":
            evaluation = _prepare_hotcoco(problem)
        elif backend == "faster_coco_eval":
            evaluation = _prepare_faster_coco_eval(problem)
        else:
            evaluation = _prepare_pycocotools(problem)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _prepare_hotcoco(problem):
    from hotcoco import COCO, COCOeval

    truth = COCO(problem.truth)
    # An array instead of half a million dicts; for boxes it says all there is to say.
    found = truth.load_res(problem.rows) if problem.task == "bbox" else COCO(_found(problem))
    evaluation = COCOeval(truth, found, problem.task)
    evaluation.params.img_ids = problem.image_ids
    evaluation.params.kpt_oks_sigmas = problem.sigmas
    return evaluation


def _prepare_faster_coco_eval(problem):
    from faster_coco_eval import COCO, COCOeval_faster

    truth, found = COCO(problem.truth), COCO(_found(problem))
    evaluation = COCOeval_faster(truth, found, problem.task, kpt_oks_sigmas=problem.sigmas)
    evaluation.params.imgIds = problem.image_ids
    # For keypoints it would leave out classes that nobody annotated.
    evaluation.params.catIds = sorted(truth.cats)
    return evaluation


def _prepare_pycocotools(problem):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset, found.dataset = problem.truth, _found(problem)
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, problem.task)
    evaluation.params.imgIds = problem.image_ids
    evaluation.params.kpt_oks_sigmas = np.array(problem.sigmas)
    return evaluation


def _found(problem):
    """The detections as a dataset."""
    rows = zip(problem.rows.tolist(), problem.areas.tolist(), strict=True)
    annotations = [
        {
            "id": i,
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "bbox": row[1:5],
            "score": row[5],
            "area": area,
            "iscrowd": 0,
        }
        for i, (row, area) in enumerate(rows, start=1)
    ]
    if problem.shapes is not None:
        key = "segmentation" if problem.task == "segm" else "keypoints"
        for annotation, shape in zip(annotations, problem.shapes, strict=True):
            annotation[key] = shape
    return {**problem.truth, "annotations": annotations}
