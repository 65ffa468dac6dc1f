"""Names of other projects' backbones and of older torchvision: plaintrain.checkpoint.torchvision."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import detection, mobilenet_v3_large
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.models.vgg import make_layers

from plaintrain.checkpoint.detectron2 import is_detectron2
from plaintrain.checkpoint.torchvision import match_names


def make_vgg():
    """(tensors of a classifier, SSD's extractor of the same modules): its shape decides where it is cut."""
    features = make_layers([4, 4, "M", 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M"])
    extractor = SSDFeatureExtractorVGG(features, highres=False)
    tensors = {f"features.{name}": value for name, value in features.state_dict().items()}
    return tensors | {"classifier.0.weight": torch.zeros(1)}, extractor


def make_mobilenet():
    network = mobilenet_v3_large(width_mult=0.25)
    norm = functools.partial(nn.BatchNorm2d, eps=0.001)
    return network.state_dict(), SSDLiteFeatureExtractorMobileNet(network.features, 13, norm)


@pytest.mark.parametrize("make", [make_vgg, make_mobilenet])
def test_classifier_loads_into_both_halves_of_ssds_extractor(make):
    tensors, extractor = make()
    state = {f"backbone.{name}": value for name, value in extractor.state_dict().items()}
    matched = match_names(tensors, state)
    shared = [name for name in matched if name in state]
    assert len(shared) == sum(name.startswith("features.") for name in tensors)
    for name in shared:
        assert matched[name].data_ptr() == state[name].data_ptr(), name


@pytest.mark.parametrize("prefix", ["", "backbone.", "features.", "backbone.features."])
def test_backbone_loads_into_the_body_of_an_fpn(prefix):
    wanted = {"backbone.body.0.0.weight", "backbone.body.layer1.0.conv1.weight", "backbone.fpn.x"}
    names = ["0.0.weight", "layer1.0.conv1.weight", "fc.bias"]
    matched = match_names({f"{prefix}{name}": i for i, name in enumerate(names)}, wanted)
    assert matched == {f"backbone.body.{name}": i for i, name in enumerate(names)}


def names_of(builder):
    """The names of a model of torchvision, built on the meta device, where it costs no memory."""
    with torch.device("meta"):
        return list(builder(weights=None, weights_backbone=None, num_classes=4).state_dict())


@pytest.mark.parametrize(
    "builder",
    [
        detection.fasterrcnn_mobilenet_v3_large_320_fpn,
        detection.maskrcnn_resnet50_fpn_v2,
        detection.keypointrcnn_resnet50_fpn,
        detection.retinanet_resnet50_fpn_v2,
        detection.fcos_resnet50_fpn,
        detection.ssdlite320_mobilenet_v3_large,
    ],
)
def test_torchvisions_own_names_are_kept(builder):
    names = names_of(builder)
    assert list(match_names(dict.fromkeys(names, 0), names)) == names
    assert not is_detectron2(names)


def test_names_of_older_versions_are_converted():
    old = {
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "backbone.fpn.inner_blocks.3.bias": "backbone.fpn.inner_blocks.3.0.bias",
        "backbone.fpn.layer_blocks.0.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
        "head.regression_head.conv.2.bias": "head.regression_head.conv.1.0.bias",
        "head.regression_head.conv.4.weight": "head.regression_head.conv.2.0.weight",
        "head.regression_head.conv.6.weight": "head.regression_head.conv.3.0.weight",
        "head.classification_head.conv.0.bias": "head.classification_head.conv.0.0.bias",
    }
    matched = match_names({name: i for i, name in enumerate(old)}, set(old.values()))
    assert matched == {name: i for i, name in enumerate(old.values())}
    # The towers of FCOS are not those of an old RetinaNet.
    retinanet = set(names_of(detection.retinanet_resnet50_fpn))
    matched = set(match_names(dict.fromkeys(names_of(detection.fcos_resnet50_fpn), 0), retinanet)) & retinanet
    assert not {name for name in matched if "_head.conv." in name}
    assert "backbone.body.conv1.weight" in matched
