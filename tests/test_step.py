"""The training step of an R-CNN: its sync points, and modeling.matching, .rpn and .roi_heads."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
from model_helpers import (
    KEYPOINT,
    MASK,
    PROPOSALS,
    RESNET18,
    SMALL_HEAD,
    TINY,
    build,
    make_sample,
    randomize_predictions,
    same_input,
    torchvision_inputs,
    two_samples,
)
from shared.syncs import count_syncs, training_step
from test_rcnn import LOSSES, torchvision_rcnn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou

from plaintrain.modeling import matching
from plaintrain.modeling.anchors import SizeCache
from plaintrain.modeling.matching import decode, match, pad_targets, sample
from plaintrain.modeling.rpn import _is_plain

# ---- sync points -------------------------------------------------------------------------------

MODELS = {
    "faster": (*RESNET18, *SMALL_HEAD),
    "mask and keypoints": (*RESNET18, *SMALL_HEAD, *MASK, *KEYPOINT),
    "proposals": (*RESNET18, *PROPOSALS),
    "giou": (
        *RESNET18,
        *SMALL_HEAD,
        "MODEL.RPN.BBOX_REG_LOSS_TYPE",
        "giou",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        "giou",
    ),  # fmt: skip
}


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_has_at_most_8_sync_points_beside_nms_at_any_batch_size(name, batch):
    step = training_step(build(*MODELS[name]), (two_samples() * 4)[:batch])
    # The first makes the anchors, once.
    step()
    counts = count_syncs(step)
    assert counts["syncs"] <= 8, counts
    # The proposals of an RPN alone are not made in training.
    assert (counts["nms"] > 0) == (name != "proposals"), counts
    if name != "mask and keypoints":
        # torchvision's loss of keypoints makes tensors of numbers.
        assert counts["uploads"] <= 1, counts


def test_torchvisions_own_step_has_more_with_every_image():
    plain, numbers = torchvision_rcnn(), []
    for batch in (2, 8):
        step = training_step(plain, *torchvision_inputs((two_samples() * 4)[:batch], 1))
        step()
        counts = count_syncs(step)
        numbers.append((counts["syncs"], counts["uploads"]))
    assert numbers[0] > (20, 40) and numbers[1] > (80, 150)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("nonzero", lambda x: torch.where(x > 2)),
        ("nonzero", lambda x: x.nonzero()),
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 2).any())),
        ("index by mask", lambda x: x[x > 2]),
        ("index_put by mask", lambda x: x.clone().__setitem__(x > 3, torch.zeros(2))),
        ("masked_select", lambda x: x.masked_select(x > 2)),
        ("_unique2", lambda x: torch.unique(x)),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("nms", lambda x: batched_nms(x.view(-1, 1).expand(-1, 4), x, x, 0.5)),
        ("lift_fresh", lambda x: torch.tensor([1.0, 2.0])),
        ("lift_fresh", lambda x: torch.as_tensor([1.0, 2.0])),
        ("lift_fresh", lambda x: x.new_tensor(3.0)),
    ],
)
def test_the_count_sees(kind, step):
    values = torch.arange(6.0)
    assert count_syncs(lambda: step(values))["by kind"][kind] >= 1


def test_the_count_leaves_out_what_is_none():
    def step():
        x = torch.arange(6.0)
        y = x.clone().index_put_((x > 3,), x[0]).index_fill_(0, torch.arange(2), 1.0)
        return torch.where(x > 3, x, y).masked_fill(x > 2, 0)[torch.arange(2)].topk(2)

    assert not count_syncs(step)["by kind"]


# ---- matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [2**24, 1])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("matcher", [Matcher(0.7, 0.3, True), Matcher(0.5, 0.5), Matcher(0.6, 0.2)])
def test_matches_are_those_of_torchvisions_matcher(matcher, shared, pairs):
    numbers = [3, 0, 7, 1]
    objects = [random_boxes(n, seed=i) for i, n in enumerate(numbers)]
    boxes, labels = pad_targets([{"boxes": b, "labels": torch.ones(len(b)).long()} for b in objects])
    candidates = random_boxes(1 if shared else 4, 500, seed=9)
    with mock.patch.object(matching, "_MAX_PAIRS", pairs):
        index, matched, background = match(boxes, labels >= 0, candidates, matcher)
    assert index.shape == matched.shape == background.shape == (4, 500)
    for i, b in enumerate(objects):
        if not len(b):
            assert background[i].all() and not matched[i].any()
            continue
        expected = matcher(box_iou(b, candidates[0 if shared else i]))
        assert matched[i].equal(expected >= 0) and background[i].equal(expected == -1)
        assert index[i][matched[i]].equal(expected[expected >= 0])
    assert 0 < matched.sum() < background.sum()


def test_targets_are_padded_to_the_largest_number_and_to_at_least_one():
    targets = [{"boxes": random_boxes(n), "labels": torch.arange(n)} for n in (2, 0, 3)]
    boxes, labels = pad_targets(targets)
    assert labels.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert boxes[2].equal(targets[2]["boxes"]) and boxes[0, :2].equal(targets[0]["boxes"])
    boxes, labels = pad_targets(targets[1:2])
    assert boxes.shape == (1, 1, 4) and labels.tolist() == [[-1]]


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (100, 300, (20, 60)),
        (5, 300, (5, 75)),
        (0, 300, (0, 80)),
        (100, 30, (20, 30)),
        (0, 0, (0, 0)),
        (3, 2, (3, 2)),
    ],
)
def test_as_many_are_drawn_as_by_torchvisions_sampler(positives, negatives, expected):
    sampler = BalancedPositiveNegativeSampler(80, 0.25)
    labels = torch.full((1, 500), -1)
    labels[:, :positives], labels[:, 150 : 150 + negatives] = 1, 0
    index, exists = sample(labels == 1, labels == 0, sampler)
    assert index.shape == exists.shape == (1, 80)
    drawn = labels[0][index[0][exists[0]]]
    assert ((drawn == 1).sum(), (drawn == 0).sum()) == expected
    assert len(drawn) == sum(expected) == len(index[0][exists[0]].unique())
    # Matches first, and padding last.
    assert drawn.diff().le(0).all() and exists[0].long().diff().le(0).all()
    theirs = sampler(list(labels))
    assert [part[0].sum() for part in theirs] == list(expected)


def test_every_candidate_is_drawn_as_often():
    sampler, counts = BalancedPositiveNegativeSampler(8, 0.25), torch.zeros(30)
    labels = torch.arange(30).lt(10).long()[None].expand(500, -1)
    torch.manual_seed(0)
    for _ in range(10):
        index, _ = sample(labels == 1, labels == 0, sampler)
        counts += index.flatten().bincount(minlength=30)
    # 2 of 10 and 6 of 20 in 5000 draws: 1000 and 1500, with deviations of about 28 and 32.
    assert (counts[:10] - 1000).abs().max() < 130 and (counts[10:] - 1500).abs().max() < 140


def test_what_is_drawn_from_the_generator_depends_on_shapes_alone():
    states = []
    for positives in (0, 7, 40):
        torch.manual_seed(3)
        matched = torch.arange(40)[None] < positives
        sample(matched, ~matched, BalancedPositiveNegativeSampler(16, 0.5))
        states.append(torch.get_rng_state())
    assert all(state.equal(states[0]) for state in states)


# ---- boxes, NMS, anchors -----------------------------------------------------------------------


def test_boxes_are_decoded_as_by_torchvisions_coder():
    boxes, anchors, coder = random_boxes(100), random_boxes(100, seed=1), BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = coder.encode_single(boxes, anchors)
    # Sides that grow beyond all measure are held back.
    deltas[0] = 100.0
    found = decode(deltas.view(2, 50, 4), anchors.view(2, 50, 4), coder).view(100, 4)
    assert found.equal(coder.decode_single(deltas, anchors))
    torch.testing.assert_close(found[1:], boxes[1:], rtol=1e-4, atol=1e-3)


def images_of(height, width):
    return ImageList(torch.zeros(2, 3, height, width), [(height, width)] * 2)


def maps_of(height, width, dtype=torch.float32):
    return [torch.zeros(2, 1, height // 16, width // 16, dtype=dtype)]


def test_anchors_are_made_once_for_a_size_and_kept_for_few_sizes():
    cache, generator = SizeCache(), AnchorGenerator(((32,),), ((0.5, 1.0),))
    made = mock.Mock(side_effect=lambda images, features: generator(images, features)[:1])
    sizes = list(itertools.product((32, 64, 96), (32, 64, 96, 128)))
    for height, width in sizes:
        for _ in range(2):
            (found,) = one = cache(made, images_of(height, width), maps_of(height, width))
            assert found.equal(generator(images_of(height, width), maps_of(height, width))[0])
    assert made.call_count == len(sizes) == 12
    assert cache(made, images_of(96, 128), maps_of(96, 128)) is one
    # The oldest went.
    cache(made, images_of(32, 32), maps_of(32, 32))
    assert made.call_count == 13
    # Another type, and another image of the same maps, are others.
    (low,) = cache(made, images_of(32, 32), maps_of(32, 32, torch.float64))
    assert low.dtype == torch.float64
    cache(made, images_of(40, 40), maps_of(32, 32))
    assert made.call_count == 15
    # A copy, such as that of averaged weights, takes no memory for them.
    copied = copy.deepcopy(cache)
    copied(made, images_of(40, 40), maps_of(32, 32))
    cache(made, images_of(40, 40), maps_of(32, 32))
    assert made.call_count == 16 and len(pickle.dumps(cache)) < 200


def test_anchors_first_made_in_inference_mode_can_be_trained_with():
    cache = SizeCache()
    generator = AnchorGenerator(((32,),), ((1.0,),))
    with torch.inference_mode():
        cache(generator, images_of(32, 32), maps_of(32, 32))
    anchors = cache(generator, images_of(32, 32), maps_of(32, 32))[0]
    scale = torch.ones(1, requires_grad=True)
    (anchors * scale).sum().backward()
    assert scale.grad == anchors.sum()


# ---- the RPN's losses --------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
def test_the_heads_of_sampled_anchors_are_those_of_all_at_once(low):
    model = build(*RESNET18, *SMALL_HEAD)
    randomize_predictions(model)
    samples = make_batch((2, 3))
    images, _ = model.transform([s["image"] for s in samples])
    features = list(model.backbone(images.tensors).values())
    head, size = model.rpn.head, sum(f.shape[2] * f.shape[3] for f in features) * 3
    sampled = torch.randint(size, (2, 50), generator=torch.Generator().manual_seed(0))
    # The corners of the largest and of the smallest map.
    sampled[:, :2], sampled[:, 2] = torch.tensor([0, size - 1]), features[0].shape[3] * 3 - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = model.rpn._predict_sampled(images, features, sampled)
        objectness, deltas = (
            torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, n) for level in part], dim=1)
            for part, n in zip(head(features), (1, 4), strict=True)
        )
    rows = torch.arange(2)[:, None]
    expected = (objectness[rows, sampled][..., 0], deltas[rows, sampled])
    gradients = []
    for part, other in zip(found, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, other, rtol=0.1 * low + 1e-5, atol=0.02 * low + 1e-5)
    for logits, boxes in (found, expected):
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


class OwnHead(torch.nn.Module):
    """What somebody puts in the place of torchvision's head."""

    def __init__(self, head):
        super().__init__()
        self.inner = head

    def forward(self, features):
        return self.inner([feature.tanh() for feature in features])


