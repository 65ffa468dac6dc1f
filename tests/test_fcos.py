"""FCOS, held against torchvision's: modeling.fcos."""

import pytest
import torch
from model_helpers import (
    FCOS,
    FCOS18,
    PIXELS_TO_1,
    TINY,
    K,
    assert_finds_what_torchvision_finds,
    assert_same_detections,
    assert_same_losses,
    build,
    different_settings,
    make_sample,
    randomize_predictions,
    torchvision_backbone,
    torchvision_inputs,
    torchvision_pair,
    transform_arguments,
    two_samples,
)
from torch import nn
from torchvision.models.detection import fcos
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from plaintrain.utils.errors import UserError

LOSSES = {
    "loss_fcos_cls": "classification",
    "loss_fcos_loc": "bbox_regression",
    "loss_fcos_ctr": "bbox_ctrness",
}


def test_torchvisions_architecture_loads_and_finds_the_same():
    size = (96, 128)
    model, plain = torchvision_pair("fcos_resnet50_fpn", size, label_offset=0, eps=1e-5)
    assert not different_settings(model, plain)
    for network in (model, plain):
        network.score_thresh, network.topk_candidates = 0.0, 100
    assert_finds_what_torchvision_finds(model, plain, size, label_offset=0)


def torchvision_fcos(**kwargs):
    """torchvision's FCOS on a ResNet-18."""
    backbone = torchvision_backbone([2, 3, 4], LastLevelP6P7(32, 32))
    return fcos.FCOS(backbone, K, **{**transform_arguments(), **kwargs})


def test_losses_are_torchvisions():
    model, plain = build(*FCOS18), torchvision_fcos()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    assert_same_losses(model(samples), plain(*torchvision_inputs(samples)), LOSSES)


def test_detections_of_a_batch_are_torchvisions():
    model = build(*FCOS18, *PIXELS_TO_1, "MODEL.FCOS.SCORE_THRESH_TEST", 0.05).eval()
    plain = torchvision_fcos(**transform_arguments((0, 0, 0), (255, 255, 255)), score_thresh=0.05).eval()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    with torch.no_grad():
        found, expected = model(samples), plain(torchvision_inputs(samples)[0])
    assert_same_detections(found, expected, label_offset=0, at_least=10)


def test_keys_are_honoured():
    model = build(
        *TINY, *FCOS,
        "MODEL.FCOS.NUM_CONVS", 2,
        "MODEL.FCOS.CENTER_SAMPLING_RADIUS", 2.5,
        "MODEL.FCOS.SCORE_THRESH_TEST", 0.07,
        "MODEL.FCOS.NMS_THRESH_TEST", 0.43,
        "MODEL.FCOS.TOPK_CANDIDATES_TEST", 108,
        "TEST.DETECTIONS_PER_IMAGE", 17,
    )  # fmt: skip
    assert model.center_sampling_radius == 2.5
    assert (model.score_thresh, model.nms_thresh, model.topk_candidates) == (0.07, 0.43, 108)
    assert model.detections_per_img == 17
    for head in (model.head.classification_head, model.head.regression_head):
        assert sum(isinstance(layer, nn.Conv2d) for layer in head.conv) == 2


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_every_location_of_a_fresh_model_has_the_prior_probability_and_a_box(prior):
    model = build(*TINY, *FCOS, "MODEL.FCOS.PRIOR_PROB", prior, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0).eval()
    assert model.head.classification_head.cls_logits.bias.sigmoid().tolist() == pytest.approx([prior] * K)
    with torch.no_grad():
        images, _ = model.transform([make_sample(64, 64)["image"]])
        outputs = model.head(list(model.backbone(images.tensors).values()))
    # What passes the ReLU of the box outputs is the same everywhere, and above 0.
    assert outputs["bbox_regression"].min() > 0.1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0]]),
            ["one anchor a location", "SIZES [[8]]", "ASPECT_RATIOS [[1.0]]"],
        ),
        (("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]), ["one anchor a location", "SIZES [[8]]"]),
        (("MODEL.TINY.OUT_CHANNELS", 40), ["32 groups", "40 channels"]),
        (("MODEL.FCOS.PRIOR_PROB", 1.0), ["FCOS.PRIOR_PROB", "1.0"]),
        (("MODEL.FCOS.NUM_CLASSES", 0), ["FCOS.NUM_CLASSES", "0", "default_setup"]),
        (("MODEL.MASK_ON", True), ["MODEL.MASK_ON", "True"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*TINY, *FCOS, *keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
