"""The recipes of an R-CNN's losses, Detectron2's among them: modeling.box_loss."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import PROPOSALS, SMALL_HEAD, TINY, build, randomize_predictions, two_samples
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss

from plaintrain.config import get_cfg
from plaintrain.modeling import matching, rpn
from plaintrain.modeling.box_loss import BoxLoss, box_losses

RPN, BOX = "MODEL.RPN.", "MODEL.ROI_BOX_HEAD."
PRIORS = torch.tensor([[0.0, 0, 20, 10], [5, 5, 15, 25], [0, 0, 8, 8], [3, 3, 9, 9]])
OBJECTS = torch.tensor([[2.0, 1, 24, 9], [40, 5, 50, 30], [0, 0, 8, 8], [0, 0, 0, 0]])
DELTAS = torch.tensor([[0.3, -2.0, 0.05, 1.0], [0.0] * 4, [0.01, -0.1, 0.2, 0.0], [float("inf")] * 4])


@pytest.mark.parametrize(
    "recipe",
    [BoxLoss("smooth_l1", 0.0, 1.0), BoxLoss(), BoxLoss("smooth_l1", 3.0, 2.5), BoxLoss("giou", 0.0, 3.0)],
)
def test_box_losses_are_those_of_torch(recipe):
    coder, deltas = BoxCoder((10.0, 10.0, 5.0, 5.0)), DELTAS.clone().requires_grad_()
    # The last is padding.
    counts = torch.tensor([[True, True, True, False]])
    losses = box_losses(recipe, coder, deltas[None], PRIORS[None], OBJECTS[None], counts)
    if recipe.kind == "giou":
        expected = generalized_box_iou_loss(coder.decode_single(deltas[:3], PRIORS[:3]), OBJECTS[:3])
    else:
        wanted = coder.encode_single(OBJECTS[:3], PRIORS[:3])
        expected = F.smooth_l1_loss(deltas[:3], wanted, beta=recipe.beta, reduction="none").sum(dim=1)
    assert losses.shape == (1, 4) and not losses[0, 3]
    torch.testing.assert_close(losses[0, :3], recipe.weight * expected)
    gradients = [torch.autograd.grad(part.sum(), deltas)[0] for part in (losses, recipe.weight * expected)]
    assert gradients[0][:2].any() and not gradients[0][3].any()
    torch.testing.assert_close(*gradients)


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
    losses = losses_with(key, 3.0)
    assert losses == pytest.approx({name: factors.get(name, 1) * usual[name] for name in usual})


@pytest.mark.parametrize(("node", "changed"), [(RPN, "loss_rpn_loc"), (BOX, "loss_box_reg")])
def test_a_recipe_changes_its_loss_alone(node, changed, usual):
    for override in ((node + "SMOOTH_L1_BETA", 0.0), (node + "BBOX_REG_LOSS_TYPE", "giou")):
        losses = losses_with(*override)
        different = {name for name in usual if abs(losses[name] - usual[name]) > 1e-3 * usual[name]}
        assert different == {changed}
        # L1 lies above smooth L1, by at most half of beta for each number.
        assert losses[changed] > usual[changed] or "TYPE" in override[0]


def test_losses_of_an_rpn_are_divided_by_what_was_sampled_or_was_to_be(monkeypatch):
    numbers, losses = [], {}

    def sample(*args):
        index, exists = matching.sample(*args)
        numbers.append(exists.sum().item())
        return index, exists

    monkeypatch.setattr(rpn, "sample", sample)
    for normalizer in ("sampled", "batch_size"):
        # More than there are anchors.
        keys = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 5000, RPN + "LOSS_NORMALIZER", normalizer)
        model = build(*TINY, *PROPOSALS, *keys)
        torch.manual_seed(0)
        losses[normalizer] = {name: loss.item() for name, loss in model(two_samples()).items()}
    assert numbers[0] == numbers[1] and 100 < numbers[0] < 5000
    expected = {name: loss * numbers[0] / (2 * 5000) for name, loss in losses["sampled"].items()}
    assert losses["batch_size"] == pytest.approx(expected, rel=1e-5)


def test_detectron2s_files_have_its_recipe():
    cfg = get_cfg()
    cfg.merge_from_file("configs/Detectron2/faster_rcnn_R_50_FPN_3x.yaml")
    proposals, box = cfg.MODEL.RPN, cfg.MODEL.ROI_BOX_HEAD
    assert (proposals.SMOOTH_L1_BETA, proposals.LOSS_NORMALIZER) == (0.0, "batch_size")
    assert (box.SMOOTH_L1_BETA, box.POOLER_TYPE) == (0.0, "ROIAlignV2")
