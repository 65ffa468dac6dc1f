"""scripts/convert_weights.py."""

import pickle

import numpy as np
import pytest
import torch
from processes import run_script

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.weights import load_weights

torch.set_num_threads(1)

_SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
]  # fmt: skip


def convert(folder, source, output, to, *options):
    paths = folder / source, folder / output
    return run_script("convert_weights.py", *paths, "--to", to, *options, folder=folder)


def load(path):
    return torch.load(path, weights_only=True)["model"]


def test_converted_files_hold_the_same_weights_in_both_directions(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(_SMALL)
    model = build_model(cfg)
    state = {name: value.clone() for name, value in model.state_dict().items()}
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
    assert arrays["roi_heads.box_predictor.bbox_pred.bias"].shape == (8,)
    assert arrays["roi_heads.mask_head.predictor.bias"].shape == (2,)
    assert list(load(tmp_path / "here.pth")) == list(state)
    for name in ("here.pth", "there.pkl"):
        load_weights(model, str(tmp_path / name))
        for key, value in model.state_dict().items():
            # The background's rows are not kept.
            rows = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
            start = rows.get(".".join(key.split(".")[1:3]), 0)
            assert value[start:].equal(state[key][start:]) if value.dim() else value.equal(state[key]), key


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
        (RPN, "missing/o.pth", "torchvision", ["missing"]),
    ],
    ids=["absent", "damaged", "empty", "unknown names", "ending", "pkl", "anchors", "folder"],
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


def test_the_number_of_ratios_is_an_option(tmp_path):
    tensors = {"rpn.head.bbox_pred.bias": torch.arange(24.0), "rpn.head.cls_logits.bias": torch.arange(6.0)}
    torch.save(tensors, tmp_path / "source.pth")
    assert convert(tmp_path, "source.pth", "out.pth", "detectron2", "--num-ratios", 2).code == 0
    # 2 ratios with 3 sizes each become 3 sizes with 2 ratios each.
    scores = load(tmp_path / "out.pth")["proposal_generator.rpn_head.objectness_logits.bias"]
    assert scores.tolist() == [0, 3, 1, 4, 2, 5]
