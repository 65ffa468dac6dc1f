"""Frozen numbers: the parameters of every config, and ten losses of each architecture.

`python tests/test_golden.py` writes them anew, after a change that is meant.
"""

import json
from pathlib import Path

import pytest
import torch

from plaintrain.config import get_cfg, get_value
from plaintrain.modeling import build_model
from plaintrain.modeling.build import get_num_classes_key
from plaintrain.solver import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PARAMETERS = Path(__file__).parent / "golden" / "parameters.json"
LOSSES = Path(__file__).parent / "golden" / "losses.json"
# Another processor or library rounds differently, and ten steps let that grow.
TOLERANCE = 0.02
# The number of classes that the datasets of a folder have; 3 elsewhere.
CLASSES = {"COCO": 80, "PascalVOC": 20, "Detectron2": 80, "torchvision": 80, "Base": 80}

ARCHITECTURES = {
    "faster_rcnn": ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
    "mask_rcnn": ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16],
    "keypoint_rcnn": [
        *["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4],
        *["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 16]],
    ],
    "proposals": ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
    "retinanet": ["MODEL.META_ARCHITECTURE", "RetinaNet"],
    "fcos": ["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]],
    "ssdlite": [
        *["MODEL.META_ARCHITECTURE", "SSD", "MODEL.SSD.HEAD_NAME", "SSDLiteHead"],
        *["INPUT.FIXED_SIZE", (64, 64), "MODEL.SSD.ASPECT_RATIOS", [[2]], "MODEL.SSD.STEPS", []],
        *["MODEL.SSD.SCALES", [0.3, 0.6]],
    ],
}


def golden_cfg(overrides):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_tiny_backbone"])
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TINY.CHANNELS", [8, 16, 16]])
    cfg.merge_from_list(["MODEL.TINY.OUT_CHANNELS", 32, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50])
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.002, *overrides])
    cfg.merge_from_list([get_num_classes_key(cfg), 3])
    return cfg


def golden_samples():
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(2):
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        masks[0, 6:30, 4:36], masks[1, 20:60, 30:62] = 1, 1
        target = {
            "boxes": torch.tensor([[4.0, 6, 36, 30], [30, 20, 62, 60]]),
            "labels": torch.tensor([0, 2]),
            "masks": masks,
            "keypoints": torch.tensor([[[9.0, 9, 2], [20, 20, 1], [30, 25, 2], [0, 0, 0]]] * 2),
        }
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "height": 64, "width": 64, "target": target})
    return samples


def ten_losses(overrides):
    cfg = golden_cfg(overrides)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    losses = []
    for _ in range(10):
        loss = sum(model(golden_samples()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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
    # The widths of SSD's levels are found out by running the backbone.
    device = "cpu" if get_value(cfg, "MODEL.META_ARCHITECTURE") == "SSD" else "meta"
    cfg.merge_from_list([get_num_classes_key(cfg), classes, "MODEL.DEVICE", device])
    with torch.device(device):
        return sum(p.numel() for p in build_model(cfg).parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_the_number_of_parameters_of_every_config(path):
    golden = json.loads(PARAMETERS.read_text())
    assert count_parameters(path) == golden[path.relative_to(ROOT).as_posix()]
    # No config is gone.
    assert golden.keys() == {p.relative_to(ROOT).as_posix() for p in CONFIGS}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ten_losses_of_one_seed(name):
    golden = json.loads(LOSSES.read_text())[name]
    assert ten_losses(ARCHITECTURES[name]) == pytest.approx(golden, rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = {path.relative_to(ROOT).as_posix(): count_parameters(path) for path in CONFIGS}
    PARAMETERS.write_text(json.dumps(counts, indent=1) + "\n")
    losses = {name: [round(v, 5) for v in ten_losses(overrides)] for name, overrides in ARCHITECTURES.items()}
    LOSSES.write_text(json.dumps(losses) + "\n")