def put_in(module, name, part):
    setattr(module, name, part)


HEADS = {
    "a module": lambda rpn: put_in(rpn, "head", OwnHead(rpn.head)),
    "an activation": lambda rpn: put_in(rpn.head.conv[0], "1", torch.nn.Tanh()),
    "two convolutions": lambda rpn: rpn.head.conv.append(copy.deepcopy(rpn.head.conv[0])),
    "a dilation": lambda rpn: [put_in(rpn.head.conv[0][0], key, (2, 2)) for key in ("dilation", "padding")],
    "a hook": lambda rpn: rpn.head.register_forward_hook(lambda _, i, out: (out[0], [3 * d for d in out[1]])),
    "a part's hook": lambda rpn: rpn.head.bbox_pred.register_forward_hook(lambda _, i, out: 3 * out),
    "an input's hook": lambda rpn: rpn.head.conv.register_forward_pre_hook(lambda _, inputs: 3 * inputs[0]),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_another_kind_is_called_once_and_learns(name):
    model = build(*TINY, *SMALL_HEAD)
    randomize_predictions(model)
    assert _is_plain(model.rpn.head)
    HEADS[name](model.rpn)
    with mock.patch.object(model.rpn.head, "forward", wraps=model.rpn.head.forward) as called:
        losses, gradients = steps_of(model)
    assert called.call_count == 1 and all(gradient.any() for gradient in gradients.values())
    with mock.patch("plaintrain.modeling.rpn._is_plain", return_value=False):
        expected, wanted = steps_of(model)
    assert losses == expected and all(gradients[key].equal(wanted[key]) for key in wanted)


def test_a_head_called_for_all_anchors_gives_the_losses_of_those_sampled():
    model = build(*TINY, *SMALL_HEAD)
    randomize_predictions(model)
    losses, gradients = steps_of(model)
    with mock.patch("plaintrain.modeling.rpn._is_plain", return_value=False):
        expected, wanted = steps_of(model)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_the_rpn_learns_under_autocast(plain):
    model = build(*RESNET18, *SMALL_HEAD, "MODEL.RPN.CONV_DIMS", [-1] if plain else [-1, -1])
    with torch.autocast("cpu", torch.bfloat16):
        # The second time with weights that autocast has cast already.
        _, gradients = steps_of(model, times=2)
    assert all(gradient.any() for gradient in gradients.values())


def test_an_rpn_alone_makes_no_proposals_in_training():
    model = build(*RESNET18, *PROPOSALS)
    with mock.patch.object(model.rpn, "_propose", side_effect=AssertionError):
        assert len(model(two_samples())) == 2
