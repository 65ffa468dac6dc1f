"""Predictions written by an evaluator and read again; results as JSON; build_evaluator."""

import json
import math

import pytest
import torch
from detection_helpers import random_outputs

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, build_evaluator, read_detections
from plaintrain.evaluation.predictions import get_image_detections
from plaintrain.utils.errors import UserError

FILE = "coco_instances_results.json"
SIGMAS = [0.1] * 4
# A polygon of 10 rows and 15 columns.
BIG = [10, 10, 25, 10, 25, 20, 10, 20]


@pytest.fixture
def shapes():
    """A drawn dataset with masks and keypoints."""
    declare_dataset("drawn", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 6, "HEIGHT": 60, "WIDTH": 90})
    return "drawn"


@pytest.fixture
def declare_pets(tiny_coco):
    """Function (**entries) that declares the COCO file as the dataset pets; returns its folder."""

    def declare(**entries):
        spec = {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": "none"}
        declare_dataset("pets", spec | entries)
        return tiny_coco.json.parent

    return declare


def detections_in(name, parts=("masks", "keypoints")):
    """[([sample], [output])] with some parts of the outputs."""
    keys = ("boxes", "scores", "labels", *parts)
    outputs = random_outputs(name)
    return [([{"image_id": i}], [{key: outputs[i][key] for key in keys}]) for i in outputs]


def score(evaluator, pairs):
    for inputs, outputs in pairs:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def read_as_outputs(path, name):
    """What a model would have returned for each image."""
    detections = read_detections(path, name)
    return [
        get_image_detections(detections, i, 0, record) for i, record in enumerate(DatasetCatalog.get(name))
    ]


def write(folder, detections):
    path = folder / "found.json"
    path.write_text(detections if isinstance(detections, str) else json.dumps(detections))
    return path


@pytest.mark.parametrize(
    ("evaluator_class", "parts", "options"),
    [
        (COCOEvaluator, (), {}),
        (COCOEvaluator, ("masks", "keypoints"), {"kpt_oks_sigmas": SIGMAS}),
        (PascalVOCDetectionEvaluator, ("masks",), {"use_07_metric": True}),
    ],
)
def test_a_file_read_again_gives_the_same_scores(shapes, tmp_path, evaluator_class, parts, options):
    def make_evaluator(folder):
        return evaluator_class(shapes, output_dir=str(tmp_path / folder), **options)

    first = score(make_evaluator("first"), detections_in(shapes, parts))
    again = make_evaluator("again").score(read_detections(tmp_path / "first" / FILE, shapes))
    assert repr(again) == repr(first)
    assert all(5 < metrics["AP"] < 95 for metrics in first.values())
    assert len(first) == 1 + len(parts) or evaluator_class is PascalVOCDetectionEvaluator
    written = (tmp_path / "first" / FILE).read_bytes()
    assert len(json.loads(written)) > 8 and (tmp_path / "again" / FILE).read_bytes() == written
    assert ("segmentation" in json.loads(written)[0]) == ("masks" in parts)


def test_every_image_is_read_once_as_a_model_returns_it(declare_pets):
    rectangle = {"size": [30, 40], "counts": [30 * 4 + 5, 8, 30 * 36 - 13]}
    path = write(
        declare_pets(),
        [
            {"image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4.5], "score": 1, "segmentation": [BIG]},
            {"image_id": 11, "category_id": 7, "score": 0.25, "segmentation": rectangle},
            {"image_id": 2, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5, "segmentation": [BIG]},
        ],
    )
    upright, empty, wide = read_as_outputs(path, "pets")
    assert upright["boxes"].tolist() == [[1, 2, 4, 6.5], [0, 0, 1, 1]]
    assert (upright["scores"].tolist(), upright["labels"].tolist()) == ([1, 0.5], [1, 0])
    assert upright["masks"].shape == (2, 40, 30) and upright["masks"].dtype == torch.bool
    assert upright["masks"][0].nonzero().amax(dim=0).tolist() == [19, 24] and upright["masks"][0].sum() == 150
    # Without a box it has the mask's.
    assert wide["boxes"].tolist() == [[4, 5, 5, 13]] and wide["labels"].tolist() == [2]
    assert wide["masks"].nonzero().tolist() == [[0, y, 4] for y in range(5, 13)]
    assert [tuple(value.shape) for value in empty.values()] == [(0, 4), (0,), (0,), (0, 24, 20)]
    assert empty["boxes"].dtype == torch.float64 and empty["labels"].dtype == torch.int64
    certain = get_image_detections(read_detections(path, "pets"), 0, 0.75, DatasetCatalog.get("pets")[0])
    assert certain["boxes"].equal(upright["boxes"][:1]) and certain["masks"].equal(upright["masks"][:1])


def test_keypoints_are_moved_to_the_centers_of_pixels_and_keep_their_scores(declare_pets):
    detection = {"image_id": 2, "category_id": 5, "score": 0.5, "keypoints": [9, 4, 0.75, 5, 6, 0]}
    path = write(declare_pets(CLASSES=["person"]), [detection])
    outputs = read_as_outputs(path, "pets")
    assert outputs[0]["keypoints"].tolist() == [[[9.5, 4.5, 0.75], [5.5, 6.5, 0]]]
    assert outputs[0]["boxes"].tolist() == [[5, 4, 9, 6]]
    assert len(outputs[1]["keypoints"]) == 0 and "masks" not in outputs[0]


_GOOD = {"image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.9}
_RLE = {"size": [40, 30], "counts": [0, 600, 600]}
_TURNED = {"size": [30, 40], "counts": [0, 600, 600]}
_MISTAKES = {
    "not JSON": ("<html>", r"the results file .*found\.json is not JSON"),
    "not a list": ({"annotations": []}, r"found\.json must hold a list of detections"),
    "numbers": ([1, 2], r"found\.json must hold a list of detections"),
    "image": ([_GOOD, _GOOD | {"image_id": 3}], r"detection 1 in .*, for pets, belongs to image 3"),
    "name of an image": ([_GOOD | {"image_id": "2"}], r"detection 0 in .* belongs to image 2"),
    "no image": ([{"score": 1, "category_id": 5, "bbox": [1] * 4}], r"detection 0 in .* has no image_id"),
    "class": ([_GOOD | {"category_id": 0}], r"for pets, has category_id 0, but .* \[3, 5, 7\]"),
    "no box": ([{"image_id": 2, "category_id": 5, "score": 1}], r"detection 0 in .* has no bbox"),
    "box": ([_GOOD | {"bbox": [1, 2, math.nan, 4]}], r"detection 0 in .* has bbox \[1, 2, nan, 4\]"),
    "negative": ([_GOOD | {"bbox": [9, 2, -3, 4]}], r"has bbox \[9, 2, -3, 4\], whose width or height"),
    "score": ([_GOOD | {"score": math.nan}], r"detection 0 in .*found\.json has the score nan"),
    "some masks": (
        [_GOOD | {"segmentation": _RLE}, _GOOD],
        r"all 2 detections .* have a segmentation, got 1",
    ),
    "turned mask": ([_GOOD | {"segmentation": _TURNED}], r"detection 0 in .* an RLE of the size \[30, 40\]"),
    "some keypoints": ([_GOOD, _GOOD | {"keypoints": [1] * 6}], r"all 2 .* have keypoints, got 1"),
    "keypoints": ([_GOOD | {"keypoints": [1] * 9}], r"detection 0 in .* 9 numbers as keypoints, not 3 x 2"),
    "odd keypoints": ([_GOOD | {"keypoints": [1, 1, None] * 2}], r"keypoints that are not finite numbers"),
}


@pytest.mark.parametrize("case", _MISTAKES)
def test_mistakes_in_a_file_are_named(declare_pets, case):
    content, words = _MISTAKES[case]
    path = write(declare_pets(), content)
    with pytest.raises(UserError, match=words):
        read_detections(path, "pets")


def test_missing_files_and_other_numbers_of_keypoints_are_named(declare_pets):
    folder = declare_pets()
    with pytest.raises(UserError, match=r"cannot read the results file .*nowhere\.json: No such file"):
        read_detections(folder / "nowhere.json", "pets")
    MetadataCatalog.get("pets").set(keypoint_names=None)
    path = write(folder, [_GOOD | {"keypoints": [1] * 6}, _GOOD | {"keypoints": [1] * 9}])
    with pytest.raises(UserError, match=r"found\.json have different numbers of keypoints"):
        read_detections(path, "pets")


def test_the_evaluator_is_chosen_by_the_dataset_and_the_model(shapes):
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    found = detections_in(shapes)
    results = score(build_evaluator(cfg, shapes), found)
    assert list(results) == ["bbox", "segm", "keypoints"]
    MetadataCatalog.get(shapes).set(evaluator_type="pascal_voc")
    assert isinstance(build_evaluator(cfg, shapes), PascalVOCDetectionEvaluator)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert list(score(build_evaluator(cfg, shapes), found)) == ["box_proposals"]
