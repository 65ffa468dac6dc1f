"""scripts/convert_weights.py."""

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.utils.errors import UserError
from plaintrain.weights import load_weights

torch.set_num_threads(1)

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "convert_weights.py"
_SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ROI_HEADS.NUM_CLASSES", 2,
    "MODEL.RETINANET.NUM_CLASSES", 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.MASK_ON", True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
]  # fmt: skip


def make_model():
    cfg = get_cfg()
    cfg.merge_from_list(_SMALL)
    return build_model(cfg)


def load_script():
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(source, output, to, num_ratios=3):
    args = SimpleNamespace(source=str(source), output=str(output), to=to, num_ratios=num_ratios)
    load_script().main(args)


def run(*args):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )


def read_array_file(path):
    with open(path, "rb") as f:
        return pickle.load(f)  # noqa: S301 - written by this test


def test_there_and_back_the_files_hold_the_same(tmp_path):
    model = make_model()
    torch.save({"model": model.state_dict(), "iteration": 7}, tmp_path / "run.pth")
    done = run(tmp_path / "run.pth", tmp_path / "there.pkl", "--to", "detectron2")
    assert done.returncode == 0, done.stderr
    assert "there.pkl" in done.stdout and f"{len(model.state_dict())} tensors" in done.stdout

    content = read_array_file(tmp_path / "there.pkl")
    # Detectron2 matches by exact name only with an author and without heuristics.
    assert content["__author__"] and not content["matching_heuristics"]
    arrays = content["model"]
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    scores = model.roi_heads.box_predictor.cls_score.bias.detach().numpy()
    np.testing.assert_array_equal(arrays["roi_heads.box_predictor.cls_score.bias"], np.roll(scores, -1))
    assert arrays["roi_heads.box_predictor.bbox_pred.bias"].shape == (8,)
    assert arrays["roi_heads.mask_head.predictor.bias"].shape == (2,)

    convert(tmp_path / "there.pkl", tmp_path / "here.pth", "torchvision")
    here = torch.load(tmp_path / "here.pth", weights_only=True)["model"]
    assert list(here) == list(model.state_dict())
    convert(tmp_path / "here.pth", tmp_path / "again.pth", "detectron2")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert list(again) == list(arrays)
    for name, value in again.items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])

    for name in ("here.pth", "there.pkl", "again.pth"):
        loaded = make_model()
        load_weights(loaded, str(tmp_path / name))
        for key, value in loaded.state_dict().items():
            rows = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(key.split(".")[-2], 0)
            rows = 0 if key.startswith("rpn.") else rows
            assert value[rows:].equal(model.state_dict()[key][rows:]), key


@pytest.mark.parametrize(
    ("content", "args", "words"),
    [
        (None, ["o.pth", "torchvision"], ["no such file"]),
        (b"no pickle", ["o.pth", "torchvision"], ["cannot read"]),
        ({}, ["o.pth", "torchvision"], ["holds no weights"]),
        (
            {"features.0.0.weight": torch.ones(1)},
            ["o.pkl", "detectron2"],
            ["no counterpart", "features"],
        ),
        ({"rpn.head.conv.0.0.weight": torch.ones(1)}, ["o.npz", "detectron2"], ["o.npz", ".pkl"]),
        ({"rpn.head.conv.0.0.weight": torch.ones(1)}, ["o.pkl", "torchvision"], ["o.pkl", ".pth"]),
        ({"rpn.head.bbox_pred.bias": torch.ones(20)}, ["o.pkl", "detectron2"], ["5", "--num-ratios"]),
        ({"x": torch.ones(1)}, ["missing/o.pth", "torchvision"], ["missing"]),
    ],
    ids=["absent", "damaged", "empty", "stranger", "ending", "pkl", "anchors", "folder"],
)
def test_what_cannot_be_converted_is_one_clear_sentence(tmp_path, content, args, words):
    source = tmp_path / "source.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / args[0], args[1])
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / args[0]).exists()


def test_the_number_of_ratios_can_be_given(tmp_path):
    tensors = {"rpn.head.bbox_pred.bias": torch.arange(24.0), "rpn.head.cls_logits.bias": torch.arange(6.0)}
    torch.save(tensors, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out.pth", "detectron2", num_ratios=2)
    there = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    # 2 ratios with 3 sizes each become 3 sizes with 2 ratios each.
    assert there["proposal_generator.rpn_head.objectness_logits.bias"].tolist() == [0, 3, 1, 4, 2, 5]


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    done = run(tmp_path / "absent.pth", tmp_path / "out.pth", "--to", "torchvision")
    assert done.returncode != 0
    assert "absent.pth" in done.stderr and "Traceback" not in done.stderr
