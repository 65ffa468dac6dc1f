"""Names of other projects' backbones and of older torchvision: plaintrain.weight_names."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import detection, mobilenet_v3_large, mobilenet_v3_small
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.models.vgg import make_layers

from plaintrain.weight_names import match_names, translate

torch.set_num_threads(1)


def assert_shares(found, extractor, names):
    """Under `names`, all of which exist, stand the tensors that the extractor's modules hold."""
    state = {f"backbone.{name}": value for name, value in extractor.state_dict().items()}
    assert names <= set(state) and names
    for name in names:
        assert found[name].data_ptr() == state[name].data_ptr(), name


def prefixed(prefix, module):
    return {prefix + name: value for name, value in module.state_dict().items()}


# ---- backbones ---------------------------------------------------------------------------------


def test_vgg_goes_into_both_parts_of_ssds_extractor():
    features = make_layers([4, 4, "M", 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M"])
    # The whole network's shape decides where it is cut, its widths do not.
    tensors = prefixed("features.", features) | {"classifier.0.weight": torch.zeros(1)}
    extractor = SSDFeatureExtractorVGG(features, highres=False)
    wanted = {f"backbone.{name}" for name in extractor.state_dict()}
    found = match_names(tensors, wanted)
    # fc6 and fc7, as convolutions, are new.
    places = {n for n in wanted if n.startswith(("backbone.features.", "backbone.extra.0."))}
    places = {n for n in places if not n.startswith("backbone.extra.0.7.")}
    assert set(found) & wanted == places
    assert len(places) == len(tensors) - 1
    assert_shares(found, extractor, places)


def test_mobilenet_goes_into_both_parts_of_ssdlites_extractor():
    network = mobilenet_v3_large(width_mult=0.25)
    tensors = prefixed("", network)
    extractor = SSDLiteFeatureExtractorMobileNet(
        network.features, 13, functools.partial(nn.BatchNorm2d, eps=0.001)
    )
    wanted = {f"backbone.{name}" for name in extractor.state_dict()}
    found = match_names(tensors, wanted)
    places = {name for name in wanted if name.startswith("backbone.features.")}
    assert set(found) & wanted == places
    assert len(places) == sum(name.startswith("features.") for name in tensors)
    assert_shares(found, extractor, places)


@pytest.mark.parametrize("prefix", ["", "backbone.", "features.", "backbone.features."])
def test_a_backbone_goes_into_an_fpns_body(prefix):
    wanted = {"backbone.body.0.0.weight", "backbone.body.layer1.0.conv1.weight", "backbone.fpn.x"}
    tensors = {f"{prefix}0.0.weight": 1, f"{prefix}layer1.0.conv1.weight": 2, f"{prefix}fc.bias": 3}
    found = match_names(tensors, wanted)
    assert found == {
        "backbone.body.0.0.weight": 1,
        "backbone.body.layer1.0.conv1.weight": 2,
        "backbone.body.fc.bias": 3,
    }


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model."])
def test_wrappers_leave_no_trace(prefix):
    tensors = {f"{prefix}backbone.body.conv1.weight": 1, f"{prefix}rpn.head.cls_logits.bias": 2}
    found, of_detectron2 = translate(tensors, 3)
    assert found == {"backbone.body.conv1.weight": 1, "rpn.head.cls_logits.bias": 2}
    assert not of_detectron2
    there = {f"{prefix}backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}
    found, of_detectron2 = translate(there, 3)
    assert list(found) == ["backbone.body.conv1.weight"] and of_detectron2


# ---- timm --------------------------------------------------------------------------------------


def to_timm(name):
    """torchvision's name in MobileNetV3 -> timm's, for the blocks that `TIMM_STAGES` describes."""
    parts = name.split(".")
    block, rest = int(parts[1]), parts[2:]
    if block == 0:
        return {"0": "conv_stem", "1": "bn1"}[rest[0]] + "." + rest[1]
    stage, number, order = TIMM_BLOCKS[block - 1]
    if order == ["conv"]:
        return f"blocks.{stage}.{number}." + {"0": "conv", "1": "bn1"}[rest[0]] + "." + rest[1]
    part = order[int(rest[1])]
    if part == "se":
        return (
            f"blocks.{stage}.{number}.se.{ {'fc1': 'conv_reduce', 'fc2': 'conv_expand'}[rest[2]] }.{rest[3]}"
        )
    norm = {"conv_pw": {4: 1, 3: 1, 2: 2}, "conv_dw": {4: 2, 3: 2, 2: 1}, "conv_pwl": {4: 3, 3: 3}}
    if order[0] == "conv_dw":
        norm = {"conv_dw": {2: 1, 3: 1}, "conv_pw": {2: 2, 3: 2}}
    module = part if rest[2] == "0" else f"bn{norm[part][len(order)]}"
    return f"blocks.{stage}.{number}.{module}.{rest[3]}"


_PLAIN, _SE = ["conv_pw", "conv_dw", "conv_pwl"], ["conv_pw", "conv_dw", "se", "conv_pwl"]
TIMM_BLOCKS = [
    (0, 0, ["conv_dw", "conv_pw"]),
    *[(1, i, _PLAIN) for i in range(2)],
    *[(2, i, _SE) for i in range(3)],
    *[(3, i, _PLAIN) for i in range(4)],
    *[(4, i, _SE) for i in range(2)],
    *[(5, i, _SE) for i in range(3)],
    (6, 0, ["conv"]),
]


def test_timms_mobilenet_has_torchvisions_names_afterwards():
    state = {
        name: value
        for name, value in mobilenet_v3_large(width_mult=0.25).state_dict().items()
        if name.startswith("features.")
    }
    there = {to_timm(name): value for name, value in state.items()}
    # As timm.create_model("mobilenetv3_large_100") lists them.
    assert {
        "conv_stem.weight", "bn1.running_mean", "blocks.0.0.conv_dw.weight", "blocks.0.0.bn2.bias",
        "blocks.2.0.se.conv_reduce.bias", "blocks.2.0.conv_pwl.weight", "blocks.2.0.bn3.weight",
        "blocks.6.0.conv.weight", "blocks.6.0.bn1.running_var",
    } <= set(there)  # fmt: skip
    found, _ = translate({**there, "conv_head.weight": 1, "classifier.bias": 2}, 3)
    assert found == {**state, "conv_head.weight": 1, "classifier.bias": 2}


def test_a_separable_block_of_timm_may_squeeze():
    names = ["conv_stem.weight"]
    names += [
        f"blocks.0.0.{x}.weight" for x in ("conv_dw", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2")
    ]
    found, _ = translate(dict.fromkeys(names, 0), 3)
    block = "features.1.block"
    assert list(found)[1:] == [
        f"{block}.0.0.weight",
        f"{block}.1.fc1.weight",
        f"{block}.1.fc2.weight",
        f"{block}.2.0.weight",
        f"{block}.2.1.weight",
    ]
    assert set(found) <= set(mobilenet_v3_small(width_mult=0.25).state_dict())


# ---- torchvision -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names():
    """{architecture: names of torchvision's model}, made on the meta device, where they cost nothing."""
    builders = (
        detection.fasterrcnn_resnet50_fpn,
        detection.fasterrcnn_resnet50_fpn_v2,
        detection.fasterrcnn_mobilenet_v3_large_320_fpn,
        detection.maskrcnn_resnet50_fpn_v2,
        detection.keypointrcnn_resnet50_fpn,
        detection.retinanet_resnet50_fpn_v2,
        detection.fcos_resnet50_fpn,
        detection.ssdlite320_mobilenet_v3_large,
    )
    with torch.device("meta"):
        return {
            builder.__name__: list(builder(weights=None, weights_backbone=None, num_classes=4).state_dict())
            for builder in builders
        }


def test_torchvisions_own_names_stay_as_they_are(names):
    for architecture, own in names.items():
        found, of_detectron2 = translate(dict.fromkeys(own, 0), 3)
        assert list(match_names(found, set(own))) == own, architecture
        assert not of_detectron2


def test_names_of_older_versions_become_todays():
    old = {
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "backbone.fpn.inner_blocks.3.bias": "backbone.fpn.inner_blocks.3.0.bias",
        "backbone.fpn.layer_blocks.0.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
        "head.regression_head.conv.6.weight": "head.regression_head.conv.3.0.weight",
        "head.classification_head.conv.0.bias": "head.classification_head.conv.0.0.bias",
    }
    found = match_names({name: i for i, name in enumerate(old)}, set(old.values()))
    assert found == {name: i for i, name in enumerate(old.values())}


def test_the_towers_of_fcos_are_not_taken_for_an_old_retinanets(names):
    fcos = dict.fromkeys(names["fcos_resnet50_fpn"], 0)
    with torch.device("meta"):
        retinanet = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    found = set(match_names(fcos, set(retinanet))) & set(retinanet)
    assert not {name for name in found if "_head.conv." in name}
    assert "backbone.body.conv1.weight" in found
