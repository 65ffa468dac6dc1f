"""RetinaNet, FCOS, SSD and their anchors: steps and detections are torchvision's, without its sync points."""

import copy
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
import torchvision
from model_helpers import (
    FCOS,
    RETINA,
    SSD,
    TINY,
    K,
    assert_same_detections,
    build,
    make_batch,
    make_sample,
    norm_types,
    random_boxes,
    randomize_predictions,
    torchvision_inputs,
    torchvision_twin,
    two_samples,
    two_squares,
)
from shared.syncs import count_syncs, training_step
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import sigmoid_focal_loss

from plaintrain.modeling import detector, matching
from plaintrain.modeling.anchors import CachedAnchorGenerator, CachedBoxGenerator, DefaultAnchorGenerator
from plaintrain.modeling.fcos import match_centers
from plaintrain.modeling.losses import focal_loss
from plaintrain.modeling.matching import pad_targets

LOSSES = {"loss_cls": "classification", "loss_box_reg": "bbox_regression"}
FCOS_LOSSES = {
    "loss_fcos_cls": "classification",
    "loss_fcos_loc": "bbox_regression",
    "loss_fcos_ctr": "bbox_ctrness",
}
GIOU = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou")
DETECTRON2 = ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator")
TINY_BN = (*TINY, "MODEL.TINY.NORM", "BN")
STEPS = ("MODEL.SSD.SCALES", [0.2, 0.5, 0.9], "MODEL.SSD.STEPS", [4, 8])
MODELS = {
    "retinanet": (*TINY, *RETINA),
    "retinanet, giou": (*TINY, *RETINA, *GIOU),
    "retinanet, detectron2": (*TINY, *RETINA, *DETECTRON2),
    "fcos": (*TINY, *FCOS),
    "ssd": (*TINY_BN, *SSD),
    "ssdlite": (*TINY_BN, *SSD, *STEPS, "MODEL.SSD.HEAD_NAME", "SSDLiteHead"),
}


@pytest.mark.parametrize("name", ["retinanet", "retinanet, giou", "fcos", "ssd"])
def test_a_training_step_waits_for_nothing_at_any_batch_size(name):
    model = build(*MODELS[name])
    for batch in (2, 6):
        step = training_step(model, ((two_squares() if name == "ssd" else two_samples()) * 3)[:batch])
        # The first makes the anchors.
        step()
        counts = count_syncs(step)
        # The one is the check of the boxes, which are on the host.
        assert counts["syncs"] == 1 and counts["uploads"] == 0, counts


