"""Faster, Mask and Keypoint R-CNN and their proposals, against torchvision's: modeling.rcnn, .losses."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from model_helpers import (
    KEYPOINT,
    MASK,
    PROPOSALS,
    RCNN_V2,
    RESNET18,
    SMALL_HEAD,
    TINY,
    build,
    make_batch,
    make_cfg,
    make_sample,
    random_boxes,
    randomize_predictions,
    torchvision_inputs,
    torchvision_twin,
    two_samples,
)
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign, generalized_box_iou_loss

from plaintrain.export.export import describe
from plaintrain.modeling import matching, roi_heads, rpn
from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.tta import DetectorWithTTA
from plaintrain.structures import sample_masks

LOSSES = {
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}
MODELS = {"faster": (), "mask": (*MASK, "MODEL.ROI_MASK_HEAD.ALIGNED", False), "keypoint": KEYPOINT}


def build_pair(name="faster", spread=0.1):
    model = build(*RESNET18, *SMALL_HEAD, *MODELS[name])
    randomize_predictions(model, spread)
    plain = torchvision_twin(model)
    if name == "keypoint":
        # torchvision's loss needs the memory layout of its own RoIAlign.
        plain.roi_heads.keypoint_roi_pool.__class__ = MultiScaleRoIAlign
    return model, plain


def assert_same_losses_and_gradients(model, losses, plain, expected):
    names = {name: LOSSES.get(name, name) for name in losses}
    assert set(names.values()) == set(expected)
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-5, atol=1e-5)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("mask", (0,)), ("keypoint", (0,)), ("faster", (2, 1, 0, 17)), ("mask", (1, 30)), ("keypoint", (0, 3))],
)
def test_losses_and_gradients_are_torchvisions_where_all_are_sampled(name, numbers):
    model, plain = build_pair(name)
    for part in (model.rpn, plain.rpn, model.roi_heads, plain.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6
    samples = make_batch(numbers)
    losses, expected = model(samples), plain(*torchvision_inputs(samples, 1))
    assert all(loss > 0 or max(numbers) == 0 for loss in losses.values())
    assert_same_losses_and_gradients(model, losses, plain, expected)


class Drawn:
    """A sampler of torchvision's that takes, in each call, the candidates of the next draw of ours."""

    def __init__(self, draws):
        self._draws = draws

    def __call__(self, labels):
        candidates, index, exists = self._draws.pop(0)
        taken = torch.zeros_like(candidates).scatter_(1, index, exists) & candidates
        # What is padding to us is not there for torchvision, and all else in the same order.
        rows = [
            t[c] if len(label) < len(t) else t for t, c, label in zip(taken, candidates, labels, strict=True)
        ]
        assert [len(row) for row in rows] == [len(label) for label in labels]
        wanted = [(row & (label >= 1), row & (label == 0)) for row, label in zip(rows, labels, strict=True)]
        return [w[0] for w in wanted], [w[1] for w in wanted]


@pytest.mark.parametrize("numbers", [(3, 1), (0, 5), (2, 1, 0, 17)], ids=str)
def test_losses_and_gradients_are_torchvisions_for_the_same_samples(numbers, monkeypatch):
    # Which were candidates, the indices, which exist.
    draws = []

    def sample(matched, background, sampler):
        drawn = matching.sample_matches(matched, background, sampler)
        draws.append((matched | background, *drawn))
        return drawn

    monkeypatch.setattr(rpn, "sample_matches", sample)
    monkeypatch.setattr(roi_heads, "sample_matches", sample)
    model, plain = build_pair(spread=0.3)
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 24
    samples = make_batch(numbers)
    torch.manual_seed(len(numbers))
    proposals = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: proposals.append(inputs[1]))
    found = model(samples)
    assert all(exists.sum() > 0 and index.shape[1] == 24 for _, index, exists in draws)
    given = Drawn(draws)
    ((boxes, scores),) = proposals
    same = [b[s >= 0] for b, s in zip(boxes, scores, strict=True)], None
    with (
        mock.patch.object(plain.rpn, "filter_proposals", lambda *_: same),
        mock.patch.object(plain.rpn, "fg_bg_sampler", given),
        mock.patch.object(plain.roi_heads, "fg_bg_sampler", given),
    ):
        expected = plain(*torchvision_inputs(samples, 1))
    assert not draws
    assert_same_losses_and_gradients(model, found, plain, expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_masks_lie_in_their_boxes_as_the_config_says_in_training_and_evaluation(aligned, monkeypatch):
    key, calls = "MODEL.ROI_MASK_HEAD.ALIGNED", []
    model = build(*TINY, *SMALL_HEAD, *MASK, *(() if aligned else (key, False)))
    monkeypatch.setattr(roi_heads, "sample_masks", lambda *args: calls.append(args) or sample_masks(*args))
    assert model(two_samples())["loss_mask"] > 0
    assert len(calls) == 2 and all(call[-1] is aligned for call in calls)
    randomize_predictions(model.eval())
    sample, masks = make_sample(64, 96), []
    sample["views"] = [{"image": sample["image"], "flipped": False}]
    for detector in (model, DetectorWithTTA(model, 0.5, 5)):
        detector.pastes_masks = False
        with torch.no_grad():
            masks.append(detector([sample])[0]["masks"])
    assert all(len(found.boxes) and found.aligned is aligned for found in masks)
    assert describe(make_cfg(*MASK, key, aligned), ["ant"], "x.pth")["masks_aligned"] is aligned


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
    losses = compute_box_losses(recipe, coder, deltas[None], PRIORS[None], OBJECTS[None], counts)
    if recipe.loss_type == "giou":
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
    model = build(*TINY, *SMALL_HEAD, *KEYPOINT, *overrides)
    randomize_predictions(model, spread=0.1)
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in model(two_samples()).items()}


