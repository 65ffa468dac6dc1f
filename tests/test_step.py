"""The training step of an R-CNN: its sync points, and modeling.matching and .rpn."""

from unittest import mock

import pytest
import torch
from model_helpers import ARCHITECTURES, build, make_batch, random_boxes, randomize_predictions, two_samples
from shared.syncs import count_syncs, training_step
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher, SSDMatcher
from torchvision.ops import batched_nms, box_iou

from plaintrain.modeling import matching
from plaintrain.modeling.matching import match_boxes, pad_targets, sample_matches

FASTER_RCNN, TWO_LEVELS = ARCHITECTURES["faster_rcnn"], ("MODEL.TINY.NUM_LEVELS", 2)
GIOU = ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou")
MODELS = {
    "mask and keypoints": (*ARCHITECTURES["mask_keypoint_rcnn"], *TWO_LEVELS),
    "giou": (*FASTER_RCNN, *TWO_LEVELS, *GIOU),
    "proposals": (*ARCHITECTURES["proposals"], *TWO_LEVELS),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_has_at_most_8_sync_points_beside_nms_at_any_batch_size(name):
    model = build(*MODELS[name])
    for batch in (2, 6):
        step = training_step(model, (two_samples() * 3)[:batch])
        # The first makes the anchors, once.
        step()
        counts = count_syncs(step)
        assert counts["syncs"] <= 8, counts
        # The proposals of an RPN alone are not made in training.
        assert counts["nms"] == (0 if name == "proposals" else batch), counts
        if name != "mask and keypoints":
            # torchvision's loss of keypoints makes tensors of numbers.
            assert counts["uploads"] <= 1, counts


def test_count_syncs_counts_each_kind():
    values = torch.arange(6.0)
    steps = [
        ("nonzero", lambda: torch.where(values > 2)),
        ("_local_scalar_dense", lambda: bool((values > 2).any())),
        ("index by mask", lambda: values[values > 2]),
        ("index_put by mask", lambda: values.clone().__setitem__(values > 3, torch.zeros(2))),
        ("masked_select", lambda: values.masked_select(values > 2)),
        ("_unique2", lambda: torch.unique(values)),
        ("tolist", lambda: values.tolist()),
        ("cpu", lambda: values.cpu()),
        ("nms", lambda: batched_nms(values.view(-1, 1).expand(-1, 4), values, values, 0.5)),
        ("lift_fresh", lambda: torch.as_tensor([1.0, 2.0])),
    ]
    for kind, step in steps:
        assert count_syncs(step)["by kind"][kind] >= 1, kind

    def without_syncs():
        y = values.clone().index_put_((values > 3,), values[0]).index_fill_(0, torch.arange(2), 1.0)
        return torch.where(values > 3, values, y).masked_fill(values > 2, 0)[torch.arange(2)].topk(2)

    assert not count_syncs(without_syncs)["by kind"]


@pytest.mark.parametrize(
    ("matcher", "candidates", "pairs"),
    [
        (Matcher(0.7, 0.3, True), random_boxes(1, 500, seed=9), 2**24),
        (Matcher(0.7, 0.3, True), random_boxes(4, 500, seed=9), 1),
        (Matcher(0.5, 0.5), random_boxes(1, 500, seed=9), 1),
        (SSDMatcher(0.6), random_boxes(1, 500, seed=9), 1),
        # Of 12 candidates, objects share their best one, and some overlap none.
        (SSDMatcher(0.6), random_boxes(1, 12, seed=9), 2**24),
    ],
)
def test_match_is_torchvisions_matcher(matcher, candidates, pairs):
    objects = [random_boxes(n, seed=i) for i, n in enumerate((9, 0, 30, 1))]
    boxes, labels = pad_targets([{"boxes": b, "labels": torch.ones(len(b)).long()} for b in objects])
    # Padding would match as well.
    boxes[labels < 0] = torch.tensor([10.0, 10, 40, 40])
    with mock.patch.object(matching, "_MAX_PAIRS", pairs):
        index, matched, background = match_boxes(boxes, labels >= 0, candidates, matcher)
    assert index.shape == matched.shape == background.shape == (4, candidates.shape[1])
    for i, b in enumerate(objects):
        overlaps = box_iou(b, candidates[i % len(candidates)])
        expected = matcher(overlaps) if len(b) else torch.full((candidates.shape[1],), -1)
        assert matched[i].equal(expected >= 0) and background[i].equal(expected == -1)
        assert index[i][matched[i]].equal(expected[matched[i]])
    best = box_iou(objects[2], candidates[-1]).argmax(dim=1)
    assert len(best.unique()) < len(best) or candidates.shape[1] == 500
    assert matched.any(dim=1).tolist()[:3] == [True, False, True]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(100, 300, (20, 60)), (5, 300, (5, 75)), (0, 300, (0, 80)), (100, 30, (20, 30)), (3, 2, (3, 2))],
)
def test_sample_draws_as_many_as_torchvisions_sampler(positives, negatives, expected):
    sampler = BalancedPositiveNegativeSampler(80, 0.25)
    labels = torch.full((1, 500), -1)
    labels[:, :positives], labels[:, 150 : 150 + negatives] = 1, 0
    index, exists = sample_matches(labels == 1, labels == 0, sampler)
    assert index.shape == exists.shape == (1, 80)
    drawn = labels[0][index[0][exists[0]]]
    assert ((drawn == 1).sum(), (drawn == 0).sum()) == expected
    assert len(drawn) == len(index[0][exists[0]].unique())
    # Matches first, and padding last.
    assert drawn.diff().le(0).all() and exists[0].long().diff().le(0).all()
    assert [part[0].sum() for part in sampler(list(labels))] == list(expected)


