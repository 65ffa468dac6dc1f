"""The recipes of an R-CNN's losses, Detectron2's among them, held against formulas: modeling.box_loss."""

import math

import pytest
import torch
from model_helpers import (
    PROPOSALS,
    SMALL_HEAD,
    TINY,
    build,
    randomize_predictions,
    two_samples,
)
from torchvision.models.detection._utils import BoxCoder

from plaintrain.config import get_cfg
from plaintrain.modeling import matching, rpn
from plaintrain.modeling.box_loss import BoxLoss, box_losses

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RPN, BOX = "MODEL.RPN.", "MODEL.ROI_BOX_HEAD."


def plain_deltas(prior, box):
    """What takes a prior to a box, one number after the other."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = prior, box
    width, height = x1 - x0, y1 - y0
    return [
        WEIGHTS[0] * ((u0 + u1) / 2 - (x0 + x1) / 2) / width,
        WEIGHTS[1] * ((v0 + v1) / 2 - (y0 + y1) / 2) / height,
        WEIGHTS[2] * math.log((u1 - u0) / width),
        WEIGHTS[3] * math.log((v1 - v0) / height),
    ]


def plain_smooth_l1(x, beta):
    return x * x / (2 * beta) if abs(x) < beta else abs(x) - beta / 2


def plain_giou(a, b):
    def area(x0, y0, x1, y1):
        return max(x1 - x0, 0) * max(y1 - y0, 0)

    inside = area(*(max(a[i], b[i]) for i in (0, 1)), *(min(a[i], b[i]) for i in (2, 3)))
    around = area(*(min(a[i], b[i]) for i in (0, 1)), *(max(a[i], b[i]) for i in (2, 3)))
    union = area(*a) + area(*b) - inside
    return inside / union - (around - union) / around


PRIORS = [[0.0, 0, 20, 10], [5, 5, 15, 25], [0, 0, 8, 8], [3, 3, 9, 9]]
OBJECTS = [[2.0, 1, 24, 9], [40, 5, 50, 30], [0, 0, 8, 8], [0, 0, 0, 0]]
FOUND = [[0.3, -2.0, 0.05, 1.0], [0.0, 0.0, 0.0, 0.0], [0.01, -0.1, 0.2, 0.0], [1.0, 1.0, 1.0, 1.0]]


def found_loss(recipe):
    deltas, priors, objects = (torch.tensor([rows]) for rows in (FOUND, PRIORS, OBJECTS))
    # The last is padding.
    counts = torch.tensor([[True, True, True, False]])
    deltas.requires_grad_()
    losses = box_losses(recipe, BoxCoder(WEIGHTS), deltas, priors, objects, counts)
    assert losses.shape == (1, 4) and not losses[0, 3]
    loss = losses.sum()
    (gradient,) = torch.autograd.grad(loss, deltas)
    assert gradient.isfinite().all() and gradient[0, :2].any() and not gradient[0, 3].any()
    return loss.item()


@pytest.mark.parametrize(("beta", "weight"), [(0.0, 1.0), (1 / 9, 2.5), (3.0, 1.0)])
def test_smooth_l1_has_any_beta_and_0_is_l1(beta, weight):
    terms = [
        plain_smooth_l1(delta - wanted, beta)
        for deltas, prior, box in zip(FOUND[:3], PRIORS, OBJECTS, strict=False)
        for delta, wanted in zip(deltas, plain_deltas(prior, box), strict=True)
    ]
    assert found_loss(BoxLoss("smooth_l1", beta, weight)) == pytest.approx(weight * sum(terms), rel=1e-5)


def test_giou_compares_the_boxes():
    boxes = []
    for (dx, dy, dw, dh), (x0, y0, x1, y1) in zip(FOUND[:3], PRIORS, strict=False):
        width, height = x1 - x0, y1 - y0
        x, y = (x0 + x1) / 2 + dx / WEIGHTS[0] * width, (y0 + y1) / 2 + dy / WEIGHTS[1] * height
        w, h = width * math.exp(dw / WEIGHTS[2]), height * math.exp(dh / WEIGHTS[3])
        boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    expected = sum(1 - plain_giou(a, b) for a, b in zip(boxes, OBJECTS, strict=False))
    assert found_loss(BoxLoss("giou", 0.0, 3.0)) == pytest.approx(3 * expected, rel=1e-5)


def losses_with(*overrides):
    """The losses of one model on the same samples, under some recipe."""
    model = build(*TINY, *SMALL_HEAD, *overrides)
    randomize_predictions(model, spread=0.1)
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in model(two_samples()).items()}


@pytest.fixture(scope="module")
def usual():
    return losses_with()


@pytest.mark.parametrize(
    ("key", "factors"),
    [
        (RPN + "LOSS_WEIGHT", {"loss_rpn_cls": 3, "loss_rpn_loc": 3}),
        (RPN + "BBOX_REG_LOSS_WEIGHT", {"loss_rpn_loc": 3}),
        (BOX + "BBOX_REG_LOSS_WEIGHT", {"loss_box_reg": 3}),
    ],
)
def test_weights_multiply_their_losses(key, factors, usual):
    found = losses_with(key, 3.0)
    assert found == pytest.approx({name: factors.get(name, 1) * usual[name] for name in usual})


@pytest.mark.parametrize(("node", "changed"), [(RPN, "loss_rpn_loc"), (BOX, "loss_box_reg")])
def test_a_recipe_changes_its_loss_alone(node, changed, usual):
    for override in ((node + "SMOOTH_L1_BETA", 0.0), (node + "BBOX_REG_LOSS_TYPE", "giou")):
        found = losses_with(*override)
        different = {name for name in usual if abs(found[name] - usual[name]) > 1e-3 * usual[name]}
        assert different == {changed}
        # L1 lies above smooth L1, by at most half of beta for each number.
        assert found[changed] > usual[changed] or "TYPE" in override[0]


def test_losses_of_an_rpn_are_divided_by_what_was_sampled_or_was_to_be(monkeypatch):
    exist, found = [], {}

    def counted(*args):
        index, exists = matching.sample(*args)
        exist.append(exists.sum().item())
        return index, exists

    monkeypatch.setattr(rpn, "sample", counted)
    for normalizer in ("sampled", "batch_size"):
        # More than there are anchors.
        keys = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 5000, RPN + "LOSS_NORMALIZER", normalizer)
        model = build(*TINY, *PROPOSALS, *keys)
        torch.manual_seed(0)
        found[normalizer] = {name: loss.item() for name, loss in model(two_samples()).items()}
    assert exist[0] == exist[1] and 100 < exist[0] < 5000
    expected = {name: loss * exist[0] / (2 * 5000) for name, loss in found["sampled"].items()}
    assert found["batch_size"] == pytest.approx(expected, rel=1e-5)


def test_detectron2s_files_have_its_recipe():
    cfg = get_cfg()
    cfg.merge_from_file("configs/Detectron2/faster_rcnn_R_50_FPN_3x.yaml")
    proposals, box = cfg.MODEL.RPN, cfg.MODEL.ROI_BOX_HEAD
    assert (proposals.SMOOTH_L1_BETA, proposals.LOSS_NORMALIZER) == (0.0, "batch_size")
    assert (proposals.LOSS_WEIGHT, proposals.BBOX_REG_LOSS_WEIGHT) == (1.0, 1.0)
    assert (box.SMOOTH_L1_BETA, box.BBOX_REG_LOSS_WEIGHT, box.POOLER_TYPE) == (0.0, 1.0, "ROIAlignV2")
