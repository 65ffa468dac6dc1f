"""RetinaNet, held against torchvision's: modeling.retinanet."""

import functools

import pytest
import torch
import torchvision
from model_helpers import (
    PIXELS_TO_1,
    RETINA,
    RETINANET18,
    TINY,
    K,
    assert_finds_what_torchvision_finds,
    assert_same_detections,
    assert_same_losses,
    build,
    different_settings,
    make_sample,
    norm_types,
    randomize_predictions,
    torchvision_backbone,
    torchvision_inputs,
    torchvision_pair,
    transform_arguments,
    two_samples,
)
from torch import nn
from torchvision.models.detection import RetinaNet, retinanet
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from plaintrain.utils.errors import UserError

LOSSES = {"loss_cls": "classification", "loss_box_reg": "bbox_regression"}

# ---- torchvision's architectures ---------------------------------------------------------------

# torchvision's name -> eps of its frozen norms; it evaluates its first COCO weights without.
TORCHVISION = {"retinanet_resnet50_fpn": {"eps": 0.0}, "retinanet_resnet50_fpn_v2": {}}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_architectures_load_and_find_the_same(name):
    size = (96, 128)
    model, plain = torchvision_pair(name, size, label_offset=0, **TORCHVISION[name])
    assert not different_settings(model, plain)
    for network in (model, plain):
        network.score_thresh, network.topk_candidates = 0.0, 100
    assert_finds_what_torchvision_finds(model, plain, size, label_offset=0)


# ---- losses and detections of small ones -------------------------------------------------------


def torchvision_retinanet(**kwargs):
    """torchvision's RetinaNet on a ResNet-18 with its usual nine anchors."""
    backbone = torchvision_backbone([2, 3, 4], LastLevelP6P7(32, 32))
    return RetinaNet(backbone, K, **{**transform_arguments(), **kwargs})


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_losses_are_torchvisions(loss_type):
    model = build(*RETINANET18, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss_type)
    plain = torchvision_retinanet()
    plain.head.regression_head._loss_type = {"smooth_l1": "l1", "giou": "giou"}[loss_type]
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    assert_same_losses(model(samples), plain(*torchvision_inputs(samples)), LOSSES)


def test_detections_of_a_batch_are_torchvisions():
    model = build(*RETINANET18, *PIXELS_TO_1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.011).eval()
    plain = torchvision_retinanet(
        **transform_arguments((0, 0, 0), (255, 255, 255)), score_thresh=0.011, detections_per_img=100
    ).eval()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    with torch.no_grad():
        found, expected = model(samples), plain(torchvision_inputs(samples, 0)[0])
    assert_same_detections(found, expected, label_offset=0, at_least=10)


def test_with_detectron2s_anchors_boxes_are_cut_after_nms(monkeypatch):
    keys = (*TINY, *RETINA, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.012, "TEST.DETECTIONS_PER_IMAGE", 1000)
    model = build(*keys, "MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator").eval()
    randomize_predictions(model)
    before = build(*keys).eval()
    before.load_state_dict(model.state_dict())
    before.anchor_generator = model.anchor_generator
    samples = two_samples()
    with torch.no_grad():
        found, cut_before = model(samples), before(samples)
        # torchvision's own, with the cut moved behind it, and what it leaves nothing of left out.
        cut = torchvision.ops.clip_boxes_to_image
        monkeypatch.setattr(torchvision.models.detection.retinanet.box_ops, "clip_boxes_to_image", keep_boxes)
        expected = before(samples)
    for sample, output in zip(samples, expected, strict=True):
        output["boxes"] = cut(output["boxes"], (sample["height"], sample["width"]))
        inside = (output["boxes"][:, 2:] > output["boxes"][:, :2]).all(dim=1)
        output.update({name: values[inside] for name, values in output.items()})
    assert_same_detections(found, expected, label_offset=0, at_least=10)
    assert any(len(a["scores"]) != len(b["scores"]) for a, b in zip(found, cut_before, strict=True))


def test_with_detectron2s_anchors_boxes_outside_of_the_image_are_left_out():
    model = build(
        *TINY, *RETINA,
        "MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator",
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0,
    ).eval()  # fmt: skip
    outputs = {"cls_logits": [torch.zeros(1, 4, K)], "bbox_regression": [torch.zeros(1, 4, 4)]}
    boxes = torch.tensor([[-9.0, 2, -1, 8], [4, 64, 20, 80], [-5, -5, 5, 5], [50, 50, 90, 60]])
    (found,) = model.postprocess_detections(outputs, [[boxes]], [(64, 64)])
    inside = {(0.0, 0.0, 5.0, 5.0), (50.0, 50.0, 64.0, 60.0)}
    assert {tuple(box) for box in found["boxes"].tolist()} == inside
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) == 2 * K


