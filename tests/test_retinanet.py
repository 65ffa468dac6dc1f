"""RetinaNet's losses, priors and, with Detectron2's anchors, its detections: modeling.retinanet."""

import functools

import pytest
import torch
import torchvision
from model_helpers import (
    RETINA,
    TINY,
    K,
    assert_same_detections,
    build,
    make_sample,
    norm_types,
    randomize_predictions,
    torchvision_inputs,
    two_samples,
)
from torch import nn
from torchvision.models.detection import RetinaNet, retinanet
from torchvision.ops import sigmoid_focal_loss


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
        monkeypatch.setattr(
            torchvision.models.detection.retinanet.box_ops, "clip_boxes_to_image", lambda boxes, size: boxes
        )
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


@pytest.mark.parametrize(("alpha", "gamma", "beta"), [(0.4, 1.5, 0.3), (-1.0, 0.0, 0.1)])
def test_the_numbers_of_the_losses_reach_them(alpha, gamma, beta, monkeypatch):
    keys = {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma, "SMOOTH_L1_LOSS_BETA": beta}
    plain = build(*TINY, *RETINA)
    model = build(*TINY, *RETINA, *(x for k, v in keys.items() for x in (f"MODEL.RETINANET.{k}", v)))
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    losses, default = model(samples), plain(samples)
    # torchvision's own step, with its losses set to these numbers.
    plain.head.regression_head._loss_type = "smooth_l1"
    box_loss = functools.partial(retinanet._box_loss, cnf={"beta": beta})
    monkeypatch.setattr(retinanet, "_box_loss", box_loss)
    focal = functools.partial(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss", focal)
    images, targets = [sample["image"] for sample in samples], torchvision_inputs(samples)[1]
    expected = RetinaNet.forward(plain, images, targets)
    for name, theirs in {"loss_cls": "classification", "loss_box_reg": "bbox_regression"}.items():
        torch.testing.assert_close(losses[name], expected[theirs], rtol=1e-5, atol=1e-5)
    assert all((losses[name] - default[name]).abs() > 0.01 for name in losses)


def test_every_anchor_of_a_fresh_retinanet_has_the_prior_probability():
    model = build(*TINY, *RETINA, "MODEL.RETINANET.PRIOR_PROB", 0.2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    assert model.head.classification_head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.2] * 6 * K)
    with torch.no_grad():
        (found,) = model.eval()([make_sample(64, 64)])
    assert found["scores"].mean().item() == pytest.approx(0.2, rel=0.2)


def test_the_head_has_its_own_norm():
    model = build(*TINY, *RETINA, "MODEL.TINY.NORM", "BN", "MODEL.RETINANET.NORM", "GN")
    assert norm_types(model.backbone) == {nn.BatchNorm2d} and norm_types(model.head) == {nn.GroupNorm}