def test_sample_draws_every_candidate_as_often_with_numbers_that_depend_on_shapes_alone():
    states = []
    for positives in (0, 7, 40):
        torch.manual_seed(3)
        matched = torch.arange(40)[None] < positives
        sample_matches(matched, ~matched, BalancedPositiveNegativeSampler(16, 0.5))
        states.append(torch.get_rng_state())
    assert all(state.equal(states[0]) for state in states)
    labels = torch.arange(30).lt(10).long()[None].expand(5000, -1)
    torch.manual_seed(0)
    index, _ = sample_matches(labels == 1, labels == 0, BalancedPositiveNegativeSampler(8, 0.25))
    counts = index.flatten().bincount(minlength=30)
    # 2 of 10 and 6 of 20 in 5000 draws: 1000 and 1500, with deviations of about 28 and 32.
    assert (counts[:10] - 1000).abs().max() < 130 and (counts[10:] - 1500).abs().max() < 140


@pytest.mark.parametrize("low", [False, True])
def test_heads_of_sampled_anchors_are_those_of_all_at_once(low):
    model = build(*FASTER_RCNN, *TWO_LEVELS)
    randomize_predictions(model)
    images, _ = model.transform([s["image"] for s in make_batch((2, 3))])
    features = list(model.backbone(images.tensors).values())
    head = model.rpn.head
    anchors = head.cls_logits.out_channels
    size = sum(f.shape[2] * f.shape[3] for f in features) * anchors
    sampled = torch.randint(size, (2, 50), generator=torch.Generator().manual_seed(0))
    # The corners of the largest and of the smallest map.
    sampled[:, :2], sampled[:, 2] = torch.tensor([0, size - 1]), features[0].shape[3] * anchors - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        predicted = model.rpn._predict_sampled(features, sampled)
        objectness, deltas = (
            torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, n) for level in part], dim=1)
            for part, n in zip(head(features), (1, 4), strict=True)
        )
    rows = torch.arange(2)[:, None]
    expected = (objectness[rows, sampled][..., 0], deltas[rows, sampled])
    for part, other in zip(predicted, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, other, rtol=0.1 * low + 1e-5, atol=0.02 * low + 1e-5)
    gradients = []
    for logits, boxes in (predicted, expected):
        loss = logits.square().sum() + boxes.square().sum()
        gradients.append(torch.autograd.grad(loss, [*features, *head.parameters()], retain_graph=True))
    for part, other in zip(*gradients, strict=True):
        tolerance = (0.05 * low + 1e-5) * other.abs().max().item()
        torch.testing.assert_close(part, other, rtol=0.05 * low + 1e-4, atol=tolerance)


def steps_of(model, times=1):
    """The RPN's losses in some steps on the same samples, and the gradients of the last."""
    for _ in range(times):
        torch.manual_seed(0)
        model.zero_grad()
        losses = model(two_samples())
        (losses["loss_rpn_cls"] + losses["loss_rpn_loc"]).backward()
    return losses, {name: p.grad.clone() for name, p in model.rpn.named_parameters()}


OTHER_HEADS = {
    "activation": lambda rpn: setattr(rpn.head.conv[0], "1", torch.nn.Tanh()),
    "dilation": lambda rpn: [setattr(rpn.head.conv[0][0], key, (2, 2)) for key in ("dilation", "padding")],
    "hook": lambda rpn: rpn.head.register_forward_hook(lambda _, i, out: (out[0], [3 * d for d in out[1]])),
    "hook of a part": lambda rpn: rpn.head.bbox_pred.register_forward_hook(lambda _, i, out: 3 * out),
    "hook of an input": lambda rpn: rpn.head.conv.register_forward_pre_hook(lambda _, inputs: 3 * inputs[0]),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_head_that_is_not_plain_is_called_for_all_anchors(name):
    model = build(*FASTER_RCNN)
    randomize_predictions(model)
    OTHER_HEADS[name](model.rpn)
    with mock.patch.object(model.rpn.head, "forward", wraps=model.rpn.head.forward) as called:
        losses, gradients = steps_of(model)
    assert called.call_count == 1 and all(gradient.any() for gradient in gradients.values())
    with mock.patch("plaintrain.modeling.rpn._is_plain", return_value=False):
        expected, wanted = steps_of(model)
    assert losses == expected and all(gradients[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("dims", [[-1], [-1, -1]])
def test_the_rpn_learns_under_autocast(dims):
    model = build(*FASTER_RCNN, "MODEL.RPN.CONV_DIMS", dims)
    with torch.autocast("cpu", torch.bfloat16):
        # The second time with weights that autocast has cast already.
        _, gradients = steps_of(model, times=2)
    assert all(gradient.any() for gradient in gradients.values())