def keep_boxes(boxes, size):
    return boxes


# ---- keys that reach torchvision's model -------------------------------------------------------


def test_keys_of_retinanet_are_honoured():
    model = build(
        *TINY, *RETINA,
        "MODEL.RETINANET.IOU_THRESHOLDS", [0.31, 0.52],
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.07,
        "MODEL.RETINANET.NMS_THRESH_TEST", 0.43,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 108,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 2.0, 3.0, 4.0),
        "TEST.DETECTIONS_PER_IMAGE", 17,
    )  # fmt: skip
    assert (model.proposal_matcher.low_threshold, model.proposal_matcher.high_threshold) == (0.31, 0.52)
    assert (model.score_thresh, model.nms_thresh, model.topk_candidates) == (0.07, 0.43, 108)
    assert model.detections_per_img == 17
    assert tuple(model.box_coder.weights) == (1.0, 2.0, 3.0, 4.0)
    assert tuple(model.head.regression_head.box_coder.weights) == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(("alpha", "gamma", "beta"), [(0.4, 1.5, 0.3), (-1.0, 0.0, 0.1)])
def test_the_numbers_of_the_losses_are_honoured(alpha, gamma, beta, monkeypatch):
    keys = {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma, "SMOOTH_L1_LOSS_BETA": beta}
    plain = build(*TINY, *RETINA)
    model = build(*TINY, *RETINA, *(x for k, v in keys.items() for x in (f"MODEL.RETINANET.{k}", v)))
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    found, default = model(samples), plain(samples)
    # torchvision's own step, with its losses set to these numbers.
    plain.head.regression_head._loss_type = "smooth_l1"
    box_loss = functools.partial(retinanet._box_loss, cnf={"beta": beta})
    monkeypatch.setattr(retinanet, "_box_loss", box_loss)
    focal = functools.partial(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss", focal)
    images, targets = [sample["image"] for sample in samples], torchvision_inputs(samples)[1]
    expected = RetinaNet.forward(plain, images, targets)
    assert_same_losses(found, expected, LOSSES)
    assert all((found[name] - default[name]).abs() > 0.01 for name in found)


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_every_anchor_of_a_fresh_retinanet_has_the_prior_probability(prior):
    model = build(
        *TINY, *RETINA, "MODEL.RETINANET.PRIOR_PROB", prior, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0
    )
    assert model.head.classification_head.cls_logits.bias.sigmoid().tolist() == pytest.approx([prior] * 6 * K)
    with torch.no_grad():
        (found,) = model.eval()([make_sample(64, 64)])
    assert found["scores"].mean().item() == pytest.approx(prior, rel=0.2)


@pytest.mark.parametrize("norm", ["", "GN"])
def test_the_head_has_its_own_norm(norm):
    model = build(*TINY, *RETINA, "MODEL.TINY.NORM", "BN", "MODEL.RETINANET.NORM", norm)
    assert norm_types(model.backbone) == {nn.BatchNorm2d}
    assert norm_types(model.head) == ({nn.GroupNorm} if norm else set())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("MODEL.RETINANET.PRIOR_PROB", 0.0), ["RETINANET.PRIOR_PROB", "0.0"]),
        (("MODEL.RETINANET.PRIOR_PROB", 1.0), ["RETINANET.PRIOR_PROB", "1.0"]),
        (("MODEL.RETINANET.PRIOR_PROB", -0.5), ["RETINANET.PRIOR_PROB", "-0.5"]),
        (("MODEL.RETINANET.IOU_THRESHOLDS", [0.5]), ["RETINANET.IOU_THRESHOLDS", "[0.5]", "2 rising"]),
        (("MODEL.RETINANET.NORM", "BN"), ["RETINANET.NORM", "'BN'", "'GN'"]),
        (("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "diou"), ["BBOX_REG_LOSS_TYPE", "'giou'"]),
        (("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 1.5), ["FOCAL_LOSS_ALPHA is 1.5", "0 to 1", "-1"]),
        (("MODEL.RETINANET.FOCAL_LOSS_ALPHA", -0.5), ["FOCAL_LOSS_ALPHA is -0.5", "0 to 1", "-1"]),
        (("MODEL.RETINANET.FOCAL_LOSS_GAMMA", -2.0), ["FOCAL_LOSS_GAMMA is -2.0", "0 or more"]),
        (("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", -0.1), ["SMOOTH_L1_LOSS_BETA is -0.1", "0 or more"]),
        (
            ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"),
            ["SMOOTH_L1_LOSS_BETA", "0.1", "0.0"],
        ),
        (("MODEL.MASK_ON", True), ["MODEL.MASK_ON", "True"]),
        (("MODEL.KEYPOINT_ON", True), ["MODEL.KEYPOINT_ON", "True"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*TINY, *RETINA, *keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
