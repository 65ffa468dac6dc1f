"""Frozen numbers: the parameters of every config, and ten losses of each architecture.

`python tests/test_golden.py` writes them anew, after a change that is meant.
"""

import json
from pathlib import Path

import pytest
import torch
from model_helpers import ARCHITECTURES, build, initialise_at_most, make_cfg, two_squares

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.modeling.build import num_classes_key
from plaintrain.solver import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PARAMETERS = Path(__file__).parent / "golden" / "parameters.json"
LOSSES = Path(__file__).parent / "golden" / "losses.json"
# Another processor or library rounds differently, and ten steps let that grow.
TOLERANCE = 0.02
# The number of classes that the datasets of a folder have; 3 elsewhere.
CLASSES = {"COCO": 80, "PascalVOC": 20, "Detectron2": 80, "torchvision": 80, "Base": 80}


def ten_losses(overrides):
    overrides = (*overrides, "SOLVER.BASE_LR", 0.002, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50)
    model = build(*overrides)
    optimizer = build_optimizer(make_cfg(*overrides), model)
    losses = []
    for _ in range(10):
        loss = sum(model(two_squares()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    return losses


def count_parameters(path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    family = path.relative_to(ROOT / "configs").as_posix()
    classes = next((n for prefix, n in CLASSES.items() if family.startswith(prefix)), 3)
    keypoints = 17 if classes == 80 else 4
    if cfg.MODEL.KEYPOINT_ON:
        classes = 1 if classes == 80 else classes
        cfg.merge_from_list(["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", keypoints])
    # The widths of SSD's levels are inferred by running the backbone, which the meta device cannot do.
    device = "cpu" if cfg.MODEL.META_ARCHITECTURE == "SSD" else "meta"
    cfg.merge_from_list([num_classes_key(cfg), classes, "MODEL.DEVICE", device])
    with torch.device(device), initialise_at_most(0):
        return sum(p.numel() for p in build_model(cfg).parameters())


def test_the_number_of_parameters_of_every_config():
    counts = {path.relative_to(ROOT).as_posix(): count_parameters(path) for path in CONFIGS}
    assert counts == json.loads(PARAMETERS.read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ten_losses_of_one_seed(name):
    expected = json.loads(LOSSES.read_text())[name]
    assert ten_losses(ARCHITECTURES[name]) == pytest.approx(expected, rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = {path.relative_to(ROOT).as_posix(): count_parameters(path) for path in CONFIGS}
    PARAMETERS.write_text(json.dumps(counts, indent=1) + "\n")
    LOSSES.write_text(json.dumps({name: ten_losses(ARCHITECTURES[name]) for name in ARCHITECTURES}) + "\n")
