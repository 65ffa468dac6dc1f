"""The configs of configs/torchvision, held against torchvision's models of the same names and weights."""

import io
import math
from pathlib import Path

import pytest
import torch
from model_helpers import (
    KEYPOINTS,
    K,
    assert_same_detections,
    initialise_at_most,
    make_overrides,
    make_sample,
    randomize_predictions,
)
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "torchvision"

# torchvision's name -> label of the first class, size of the images, arguments of `build_pair`: eps of the
# frozen norms, which is 0 for torchvision's first COCO weights, and arguments of torchvision's function.
ARCHITECTURES = {
    "fasterrcnn_resnet50_fpn": (1, (96, 128), {"eps": 0.0}),
    "fasterrcnn_resnet50_fpn_v2": (1, (96, 128), {}),
    "fasterrcnn_mobilenet_v3_large_fpn": (1, (96, 128), {"eps": 1e-5}),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (1, (96, 128), {"eps": 1e-5}),
    "maskrcnn_resnet50_fpn": (1, (96, 128), {"eps": 0.0}),
    "maskrcnn_resnet50_fpn_v2": (1, (96, 128), {}),
    "keypointrcnn_resnet50_fpn": (1, (96, 128), {"eps": 0.0, "num_keypoints": KEYPOINTS}),
    "retinanet_resnet50_fpn": (0, (96, 128), {"eps": 0.0}),
    "retinanet_resnet50_fpn_v2": (0, (96, 128), {}),
    "fcos_resnet50_fpn": (0, (96, 128), {"eps": 1e-5}),
    "ssd300_vgg16": (1, (300, 300), {}),
    "ssdlite320_mobilenet_v3_large": (1, (320, 320), {}),
}
# Second variants of what the fast set compares.
LONG = ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn_v2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in ARCHITECTURES]
)
def test_a_config_has_torchvisions_settings_and_detections(name):
    label_offset, size, arguments = ARCHITECTURES[name]
    model, plain = build_pair(name, size, label_offset, **arguments)
    different = different_settings(model, plain)
    if "mobilenet_v3_large_" in name and "rcnn" in name:
        # torchvision's names of levels that it does not have.
        assert different.pop("roi_heads.box_roi_pool.featmap_names")
    if "mask" in name:
        assert different.pop("roi_heads.masks_aligned") == (False, None)
    assert not different
    for network in (model, plain):
        # Few, for speed, and whatever their scores.
        heads = network
        if "rcnn" in name:
            heads = network.roi_heads
            network.rpn._pre_nms_top_n["testing"] = network.rpn._post_nms_top_n["testing"] = 40
            network.rpn.score_thresh = 0.0
        heads.score_thresh, heads.topk_candidates, heads.detections_per_img = 0.0, 100, 20
    assert_same_results(model, plain, size, label_offset)


def build_pair(name, size, label_offset, eps=None, **arguments):
    """The model of configs/torchvision and torchvision's, with the same random weights from a file."""
    torch.manual_seed(0)
    with initialise_at_most(10**7):
        plain = getattr(detection, name)(
            weights=None, weights_backbone=None, num_classes=K + label_offset, **arguments
        )
    settle_norms(plain.backbone, torch.rand(2, 3, *size))
    randomize_predictions(plain, spread=0.1)
    if eps is not None:
        freeze_norms(plain.backbone, eps)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    with initialise_at_most(0):
        cfg = get_cfg()
        cfg.merge_from_file(CONFIGS / f"{name}.yaml")
        cfg.merge_from_list(make_overrides())
        model = build_model(cfg)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval(), plain.eval()


def settle_norms(backbone, images):
    """Make the statistics of batch norms those of some images, and small, so that eps matters."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            nn.init.kaiming_normal_(module.weight)
            module.weight.data *= math.sqrt(30 * norms[0].eps)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone.train()(images)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before


def freeze_norms(module, eps):
    """Put frozen batch norms in the place of batch norms, as torchvision does for trained weights."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child, eps)


def read_settings(model):
    """Numbers and strings that a model's modules and their helper objects hold, by dotted name."""
    settings, usual = {}, set(vars(nn.Module()))
    for name, module in model.named_modules():
        if name.split(".")[0] == "transform":
            continue
        for key, value in vars(module).items():
            helper = type(value).__module__.startswith("torchvision.models.detection")
            for inner, leaf in (vars(value) if helper else {"": value}).items():
                if isinstance(leaf, int | float | str | dict | tuple | list) and key not in usual:
                    if isinstance(leaf, tuple | list):
                        leaf = [v.tolist() if isinstance(v, torch.Tensor) else v for v in leaf]
                    settings[".".join(filter(None, [name, key, inner]))] = leaf
    return settings


# What a frozen batch norm does not have, what is there for TorchScript alone, and what is only ours.
OTHER_SETTINGS = (
    "momentum", "affine", "track_running_stats", "num_features", "_has_warned",
    "level_names", "strides", "roi_pool.scales", "roi_pool.aligned",
    "roi_heads.keypoint_loss_weight", "roi_heads.keypoint_score_type", "clips_before_nms", "focal_alpha",
    "focal_gamma", "_loss_type", "box_loss", "loss_weight", "normalizer", "conv1._norm", "conv2._norm",
    "conv3._norm", "0._norm", "._anchors",
)  # fmt: skip


def different_settings(model, plain):
    """{name: (ours, torchvision's)} where the two are not the same."""
    ours, theirs = read_settings(model), read_settings(plain)
    assert len(ours) > 100
    names = [n for n in sorted(ours.keys() | theirs.keys()) if not n.endswith(OTHER_SETTINGS)]
    return {n: (ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)}


def assert_same_results(model, plain, size, label_offset):
    """Compare the detections of two settled models of the same weights, and give the weights back."""
    mean, std = (255 * torch.tensor(v) for v in (plain.transform.image_mean, plain.transform.image_std))
    torch.testing.assert_close(model.transform.mean.flatten(), mean, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(model.transform.std.flatten(), std, rtol=1e-5, atol=1e-3)
    assert model.transform.size_divisible == plain.transform.size_divisible
    # Both normalise alike; now bit for bit.
    model.transform.mean.zero_()
    model.transform.std.fill_(255)
    plain.transform.image_mean, plain.transform.image_std = [0, 0, 0], [1, 1, 1]
    sample = make_sample(*size, seed=4)
    plain.transform.min_size, plain.transform.max_size = (min(size),), 10_000
    with torch.no_grad():
        detections, expected = model([sample]), plain([sample["image"].float() / 255])
    assert expected[0]["scores"].unique().numel() >= 5
    assert_same_detections(detections, expected, label_offset, at_least=5)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    plain.load_state_dict(model.state_dict())
    after = plain.state_dict()
    assert all(after[key].equal(before[key]) for key in before if not key.endswith("num_batches_tracked"))
