"""What a model is made of and costs, against numbers known by hand, and the script as a user runs it."""

import json

import pytest
import torch
from model_helpers import ARCHITECTURES, build, two_squares
from processes import ROOT
from script_helpers import assert_refused, script_output
from torch import nn

from plaintrain.analysis import model as model_analysis

QUICKSTART, SSDLITE = (ROOT / "configs" / name for name in ("quickstart.yaml", "shapes/ssdlite.yaml"))
GOLDEN = json.loads((ROOT / "tests" / "golden" / "parameters.json").read_text())


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()])
        self.last = nn.Linear(4, 2)
        self.last.weight.requires_grad_(False)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images)
        return {"scores": self.last(images.mean(dim=(2, 3)))}


def test_numbers_of_small_modules_by_hand():
    model, images = _Small(), torch.rand(2, 3, 5, 6)
    flops = model_analysis.count_flops(model, lambda: model(images))
    # 30 locations, 27 products for each of 4 channels; 4 products for each of 2 outputs; of 2 images.
    conv, linear = 2 * 2 * 30 * 27 * 4, 2 * 2 * 4 * 2
    assert flops[""] == conv + linear and flops["last"] == linear
    outputs = model_analysis.count_outputs(model, lambda: model(images))
    assert outputs == {"stages.0": (240, 960), "stages.1": (240, 960), "last": (4, 16)}
    rows = {row["name"]: row for row in model_analysis.compute_module_costs(model, 2, flops, outputs)}
    assert list(rows) == ["", "stages", "stages.0", "stages.1", "last"]
    # A list of modules is never called; it has what its members have.
    assert rows["stages"]["flops"] == conv and rows["stages"]["activations"] == 480
    assert rows[""]["parameters"] == 112 + 10 and rows[""]["activation_bytes"] == 1936
    assert (rows["last"]["trainable"], rows["last"]["frozen"]) == (2, 8)
    assert [row["name"] for row in model_analysis.compute_module_costs(model, 0, flops, outputs)] == [""]
    model, images = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.ReLU()), torch.rand(16, 8)
    # Saved are the input of the first, and the outputs of both ReLUs.
    assert model_analysis.count_saved_bytes(model, lambda: model(images)) == 3 * 16 * 8 * 4


def test_memory_of_weights_gradients_and_the_optimizer():
    found = model_analysis.estimate_training_memory(_Small(), 1000, 2, averaged=True)
    weights, trainable = 4 * 122, 4 * 114
    expected = {"weights": weights, "averaged": weights, "activations": 1000}
    expected |= {"gradients": trainable, "optimizer": 2 * trainable}
    assert found == expected | {"total": sum(expected.values())}


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_keypoint_rcnn", "ssd"])
def test_every_kind_of_model_is_analysed(name):
    model = build(*ARCHITECTURES[name])
    found = model_analysis.analyze_model(model, two_squares(), depth=1)
    whole, *parts = found["modules"]
    assert whole["parameters"] == sum(part["parameters"] for part in parts)
    assert 0 < whole["flops"] == found["flops"]["inference"]
    # A backward pass has about twice the products of the forward pass.
    assert 2 < found["flops"]["training_step"] / found["flops"]["training_forward"] < 3.2
    assert found["memory"]["activations"] > 0


@pytest.mark.parametrize(
    ("config", "opts", "copies"),
    [
        ("quickstart", ["SOLVER.OPTIMIZER", "AdamW"], 2),
        ("shapes/keypoint_rcnn", ["SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.9], 1),
        ("shapes/mask_rcnn", ["SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0], 0),
    ],
)
def test_script_writes_a_table_and_json(tmp_path, config, opts, copies):
    config, file = f"configs/{config}.yaml", tmp_path / "found.json"
    options = ["--size", "64x96", "--batch", 1, "--depth", 1, "--output", file]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", 3, *opts]
    output = script_output("analyze_model.py", "--config-file", ROOT / config, *options, folder=tmp_path)
    found = json.loads(file.read_text())
    assert found["modules"][0]["parameters"] == GOLDEN[config] and found["size"] == [64, 96]
    assert found["memory"]["optimizer"] == copies * found["memory"]["gradients"]
    for words in (f"{GOLDEN[config]:,}", "not norms", "roi_heads", str(file)):
        assert words in output
    assert "box_head" not in output


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config-file", QUICKSTART, "--size", "64"], "--size must be HEIGHTxWIDTH"),
        (["--config-file", QUICKSTART, "--batch", "0"], "--batch at least 1"),
        (["--config-file", QUICKSTART, "--size", "16x64"], "image size must be at least 32x32"),
        (["--config-file", SSDLITE, "--size", "64x64"], "must be INPUT.FIXED_SIZE (128, 128) for SSD"),
    ],
)
def test_script_answers_mistakes_in_a_sentence(tmp_path, args, words):
    assert_refused("analyze_model.py", args, words, tmp_path)