def test_weights_and_recipes_change_their_losses_alone():
    usual = losses_with()
    for key, names in (
        (RPN + "LOSS_WEIGHT", ["loss_rpn_cls", "loss_rpn_loc"]),
        (RPN + "BBOX_REG_LOSS_WEIGHT", ["loss_rpn_loc"]),
        (BOX + "BBOX_REG_LOSS_WEIGHT", ["loss_box_reg"]),
        ("MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", ["loss_keypoint"]),
    ):
        expected = {name: usual[name] * (3 if name in names else 1) for name in usual}
        assert losses_with(key, 3.0) == pytest.approx(expected), key
    for node, changed in ((RPN, "loss_rpn_loc"), (BOX, "loss_box_reg")):
        for override in ((node + "SMOOTH_L1_BETA", 0.0), (node + "BBOX_REG_LOSS_TYPE", "giou")):
            losses = losses_with(*override)
            different = {name for name in usual if abs(losses[name] - usual[name]) > 1e-3 * usual[name]}
            assert different == {changed}
            # L1 lies above smooth L1, by at most half of beta for each number.
            assert losses[changed] > usual[changed] or "TYPE" in override[0]


def test_losses_of_an_rpn_are_divided_by_what_was_sampled_or_was_to_be(monkeypatch):
    numbers, losses = [], {}

    def sample(*args):
        index, exists = matching.sample_matches(*args)
        numbers.append(exists.sum().item())
        return index, exists

    monkeypatch.setattr(rpn, "sample_matches", sample)
    for normalizer in ("sampled", "batch_size"):
        # More than there are anchors.
        keys = (RPN + "BATCH_SIZE_PER_IMAGE", 5000, RPN + "LOSS_NORMALIZER", normalizer)
        model = build(*TINY, *PROPOSALS, *keys)
        torch.manual_seed(0)
        losses[normalizer] = {name: loss.item() for name, loss in model(two_samples()).items()}
    assert numbers[0] == numbers[1] and 100 < numbers[0] < 5000
    expected = {name: loss * numbers[0] / (2 * 5000) for name, loss in losses["sampled"].items()}
    assert losses["batch_size"] == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_enter_the_batch_norm_of_the_box_head():
    model = build(*RCNN_V2)
    heads = model.roi_heads
    heads.batch_size_per_image = 40
    heads.fg_bg_sampler.batch_size_per_image = 40
    state = {name: value.clone() for name, value in model.state_dict().items()}
    features = {name: torch.randn(2, 32, 16, 16) for name in model.backbone.level_names}
    targets = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}] * 2
    proposals = random_boxes(2, 30)
    scores = torch.ones(2, 30)
    scores[1, 2:] = -1
    results = []
    for offset in (0, 5):
        proposals[1, 2:] += offset
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(0)
        boxes, _, labels, gt_boxes = heads._sample_proposals(proposals, scores, targets)
        outputs = heads._predict_boxes(features, boxes, labels >= 0)
        sum(heads._compute_box_losses(*outputs, labels, boxes, gt_boxes).values()).backward()
        gradients = [p.grad.clone() for p in heads.box_head.parameters()]
        results.append([*gradients, *(b.clone() for b in heads.box_head.buffers())])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
