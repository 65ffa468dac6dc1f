"""SSD and SSDlite, held against torchvision's: modeling.ssd."""

import functools

import pytest
import torch
from model_helpers import (
    PIXELS_TO_1,
    SSD,
    TINY,
    K,
    assert_finds_what_torchvision_finds,
    assert_same_detections,
    assert_same_losses,
    build,
    different_settings,
    make_cfg,
    make_sample,
    norm_types,
    randomize_predictions,
    torchvision_inputs,
    torchvision_pair,
    two_squares,
)
from torch import nn
from torchvision.models.detection import ssd
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssdlite import SSDLiteHead

from plaintrain.modeling.backbone import build_backbone
from plaintrain.utils.errors import UserError

LOSSES = {"loss_cls": "classification", "loss_box_reg": "bbox_regression"}

# torchvision's name -> its input's size.
TORCHVISION = {"ssd300_vgg16": (300, 300), "ssdlite320_mobilenet_v3_large": (320, 320)}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_architectures_load_and_find_the_same(name):
    size = TORCHVISION[name]
    model, plain = torchvision_pair(name, size, label_offset=1)
    assert not different_settings(model, plain)
    for network in (model, plain):
        network.score_thresh, network.detections_per_img = 0.0, 50
    assert_finds_what_torchvision_finds(model, plain, size, label_offset=1)


# ---- losses and detections of small ones -------------------------------------------------------

HEADS = {
    "SSDHead": ssd.SSDHead,
    "SSDLiteHead": functools.partial(SSDLiteHead, norm_layer=nn.BatchNorm2d),
}
STEPS = ("MODEL.SSD.SCALES", [0.2, 0.5, 0.9], "MODEL.SSD.STEPS", [4, 8])


def torchvision_ssd(head, **boxes):
    """torchvision's SSD on the tiny backbone that SSD describes, its images not normalised."""
    boxes = DefaultBoxGenerator([[2], [2, 3]], **boxes)
    backbone = build_backbone(make_cfg(*TINY, *SSD, "MODEL.TINY.NORM", "BN"))
    head = HEADS[head]([32, 32], boxes.num_anchors_per_location(), K + 1)
    return ssd.SSD(backbone, boxes, (64, 64), K + 1, head=head, image_mean=[0, 0, 0], image_std=[1, 1, 1])


@pytest.mark.parametrize(("keys", "boxes"), [((), {}), (STEPS, {"scales": [0.2, 0.5, 0.9], "steps": [4, 8]})])
@pytest.mark.parametrize("head", HEADS)
def test_losses_and_detections_are_torchvisions(head, keys, boxes):
    model = build(
        *TINY, *SSD, *PIXELS_TO_1, *keys,
        "MODEL.TINY.NORM", "BN", "MODEL.SSD.HEAD_NAME", head, "TEST.DETECTIONS_PER_IMAGE", 200,
    )  # fmt: skip
    plain = torchvision_ssd(head, **boxes)
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_squares()
    images, targets = torchvision_inputs(samples, label_offset=1)
    assert_same_losses(model(samples), plain(images, targets), LOSSES)
    # The forward pass in training has moved the statistics of both alike.
    with torch.no_grad():
        found, expected = model.eval()(samples), plain.eval()(images)
    assert_same_detections(found, expected, label_offset=1, at_least=10)


def test_images_are_not_padded_and_need_not_be_square():
    model = build(*TINY, *SSD, "INPUT.FIXED_SIZE", (40, 72), "MODEL.SSD.SCORE_THRESH_TEST", 0.0).eval()
    randomize_predictions(model)
    batch, _ = model.transform([make_sample(40, 72)["image"]])
    assert batch.tensors.shape == (1, 3, 40, 72)
    with torch.no_grad():
        (found,) = model([make_sample(40, 72, original=(80, 720))])
    assert 80 >= found["boxes"][:, 3].max() > 72 and 720 >= found["boxes"][:, 2].max() > 400


def test_keys_are_honoured():
    model = build(
        *TINY, *SSD,
        "MODEL.SSD.MIN_RATIO", 0.3,
        "MODEL.SSD.MAX_RATIO", 0.7,
        "MODEL.SSD.STEPS", [5, 9],
        "MODEL.SSD.IOU_THRESHOLD", 0.6,
        "MODEL.SSD.POSITIVE_FRACTION", 0.2,
        "MODEL.SSD.SCORE_THRESH_TEST", 0.07,
        "MODEL.SSD.NMS_THRESH_TEST", 0.43,
        "MODEL.SSD.TOPK_CANDIDATES_TEST", 108,
        "TEST.DETECTIONS_PER_IMAGE", 17,
    )  # fmt: skip
    boxes = model.anchor_generator
    assert (boxes.aspect_ratios, boxes.steps) == ([[2], [2, 3]], [5, 9])
    assert boxes.scales == pytest.approx([0.3, 0.7, 1.0])
    assert model.proposal_matcher.high_threshold == 0.6
    assert model.neg_to_pos_ratio == pytest.approx(4)
    assert (model.score_thresh, model.nms_thresh, model.topk_candidates) == (0.07, 0.43, 108)
    assert model.detections_per_img == 17


def test_the_lite_head_has_the_norm_of_the_tiny_backbone():
    keys = (*TINY, *SSD, "MODEL.SSD.HEAD_NAME", "SSDLiteHead")
    for norm, kind in (("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d)):
        assert norm_types(build(*keys, "MODEL.TINY.NORM", norm).head) == {kind}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("INPUT.FIXED_SIZE", (0, 0)), ["SSD", "INPUT.FIXED_SIZE", "(0, 0)"]),
        (("INPUT.FIXED_SIZE", (300,)), ["INPUT.FIXED_SIZE", "(300,)"]),
        (("INPUT.FIXED_SIZE", (64, -1)), ["INPUT.FIXED_SIZE", "(64, -1)"]),
        (("MODEL.SSD.ASPECT_RATIOS", [[2]]), ["SSD.ASPECT_RATIOS", "1 entries", "2 levels", "need 2"]),
        (("MODEL.SSD.ASPECT_RATIOS", []), ["SSD.ASPECT_RATIOS", "0 entries", "need 2"]),
        (("MODEL.SSD.SCALES", [0.1, 0.2]), ["SSD.SCALES", "2 entries", "2 levels", "need 3"]),
        (("MODEL.SSD.STEPS", [8, 16, 32]), ["SSD.STEPS", "3 entries", "2 levels", "need 2"]),
        (("MODEL.SSD.POSITIVE_FRACTION", 0.0), ["SSD.POSITIVE_FRACTION", "0.0"]),
        (("MODEL.SSD.POSITIVE_FRACTION", 1.0), ["SSD.POSITIVE_FRACTION", "1.0"]),
        (("MODEL.SSD.HEAD_NAME", "SSDHeadd"), ["SSD.HEAD_NAME", "'SSDHeadd'", "'SSDLiteHead'"]),
        (("MODEL.SSD.NUM_CLASSES", 0), ["SSD.NUM_CLASSES", "0", "default_setup"]),
        (("MODEL.KEYPOINT_ON", True), ["MODEL.KEYPOINT_ON", "True"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*TINY, *SSD, *keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
