"""Detectron2's names and orders: plaintrain.checkpoint.detectron2 and scripts/convert_weights.py."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from model_helpers import KEYPOINT, MASK, PROPOSALS, RCNN_V2, RESNET18, RETINANET18, SMALL_HEAD, K, build
from processes import run_script
from torchvision.models.detection.anchor_utils import AnchorGenerator

from plaintrain.checkpoint.detectron2 import (
    convert_from_detectron2,
    convert_to_detectron2,
    count_anchors,
    is_detectron2,
)
from plaintrain.checkpoint.pretrained import load_weights
from plaintrain.modeling.anchors import DefaultAnchorGenerator
from plaintrain.utils.errors import UserError

RCNN = (
    *RESNET18, *SMALL_HEAD, *MASK, *KEYPOINT,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 4, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8] * 8,
)  # fmt: skip
MODELS = {
    "rcnn": RCNN,
    "retinanet": RETINANET18,
    "rpn": (*RESNET18, *PROPOSALS),
    "rcnn v2": RCNN_V2,
    "retinanet v2": (*RETINANET18, "MODEL.RETINANET.NORM", "GN", "MODEL.FPN.P6_IN_FEATURE", "res5"),
}
# Some of Detectron2's names of each model, and torchvision's.
NAMES = yaml.safe_load((Path(__file__).parent / "golden" / "detectron2_names.yaml").read_text())


def clones(state):
    return {name: value.clone() for name, value in state.items()}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_detectron2_and_round_trips_exact(model):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in build(*MODELS[model]).state_dict().items()
    }
    before = clones(state)
    there = convert_to_detectron2(state)
    position = {name: i for i, name in enumerate(state)}
    for name, here in NAMES[model].items():
        assert list(there)[position[here]] == name
    assert is_detectron2(there) and not is_detectron2(state)
    copies = clones(there)
    back = convert_from_detectron2(there)
    # Box and mask of the background, which torchvision never uses, are lost.
    expected = clones(state)
    for layer, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
        for name in expected:
            if layer in name:
                expected[name][:rows] = 0
    assert_equal(back, expected)
    assert_equal(convert_to_detectron2(back), there)
    # The arguments are not changed.
    assert_equal(state, before)
    assert_equal(there, copies)


def test_background_is_last_in_detectron2_and_first_in_torchvision():
    there = {
        "roi_heads.box_head.fc1.bias": torch.zeros(2),
        # Classes 0, 1, 2 and the background.
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([10.0, 11, 12, 99]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0) + 1,
        "roi_heads.mask_head.predictor.weight": torch.tensor([20.0, 21, 22]).view(3, 1, 1, 1),
    }
    *_, scores, deltas, masks = convert_from_detectron2(there).values()
    assert scores.tolist() == [99, 10, 11, 12]
    assert deltas.tolist() == [0] * 4 + list(range(1, 13))
    assert masks.flatten().tolist() == [0, 20, 21, 22]
    # Boxes and masks for all classes at once keep their rows.
    there = {
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(4),
        "roi_heads.box_predictor.bbox_pred.bias": torch.zeros(4),
        "roi_heads.mask_head.predictor.bias": torch.zeros(1),
    }
    assert [len(value) for value in convert_from_detectron2(there).values()] == [4, 4, 1]


@pytest.mark.parametrize(
    "generator",
    [
        AnchorGenerator(((32, 64, 128),), ((0.5, 1.0, 2.0),)),
        DefaultAnchorGenerator(((32, 64, 128),), ((0.5, 2.0),), [8]),
    ],
)
def test_anchors_keep_their_trained_channels(generator):
    (sizes,), (ratios,) = generator.sizes, generator.aspect_ratios
    # Detectron2 counts its anchors size by size.
    places = torch.cartesian_prod(torch.arange(len(sizes)), torch.arange(len(ratios)), torch.arange(4))
    there = {
        "head.cls_subnet.0.weight": torch.zeros(1),
        "head.cls_score.bias": places[places[:, 2] < K].float(),
        "head.bbox_pred.bias": places.float(),
    }
    there["head.cls_score.weight"] = there["head.cls_score.bias"].view(-1, 1, 1, 3)
    here = convert_from_detectron2(there, num_ratios=len(ratios))
    generator.set_cell_anchors(torch.float32, "cpu")
    for a, (x1, y1, x2, y2) in enumerate(generator.cell_anchors[0].tolist()):
        width, height = x2 - x1, y2 - y1
        size = min(range(len(sizes)), key=lambda i: abs((width * height) ** 0.5 - sizes[i]))
        ratio = min(range(len(ratios)), key=lambda j: abs(height / width - ratios[j]))
        for k in range(K):
            row = [size, ratio, k]
            assert here["head.classification_head.cls_logits.bias"][a * K + k].tolist() == row
            assert here["head.classification_head.cls_logits.weight"][a * K + k].flatten().tolist() == row
        for c in range(4):
            assert here["head.regression_head.bbox_reg.bias"][a * 4 + c].tolist() == [size, ratio, c]
    back = convert_to_detectron2({n: v for n, v in here.items() if "logits" in n or "reg" in n}, len(ratios))
    assert_equal(back, {n: v for n, v in there.items() if "subnet" not in n})
    # Anchors that the ratios do not divide keep their order.
    there = {
        "proposal_generator.rpn_head.objectness_logits.bias": torch.arange(5.0),
        "proposal_generator.rpn_head.anchor_deltas.bias": torch.arange(20.0),
    }
    here = convert_from_detectron2(there, num_ratios=3)
    assert count_anchors(here) == {"rpn.head.cls_logits": 5, "rpn.head.bbox_pred": 5}
    assert here["rpn.head.cls_logits.bias"].tolist() == list(range(5))


def test_buffers_are_dropped_unknown_names_kept_and_other_projects_not_recognized():
    there = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.zeros(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "anchor_generator.cell_anchors.4": torch.zeros(3, 4),
        "sem_seg_head.predictor.weight": torch.zeros(1),
        "backbone.fpn_lateral5.weight": torch.zeros(1),
    }
    here = convert_from_detectron2(there)
    assert list(here) == ["sem_seg_head.predictor.weight", "backbone.fpn.inner_blocks.3.0.weight"]
    for name in ("stem.conv1.weight", "backbone.stem.conv1.weight", "conv1_w"):
        assert is_detectron2({name: torch.zeros(1)})
        assert list(convert_from_detectron2({name: torch.zeros(1)})) == ["backbone.body.conv1.weight"]
    for name in ("conv1.weight", "features.0.weight", "roi_heads.mask_head.mask_fcn1.weight"):
        assert not is_detectron2({name: torch.zeros(1)})


def test_models_that_detectron2_does_not_have_are_rejected():
    names = ["rpn.head.bbox_pred.bias", "backbone.body.0.0.weight", "head.regression_head.bbox_ctrness.bias"]
    with pytest.raises(UserError, match=r"no counterpart of backbone\.body\.0\.0\.weight \(2 such names\)"):
        convert_to_detectron2({name: torch.zeros(4) for name in names})


def convert(folder, source, output, to, *options):
    paths = folder / source, folder / output
    return run_script("convert_weights.py", *paths, "--to", to, *options, folder=folder)


def test_converted_files_hold_the_same_weights_in_both_directions(tmp_path):
    model = build(*RESNET18, *SMALL_HEAD, *MASK)
    state = clones(model.state_dict())
    torch.save({"model": state, "iteration": 7}, tmp_path / "run.pth")
    done = convert(tmp_path, "run.pth", "there.pkl", "detectron2")
    assert done.code == 0, done.output
    assert "there.pkl" in done.output and f"{len(state)} tensors" in done.output
    assert convert(tmp_path, "there.pkl", "here.pth", "torchvision").code == 0
    content = pickle.loads((tmp_path / "there.pkl").read_bytes())  # noqa: S301 - written by this test
    # Detectron2 matches by exact name only with an author and without heuristics.
    assert content["__author__"] and not content["matching_heuristics"]
    arrays = content["model"]
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    scores = state["roi_heads.box_predictor.cls_score.bias"].numpy()
    np.testing.assert_array_equal(arrays["roi_heads.box_predictor.cls_score.bias"], np.roll(scores, -1))
    assert arrays["roi_heads.box_predictor.bbox_pred.bias"].shape == (12,)
    assert arrays["roi_heads.mask_head.predictor.bias"].shape == (3,)
    assert list(torch.load(tmp_path / "here.pth")["model"]) == list(state)
    for name in ("here.pth", "there.pkl"):
        load_weights(model, str(tmp_path / name))
        for key, value in model.state_dict().items():
            # The background's rows are not kept.
            rows = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
            start = rows.get(".".join(key.split(".")[1:3]), 0)
            assert value[start:].equal(state[key][start:]) if value.dim() else value.equal(state[key]), key
    tensors = {"rpn.head.bbox_pred.bias": torch.arange(24.0), "rpn.head.cls_logits.bias": torch.arange(6.0)}
    torch.save(tensors, tmp_path / "source.pth")
    assert convert(tmp_path, "source.pth", "out.pth", "detectron2", "--num-ratios", 2).code == 0
    # 2 ratios with 3 sizes each become 3 sizes with 2 ratios each.
    scores = torch.load(tmp_path / "out.pth")["model"]["proposal_generator.rpn_head.objectness_logits.bias"]
    assert scores.tolist() == [0, 3, 1, 4, 2, 5]


RPN = {"rpn.head.conv.0.0.weight": torch.ones(1)}


@pytest.mark.parametrize(
    ("content", "output", "to", "words"),
    [
        (None, "o.pth", "torchvision", ["source.pth", "no such file"]),
        (b"no pickle", "o.pth", "torchvision", ["cannot read"]),
        ({}, "o.pth", "torchvision", ["holds no weights"]),
        ({"features.0.0.weight": torch.ones(1)}, "o.pkl", "detectron2", ["no counterpart", "features"]),
        (RPN, "o.npz", "detectron2", ["o.npz", ".pkl"]),
        (RPN, "o.pkl", "torchvision", ["o.pkl", ".pth"]),
        ({"rpn.head.bbox_pred.bias": torch.ones(20)}, "o.pkl", "detectron2", ["5", "--num-ratios"]),
        (RPN, "source.pth/o.pth", "torchvision", ["source.pth/o.pth: Not a directory"]),
    ],
)
def test_files_that_cannot_be_converted_are_rejected_without_a_traceback(
    tmp_path, content, output, to, words
):
    source = tmp_path / "source.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    done = convert(tmp_path, "source.pth", output, to)
    assert done.code == 1 and "Traceback" not in done.output
    assert len(done.output.splitlines()) == 1 and all(word in done.output for word in words)
    assert not (tmp_path / output).exists()