@pytest.mark.parametrize("numbers", [(2, 0, 17, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_detections_are_torchvisions(name, numbers):
    model = build(*MODELS[name])
    randomize_predictions(model, spread=0.1)
    sizes = [(64, 64)] if name.startswith("ssd") else [(80, 64), (64, 96)]
    plain, samples = torchvision_twin(model), make_batch(numbers, sizes)
    if "giou" in name:
        plain.head.regression_head._loss_type = "giou"
    images, targets = torchvision_inputs(samples, model.label_offset)
    losses, expected = model(samples), plain(images, targets)
    names = FCOS_LOSSES if name.startswith("fcos") else LOSSES
    assert losses.keys() == names.keys()
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-5, atol=1e-6)
        # SSD learns nothing of an image without objects, and the others from their scores alone.
        assert losses[ours] > 0 or (max(numbers) == 0 and (model.label_offset or "cls" not in ours))
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=key)
    if name == "retinanet, detectron2":
        # It cuts boxes after NMS, see below.
        return
    for network in (model, plain):
        network.score_thresh, network.topk_candidates, network.detections_per_img = 0.0, 100, 50
    with torch.no_grad():
        detections, expected = model.eval()(samples), plain.eval()(images)
    assert_same_detections(detections, expected, model.label_offset, at_least=10)


@pytest.mark.parametrize(
    ("levels", "radius", "pairs"),
    # With one pair, image by image.
    [((64, 16, 4), 1.5, 1), ((64, 16, 4), 4.0, 2**24), ((84,), 1.5, 2**24)],
)
def test_match_centers_is_torchvisions(levels, radius, pairs):
    objects = [random_boxes(n, seed=i) for i, n in enumerate((9, 0, 40, 1))]
    # Areas that differ by less than 8 are the same to torchvision, and the first has the location.
    objects[0] = torch.cat([torch.tensor([[10.0, 10, 50, 50], [10, 10, 50, 49.9]]), objects[0]])
    # So large that torchvision leaves it out.
    objects[3] = torch.tensor([[-9000.0, -9000, 9000, 9000]])
    boxes, labels = pad_targets([{"boxes": b, "labels": torch.ones(len(b)).long()} for b in objects])
    # Padding would match as well.
    boxes[labels < 0] = torch.tensor([10.0, 10, 40, 40])
    maps = [torch.zeros(1, 1, side, side) for side in (8, 4, 2)]
    generator = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)
    # What torchvision's FCOS hands its head: for each image `[N]`, -1 without an object.
    model, assigned = build(*MODELS["fcos"]), []
    model.center_sampling_radius = radius
    with mock.patch.object(model.head, "compute_loss", lambda *args: assigned.append(args[3])):
        detection.FCOS.compute_loss(model, [{"boxes": b} for b in objects], {}, [anchors] * 4, levels)
    expected = torch.stack(assigned[0])
    with mock.patch.object(matching, "_MAX_PAIRS", pairs):
        index, matched = match_centers(boxes, labels >= 0, anchors, levels, radius)
    assert matched.equal(expected >= 0) and index[matched].equal(expected[matched])
    assert matched.any(dim=1).tolist() == [True, False, True, False]
    assert len(index[2][matched[2]].unique()) > 5


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.7, 0.0), (-1, 1.5), (0.0, 0.5)])
def test_focal_loss_and_its_gradient_are_torchvisions_and_finite(alpha, gamma):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 50, K, generator=generator) * 6).requires_grad_()
    labels = torch.randint(-1, K, (2, 50), generator=generator)
    truth = torch.nn.functional.one_hot(labels.clamp(min=0), K) * (labels >= 0)[..., None].float()
    loss = focal_loss(logits, labels, alpha, gamma)
    expected = sigmoid_focal_loss(logits, truth, alpha, gamma).sum(dim=-1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    weights = torch.rand(2, 50, generator=generator)
    gradients = [torch.autograd.grad((part * weights).sum(), logits)[0] for part in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    extreme = torch.tensor([[[-1e4, 1e4, 0.0]] * 4], requires_grad=True)
    loss = focal_loss(extreme, torch.tensor([[0, 1, 2, -1]]), alpha, gamma)
    loss.sum().backward()
    assert loss.isfinite().all() and loss[0, 0] > 2000 and extreme.grad.isfinite().all()


def make_anchors(generator, height, width, strides=(8, 16), batch=2):
    """The anchors of each image of a batch, which are equal."""
    maps = [torch.zeros(batch, 1, -(-height // stride), -(-width // stride)) for stride in strides]
    sizes = [(height, width - 14), (height - 12, width)][:batch]
    anchors = generator(ImageList(torch.zeros(batch, 3, height, width), sizes), maps)
    assert len(anchors) == batch and anchors[0].equal(anchors[-1])
    return anchors


@pytest.mark.parametrize(
    ("kind", "plain", "arguments"),
    [
        (CachedAnchorGenerator, AnchorGenerator, (((32, 40), (64, 80)), ((0.5, 1.0),) * 2)),
        (CachedBoxGenerator, DefaultBoxGenerator, ([[2], [2, 3]], 0.2, 0.9, None, [8, 16])),
    ],
)
def test_generators_make_torchvisions_anchors_once_for_each_of_the_last_sizes(kind, plain, arguments):
    generator, plain = kind(*arguments), plain(*arguments)
    # The second image has the maps of the first.
    for size in ((32, 32), (30, 30), *itertools.product((40, 64, 96), (32, 64, 96))):
        first, second = make_anchors(generator, *size)
        assert first is second and first is make_anchors(generator, *size, batch=1)[0]
        assert first.equal(make_anchors(plain, *size)[0])
    assert not generator.state_dict() and not list(generator.buffers())
    assert len(generator._anchors) == 8
    # A copy, such as that of averaged weights, takes no memory for them.
    assert not copy.deepcopy(generator)._anchors and len(generator._anchors) == 8
    images, maps = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)]), [torch.zeros(1, 1, 4, 4).double()] * 2
    assert generator(images, maps)[0].dtype == torch.float64


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_detectron2s_anchors_follow_the_formula(offset):
    sizes, ratios, strides = ((32.0, 40.3), (64.0, 80.6)), ((0.5, 1.0, 2.0),) * 2, [8, 16]
    found, _ = make_anchors(DefaultAnchorGenerator(sizes, ratios, strides, offset), 32, 48)
    expected = []
    for level, stride in enumerate(strides):
        locations = itertools.product(range(32 // stride), range(48 // stride))
        for (row, column), ratio, size in itertools.product(locations, ratios[level], sizes[level]):
            # Height / width is the ratio, height * width the size squared.
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            x, y = (column + offset) * stride, (row + offset) * stride
            expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(found, torch.tensor(expected))
    if not offset:
        # The order is torchvision's, and the difference only its rounding.
        rounded, _ = make_anchors(AnchorGenerator(sizes, ratios), 32, 48)
        assert 0 < (found - rounded).abs().max() <= 0.5
    # 800 / 64 is 12.5: the last map has 13 rows, and torchvision's stride is 800 // 13.
    strides = [4, 8, 16, 32, 64]
    generator = DefaultAnchorGenerator(((32,),) * 5, ((1.0,),) * 5, strides)
    found = make_anchors(generator, 800, 1088, strides)[0][-13 * 17 :]
    rows = ((found[:, 1] + found[:, 3]) / 2).view(13, 17)
    assert rows[:, 0].tolist() == [64 * row for row in range(13)]


def test_with_detectron2s_anchors_boxes_are_cut_after_nms(monkeypatch):
    keys = (*TINY, *RETINA, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.012, "TEST.DETECTIONS_PER_IMAGE", 1000)
    model = build(*keys, *DETECTRON2).eval()
    randomize_predictions(model)
    before = build(*keys).eval()
    before.load_state_dict(model.state_dict())
    before.anchor_generator = model.anchor_generator
    samples = two_samples()
    with torch.no_grad():
        found, cut_before = model(samples), before(samples)
        # With the cut moved behind it, and what it leaves nothing of left out.
        cut = torchvision.ops.clip_boxes_to_image
        monkeypatch.setattr(detector, "clip_boxes", lambda boxes, sizes: boxes)
        expected = before(samples)
    for sample, output in zip(samples, expected, strict=True):
        output["boxes"] = cut(output["boxes"], (sample["height"], sample["width"]))
        inside = (output["boxes"][:, 2:] > output["boxes"][:, :2]).all(dim=1)
        output.update({name: values[inside] for name, values in output.items()})
    assert_same_detections(found, expected, label_offset=0, at_least=10)
    assert any(len(a["scores"]) != len(b["scores"]) for a, b in zip(found, cut_before, strict=True))
    # Boxes outside of the image are left out.
    model.score_thresh = 0.0
    outputs = {"cls_logits": torch.zeros(1, 4, K), "bbox_regression": torch.zeros(1, 4, 4)}
    boxes = torch.tensor([[-9.0, 2, -1, 8], [4, 64, 20, 80], [-5, -5, 5, 5], [50, 50, 90, 60]])
    with mock.patch.object(model, "_predict", lambda images: (outputs, boxes, [4])):
        (found,) = model._detect(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]))
    inside = {(0.0, 0.0, 5.0, 5.0), (50.0, 50.0, 64.0, 60.0)}
    assert {tuple(box) for box in found["boxes"].tolist()} == inside
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) == 2 * K


@pytest.mark.parametrize(("alpha", "gamma", "beta"), [(0.4, 1.5, 0.3), (-1.0, 0.0, 0.1)])
def test_the_numbers_of_retinanets_losses_reach_them(alpha, gamma, beta, monkeypatch):
    keys = {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma, "SMOOTH_L1_LOSS_BETA": beta}
    plain = build(*TINY, *RETINA)
    model = build(*TINY, *RETINA, *(x for k, v in keys.items() for x in (f"MODEL.RETINANET.{k}", v)))
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    losses, default = model(samples), plain(samples)
    # torchvision's own step, with its losses set to these numbers.
    plain.head.regression_head._loss_type = "smooth_l1"
    focal = functools.partial(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss", focal)
    box_loss = functools.partial(retinanet._box_loss, cnf={"beta": beta})
    monkeypatch.setattr(retinanet, "_box_loss", box_loss)
    expected = detection.RetinaNet.forward(plain, *torchvision_inputs(samples))
    for name, theirs in LOSSES.items():
        torch.testing.assert_close(losses[name], expected[theirs], rtol=1e-5, atol=1e-5)
    assert all((losses[name] - default[name]).abs() > 0.01 for name in losses)


def test_retinanets_moving_average_of_foreground_is_detectron2s():
    sample = two_samples()[0]
    plain = build(*TINY, *RETINA)
    randomize_predictions(plain)
    model = build(*TINY, *RETINA, "MODEL.RETINANET.LOSS_NORMALIZER", "ema")
    model.load_state_dict(plain.state_dict(), strict=False)
    normalizer = 100.0
    for _ in range(2):
        expected = plain([sample])
        with torch.no_grad():
            model([sample])
        ratios = [expected[name] / loss for name, loss in model([sample]).items()]
        # The losses are divided by n, and by 0.9 * normalizer + 0.1 * n.
        numbers = [0.9 * normalizer / (ratio.item() - 0.1) for ratio in ratios]
        assert numbers == pytest.approx([round(numbers[0])] * 2, rel=1e-4)
        normalizer = 0.9 * normalizer + 0.1 * round(numbers[0])
    assert model.state_dict()["loss_normalizer"].item() == pytest.approx(normalizer)


@pytest.mark.parametrize(("name", "anchors"), [("retinanet", 6), ("fcos", 1)])
def test_a_fresh_model_has_the_prior_probability_everywhere(name, anchors):
    model = build(*MODELS[name], "MODEL.RETINANET.PRIOR_PROB", 0.2, "MODEL.FCOS.PRIOR_PROB", 0.2).eval()
    bias = model.head.classification_head.cls_logits.bias
    assert bias.sigmoid().tolist() == pytest.approx([0.2] * anchors * K)
    with torch.no_grad():
        images, _ = model.transform([make_sample(64, 64)["image"]])
        outputs = model.head(list(model.backbone(images.tensors).values()))
    assert outputs["cls_logits"].sigmoid().mean().item() == pytest.approx(0.2, rel=0.2)
    if name == "fcos":
        # What passes the ReLU of the box outputs is the same everywhere, and above 0.
        assert outputs["bbox_regression"].min() > 0.1


def test_norms_of_backbone_and_head():
    both = ("MODEL.TINY.NORM", "BN", "MODEL.RETINANET.NORM", "GN")
    for name, keys, backbone, head in (
        ("retinanet", both, nn.BatchNorm2d, nn.GroupNorm),
        # SSDLite's head has the norm of the backbone.
        ("ssdlite", ("MODEL.TINY.NORM", "GN"), nn.GroupNorm, nn.GroupNorm),
        ("ssdlite", ("MODEL.TINY.NORM", "BN"), nn.BatchNorm2d, nn.BatchNorm2d),
    ):
        model = build(*MODELS[name], *keys)
        assert norm_types(model.backbone) == {backbone} and norm_types(model.head) == {head}


def test_ssds_images_are_not_padded_and_need_not_be_square():
    model = build(*MODELS["ssd"], "INPUT.FIXED_SIZE", (40, 72), "MODEL.SSD.SCORE_THRESH_TEST", 0.0).eval()
    randomize_predictions(model)
    batch, _ = model.transform([make_sample(40, 72)["image"]])
    assert batch.tensors.shape == (1, 3, 40, 72)
    with torch.no_grad():
        (found,) = model([make_sample(40, 72, original=(80, 720))])
    assert 80 >= found["boxes"][:, 3].max() > 72 and 720 >= found["boxes"][:, 2].max() > 400
