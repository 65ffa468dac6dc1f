"""Detectors and backbones, held against torchvision's: plaintrain.modeling."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import (
    FasterRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.common import Preprocess
from plaintrain.utils.errors import UserError

torch.set_num_threads(1)

K = 3
RCNN_LOSSES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
RETINANET_LOSSES = {"loss_cls", "loss_box_reg"}


# ---- helpers -----------------------------------------------------------------------------------


def make_cfg(*overrides):
    """Defaults for K classes on the CPU with nothing frozen; then KEY, value, KEY, value."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.ROI_HEADS.NUM_CLASSES", K,
            "MODEL.RETINANET.NUM_CLASSES", K,
            *overrides,
        ]
    )  # fmt: skip
    return cfg


RESNET18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 32)
SMALL_HEAD = ("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 5)
# Every candidate is kept, so no random choice is left.
KEEP_ALL = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10**6)
TINY = (
    "MODEL.BACKBONE.NAME", "build_tiny_backbone",
    "MODEL.TINY.CHANNELS", [8, 16, 32],
    "MODEL.TINY.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]],
)  # fmt: skip
RETINA = ("MODEL.META_ARCHITECTURE", "RetinaNet")


def make_sample(height, width, boxes=(), labels=(), seed=0, original=None):
    """A sample of random pixels; `original` is the height and width before the mapper resized it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        "target": {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        },
        "image_id": seed,
        "file_name": f"{seed}.jpg",
        "height": (original or (height, width))[0],
        "width": (original or (height, width))[1],
    }


def two_samples():
    """Two images of different sizes, with shorter sides of 64."""
    return [
        make_sample(64, 96, [[3, 4, 40, 50], [50, 10, 90, 60]], [0, 2], seed=1),
        make_sample(80, 64, [[10, 10, 50, 70]], [1], seed=2),
    ]


def build(*overrides, seed=0):
    torch.manual_seed(seed)
    return build_model(make_cfg(*overrides))


def randomize_predictions(model, spread=0.5):
    """Make a fresh model's scores and boxes differ widely from anchor to anchor."""
    predictors = ("cls_score", "bbox_pred", "cls_logits", "bbox_reg")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "head" in name:
            # Kaiming's scale keeps a tower's features from fading away.
            scale = spread if name.split(".")[-2] in predictors else math.sqrt(2)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * scale / math.sqrt(parameter[0].numel()))


def torchvision_inputs(samples, label_offset):
    """Images in 0..1 and targets, as torchvision's own models take them."""
    images = [sample["image"].float() / 255 for sample in samples]
    targets = [
        {"boxes": sample["target"]["boxes"], "labels": sample["target"]["labels"] + label_offset}
        for sample in samples
    ]
    return images, targets


def transform_arguments(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)):
    """Arguments that make torchvision's transform normalise alike and resize nothing."""
    mean, std = [v / 255 for v in mean], [v / 255 for v in std]
    return {"min_size": 64, "max_size": 10_000, "image_mean": mean, "image_std": std}


def torchvision_rcnn(**kwargs):
    """torchvision's Faster R-CNN that RESNET18, SMALL_HEAD and KEEP_ALL describe."""
    body = torchvision.models.resnet18(weights=None)
    backbone = BackboneWithFPN(
        body,
        {f"layer{i + 1}": str(i) for i in range(4)},
        [64, 128, 256, 512],
        32,
        extra_blocks=LastLevelMaxPool(),
    )
    return FasterRCNN(
        backbone,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 5, 2),
        box_head=TwoMLPHead(32 * 25, 32),
        box_predictor=FastRCNNPredictor(32, K + 1),
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
        rpn_post_nms_top_n_train=1000,
        **{**transform_arguments(), **kwargs},
    )


def torchvision_retinanet(**kwargs):
    """torchvision's RetinaNet on a ResNet-18 with its usual nine anchors."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=torchvision.ops.feature_pyramid_network.LastLevelP6P7(256, 256),
    )
    return RetinaNet(backbone, K, **{**transform_arguments(), **kwargs})


NINE_ANCHORS = [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)]
RETINANET18 = (
    *RETINA,
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.ANCHOR_GENERATOR.SIZES", NINE_ANCHORS,
)  # fmt: skip
PIXELS_TO_1 = ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], "MODEL.PIXEL_STD", [255.0, 255.0, 255.0])


def assert_same_detections(found, expected, label_offset, at_least):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["scores"]) >= at_least
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-5, atol=1e-6)
        assert ours["labels"].equal(theirs["labels"] - label_offset)
        assert ours["labels"].min() >= 0 and ours["labels"].max() < K


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# ---- the same as torchvision's -----------------------------------------------------------------


def test_names_and_shapes_of_faster_rcnn_are_torchvisions():
    plain = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=K + 1)
    assert shapes(build("MODEL.RESNETS.NORM", "BN")) == shapes(plain)


def test_names_and_shapes_of_retinanet_are_torchvisions():
    plain = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=K)
    model = build(*RETINANET18, "MODEL.RESNETS.DEPTH", 50)
    assert shapes(model) == shapes(plain)


def test_names_with_frozen_norms_are_those_without_the_counters():
    frozen = shapes(build(*RESNET18, *SMALL_HEAD, "MODEL.RESNETS.NORM", "FrozenBN"))
    trained = shapes(build(*RESNET18, *SMALL_HEAD))
    assert frozen == {k: v for k, v in trained.items() if not k.endswith("num_batches_tracked")}
    assert frozen != trained


def test_losses_of_faster_rcnn_are_torchvisions():
    model, plain = build(*RESNET18, *SMALL_HEAD, *KEEP_ALL), torchvision_rcnn()
    randomize_predictions(model, spread=0.1)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    found = model(samples)
    expected = plain(*torchvision_inputs(samples, label_offset=1))
    assert set(found) == RCNN_LOSSES
    assert all(loss.shape == () and loss.item() > 0 for loss in found.values())
    for ours, theirs in {
        "loss_cls": "loss_classifier",
        "loss_box_reg": "loss_box_reg",
        "loss_rpn_cls": "loss_objectness",
        "loss_rpn_loc": "loss_rpn_box_reg",
    }.items():
        assert found[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-5, abs=1e-5), ours


def test_losses_of_retinanet_are_torchvisions():
    model, plain = build(*RETINANET18), torchvision_retinanet()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    found = model(samples)
    expected = plain(*torchvision_inputs(samples, label_offset=0))
    assert set(found) == RETINANET_LOSSES
    assert all(loss.shape == () and loss.item() > 0 for loss in found.values())
    assert found["loss_cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-5, abs=1e-5)
    assert found["loss_box_reg"].item() == pytest.approx(
        expected["bbox_regression"].item(), rel=1e-5, abs=1e-5
    )


def test_detections_of_faster_rcnn_are_torchvisions():
    model = build(*RESNET18, *SMALL_HEAD, *PIXELS_TO_1).eval()
    plain = torchvision_rcnn(**transform_arguments((0, 0, 0), (255, 255, 255))).eval()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    with torch.no_grad():
        found, expected = model(samples), plain(torchvision_inputs(samples, 1)[0])
    assert_same_detections(found, expected, label_offset=1, at_least=10)


def test_detections_of_retinanet_are_torchvisions():
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


# ---- samples in, detections out ----------------------------------------------------------------

ARCHITECTURES = {
    "rcnn": (*TINY, *SMALL_HEAD),
    "retinanet": (*TINY, *RETINA, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
}


@pytest.fixture(params=ARCHITECTURES)
def detector(request):
    """A small detector of either architecture, in evaluation mode, that finds something anywhere."""
    model = build(*ARCHITECTURES[request.param]).eval()
    randomize_predictions(model)
    return model


def prefer(model, label):
    """Make a detector call everything `label`."""
    if isinstance(model, FasterRCNN):
        model.roi_heads.box_predictor.cls_score.bias.data[label + 1] = 20.0
    else:
        model.head.classification_head.cls_logits.bias.data.view(-1, K)[:, label] = 20.0


@pytest.mark.parametrize("label", range(K))
def test_labels_of_detections_count_from_0(detector, label):
    prefer(detector, label)
    with torch.no_grad():
        (found,) = detector([make_sample(64, 64)])
    assert found["scores"][0] > 0.5
    assert found["labels"][found["scores"] > 0.5].unique().tolist() == [label]


@pytest.mark.parametrize("label", range(K))
def test_labels_of_targets_count_from_0(detector, label):
    prefer(detector, label)
    detector.train()
    boxes = [[8, 8, 40, 40]]
    losses = []
    for target in range(K):
        torch.manual_seed(0)
        losses.append(detector([make_sample(64, 64, boxes, [target])])["loss_cls"].item())
    assert losses.index(min(losses)) == label


def test_boxes_are_in_the_original_images_pixels(detector):
    same, resized = make_sample(64, 96), make_sample(64, 96, original=(128, 480))
    with torch.no_grad():
        (found,), (scaled,) = detector([same]), detector([resized])
    assert len(found["boxes"]) > 0
    torch.testing.assert_close(scaled["boxes"], found["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]))
    assert scaled["scores"].equal(found["scores"])
    assert scaled["labels"].equal(found["labels"])


def test_detections_are_sorted_limited_and_inside_their_image(detector):
    samples = [make_sample(64, 96, seed=1), make_sample(40, 64, seed=2)]
    with torch.no_grad():
        found = detector(samples)
    assert len(found) == 2
    for output, sample in zip(found, samples, strict=True):
        assert 0 < len(output["scores"]) <= 100
        assert output["boxes"].shape == (len(output["scores"]), 4)
        assert output["scores"].diff().le(0).all()
        assert output["scores"].ge(0).all() and output["scores"].le(1).all()
        assert output["labels"].dtype == torch.int64
        assert output["boxes"].min() >= 0
        assert output["boxes"][:, 2].max() <= sample["width"]
        assert output["boxes"][:, 3].max() <= sample["height"]


def test_images_without_any_object_can_be_trained_on(detector):
    detector.train()
    for samples in (
        [make_sample(64, 64)],
        [make_sample(64, 64), make_sample(64, 64, [[5, 5, 40, 40]], [1], seed=1)],
    ):
        losses = detector(samples)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        box_losses = [
            value.item() for name, value in losses.items() if name in ("loss_box_reg", "loss_rpn_loc")
        ]
        assert all(value == 0 for value in box_losses) == (len(samples) == 1)


def test_training_does_not_change_the_samples(detector):
    detector.train()
    sample = make_sample(64, 64, [[5, 5, 40, 40]], [1])
    before = {key: value.clone() for key, value in {"image": sample["image"], **sample["target"]}.items()}
    detector([sample])
    after = {"image": sample["image"], **sample["target"]}
    assert all(after[key].equal(before[key]) for key in before)


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (build(*TINY, *SMALL_HEAD, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(first[name].equal(second[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


# ---- preprocessing -----------------------------------------------------------------------------


def test_images_are_normalised_and_padded_with_zeros_to_multiples_of_32():
    images = [
        torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 33),
        torch.tensor([50, 40, 250], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 64),
    ]
    batch, _ = Preprocess([10.0, 20.0, 40.0], [1.0, 2.0, 4.0], bgr=False)(images)
    assert batch.image_sizes == [(40, 33), (20, 64)]
    assert batch.tensors.shape == (2, 3, 64, 64)
    for i, values in enumerate([[0.0, 0.0, -2.5], [40.0, 10.0, 52.5]]):
        h, w = images[i].shape[1:]
        inside = batch.tensors[i, :, :h, :w]
        assert inside.equal(torch.tensor(values).view(3, 1, 1).expand(3, h, w))
        assert batch.tensors[i].abs().sum() == inside.abs().sum()


def test_bgr_swaps_the_channels_before_they_are_normalised():
    pixel = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    batch, _ = Preprocess([3.0, 1.0, 0.0], [1.0, 2.0, 4.0], bgr=True)([pixel])
    assert batch.tensors[0, :, 0, 0].tolist() == [0.0, 0.5, 0.25]


def test_a_bgr_model_finds_what_the_rgb_model_with_swapped_weights_finds():
    rgb = build(
        *TINY, *SMALL_HEAD, "MODEL.PIXEL_MEAN", [100.0, 110.0, 130.0], "MODEL.PIXEL_STD", [50.0, 60.0, 70.0]
    )
    bgr = build(
        *TINY, *SMALL_HEAD, "INPUT.FORMAT", "BGR",
        "MODEL.PIXEL_MEAN", [130.0, 110.0, 100.0], "MODEL.PIXEL_STD", [70.0, 60.0, 50.0],
    )  # fmt: skip
    state = rgb.state_dict()
    assert bgr.state_dict().keys() == state.keys()
    state["backbone.stages.0.0.0.weight"] = state["backbone.stages.0.0.0.weight"].flip(1)
    bgr.load_state_dict(state)
    samples = two_samples()
    with torch.no_grad():
        for one, other in zip(rgb.eval()(samples), bgr.eval()(samples), strict=True):
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)


def test_pixel_mean_and_std_reach_the_model():
    model = build(*TINY, *SMALL_HEAD, "MODEL.PIXEL_MEAN", [7.0, 7.0, 7.0], "MODEL.PIXEL_STD", [2.0, 2.0, 2.0])
    batch, _ = model.transform([torch.full((3, 32, 32), 11, dtype=torch.uint8)])
    assert batch.tensors.unique().tolist() == [2.0]


# ---- backbones ---------------------------------------------------------------------------------


def norm_types(module):
    """The classes of a module's norm layers."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
    return {type(m) for m in module.modules() if isinstance(m, kinds)}


NORM_CLASSES = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "GN": nn.GroupNorm}


@pytest.mark.parametrize("norm", NORM_CLASSES)
@pytest.mark.parametrize("freeze_at", range(6))
def test_the_first_stages_of_a_resnet_are_frozen(freeze_at, norm):
    cfg = make_cfg(*RESNET18, "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    body = build_backbone(cfg).body
    stages = [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3, body.layer4]
    for i, stage in enumerate(stages):
        frozen = i < freeze_at
        assert {p.requires_grad for p in stage.parameters()} == {not frozen}
        # Statistics of frozen stages do not move either.
        kind = FrozenBatchNorm2d if frozen and norm == "BN" else NORM_CLASSES[norm]
        assert norm_types(stage) == {kind}


def test_statistics_of_frozen_stages_stay_as_they_are_in_training():
    cfg = make_cfg(*RESNET18, "MODEL.BACKBONE.FREEZE_AT", 2)
    backbone = build_backbone(cfg).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items() if "running" in name}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    changed = {name for name in before if not after[name].equal(before[name])}
    assert changed == {
        name for name in before if name.startswith(("body.layer2", "body.layer3", "body.layer4"))
    }


@pytest.mark.parametrize("name", ["build_tiny_backbone", "build_mobilenet_v3_large_fpn_backbone"])
def test_the_first_stages_of_other_backbones_are_frozen(name):
    counts = []
    for freeze_at in range(4):
        cfg = make_cfg(
            "MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.FREEZE_AT", freeze_at,
            "MODEL.RESNETS.NORM", "BN", "MODEL.TINY.NORM", "BN", "MODEL.TINY.CHANNELS", [8, 16, 24],
        )  # fmt: skip
        backbone = build_backbone(cfg)
        frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
        counts.append(len(frozen))
        convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions[0].weight.requires_grad == (freeze_at == 0)
        assert convolutions[-1].weight.requires_grad
        assert (FrozenBatchNorm2d in norm_types(backbone)) == (freeze_at > 0)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("name", ["build_resnet_fpn_backbone", "build_tiny_backbone"])
@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_a_freeze_at_that_the_backbone_does_not_have_is_refused(name, freeze_at):
    cfg = make_cfg(*RESNET18, "MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    with pytest.raises(UserError, match=f"FREEZE_AT is {freeze_at}"):
        build_backbone(cfg)


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_the_fpn_has_its_own_norm(norm):
    backbone = build_backbone(make_cfg(*RESNET18, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", norm))
    assert norm_types(backbone.body) == {FrozenBatchNorm2d}
    assert norm_types(backbone.fpn) == ({NORM_CLASSES[norm]} if norm else set())


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_the_tiny_backbone_and_retinanets_head_have_their_own_norms(norm):
    model = build(
        *TINY, *RETINA, "MODEL.TINY.NORM", norm, "MODEL.RETINANET.NORM", "GN" if norm == "GN" else ""
    )
    assert norm_types(model.backbone) == {NORM_CLASSES[norm]}
    assert norm_types(model.head) == ({nn.GroupNorm} if norm == "GN" else set())


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        (RESNET18, {"0": 32, "1": 16, "2": 8, "3": 4, "pool": 2}),
        (RETINANET18, {"0": 16, "1": 8, "2": 4, "p6": 2, "p7": 1}),
        # torchvision's levels, too: its last two stages have the same stride.
        (("MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"), {"0": 4, "1": 4, "pool": 2}),
        (TINY, {"0": 16}),
        ((*TINY, "MODEL.TINY.CHANNELS", [8, 8]), {"0": 32}),
    ],
)
def test_levels_widths_and_strides_of_the_backbones(keys, sizes):
    backbone = build_backbone(make_cfg(*keys)).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 128, 128))
    assert backbone.level_names == list(features) == list(sizes)
    for name, size in sizes.items():
        assert features[name].shape == (1, backbone.out_channels, size, size)


def test_resnext_is_torchvisions():
    cfg = make_cfg(
        "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4
    )  # fmt: skip
    expected = torchvision.models.resnext50_32x4d(weights=None)
    found = build_backbone(cfg).body
    assert {k: v for k, v in shapes(expected).items() if not k.startswith("fc.")} == shapes(found)
    assert found.layer1[0].conv2.groups == 32


def test_stride_in_1x1_moves_the_stride_and_nothing_else():
    outputs = {}
    for flag in (False, True):
        backbone = build_backbone(
            make_cfg("MODEL.RESNETS.STRIDE_IN_1X1", flag, "MODEL.RESNETS.NORM", "BN")
        ).eval()
        for stage in (backbone.body.layer2, backbone.body.layer3, backbone.body.layer4):
            strides = (stage[0].conv1.stride, stage[0].conv2.stride)
            assert strides == (((2, 2), (1, 1)) if flag else ((1, 1), (2, 2)))
            assert stage[0].downsample[0].stride == (2, 2)
            assert stage[1].conv1.stride == stage[1].conv2.stride == (1, 1)
        with torch.no_grad():
            outputs[flag] = {k: v.shape for k, v in backbone(torch.zeros(1, 3, 64, 64)).items()}
    assert outputs[True] == outputs[False]


@pytest.mark.parametrize("depth", [18, 34, 101])
def test_depths_are_torchvisions(depth):
    # On the meta device, where a big network costs nothing.
    with torch.device("meta"):
        body = build_backbone(make_cfg("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", "BN")).body
        expected = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    assert shapes(body) == {k: v for k, v in shapes(expected).items() if not k.startswith("fc.")}


@pytest.mark.parametrize("architecture", ["rcnn", "retinanet"])
@pytest.mark.parametrize("backbone", ["mobilenet", "tiny_bn", "tiny_gn", "resnet_gn"])
def test_backbones_train_and_evaluate_in_both_architectures(backbone, architecture):
    keys = {
        "mobilenet": (
            "MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone", "MODEL.RESNETS.NORM", "BN",
            "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]],
        ),
        "tiny_bn": (*TINY, "MODEL.TINY.NORM", "BN"),
        "tiny_gn": TINY,
        "resnet_gn": (*RESNET18, "MODEL.RESNETS.NORM", "GN"),
    }[backbone]  # fmt: skip
    keys = (*keys, *RETINA, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0) if architecture == "retinanet" else keys
    model = build(*keys, *SMALL_HEAD)
    losses = model(two_samples())
    assert set(losses) == (RCNN_LOSSES if architecture == "rcnn" else RETINANET_LOSSES)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    with torch.no_grad():
        found = model.eval()(two_samples())
    assert len(found) == 2
    assert all(output["boxes"].isfinite().all() and len(output["boxes"]) for output in found)


# ---- keys that reach torchvision's model -------------------------------------------------------


def test_keys_of_faster_rcnn_are_honoured():
    model = build(
        *TINY,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 101,
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 102,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 103,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 104,
        "MODEL.RPN.NMS_THRESH", 0.61,
        "MODEL.RPN.IOU_THRESHOLDS", [0.21, 0.62],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 105,
        "MODEL.RPN.POSITIVE_FRACTION", 0.31,
        "MODEL.RPN.CONV_DIMS", [-1, -1],
        "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.41],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 106,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.32,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.07,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.43,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 6,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 3,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 24,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 2.0, 3.0, 4.0),
        "TEST.DETECTIONS_PER_IMAGE", 17,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 24]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.4, 1.5]],
    )  # fmt: skip
    rpn, heads = model.rpn, model.roi_heads
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (101, 103)
    model.eval()
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (102, 104)
    assert rpn.nms_thresh == 0.61
    assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.21, 0.62)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (105, 0.31)
    assert len(rpn.head.conv) == 2
    assert heads.proposal_matcher.high_threshold == heads.proposal_matcher.low_threshold == 0.41
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (106, 0.32)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.07, 0.43, 17)
    assert (heads.box_roi_pool.output_size, heads.box_roi_pool.sampling_ratio) == ((6, 6), 3)
    assert heads.box_head.fc6.weight.shape == (24, 32 * 36)
    assert tuple(heads.box_coder.weights) == (1.0, 2.0, 3.0, 4.0)
    assert tuple(rpn.anchor_generator.sizes) == ((8, 16, 24),)
    assert tuple(rpn.anchor_generator.aspect_ratios) == ((0.4, 1.5),)
    assert rpn.head.cls_logits.out_channels == 6


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


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_every_anchor_of_a_fresh_retinanet_has_the_prior_probability(prior):
    model = build(
        *TINY, *RETINA, "MODEL.RETINANET.PRIOR_PROB", prior, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0
    )
    assert model.head.classification_head.cls_logits.bias.sigmoid().tolist() == pytest.approx([prior] * 6 * K)
    with torch.no_grad():
        (found,) = model.eval()([make_sample(64, 64)])
    assert found["scores"].mean().item() == pytest.approx(prior, rel=0.2)


def test_one_anchor_list_serves_every_level():
    model = build(*RESNET18, *SMALL_HEAD, "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]])
    assert model.rpn.anchor_generator.sizes == ((32, 64),) * 5
    assert isinstance(model.rpn.anchor_generator, AnchorGenerator)
    assert model.rpn.head.cls_logits.out_channels == 6


# ---- clear errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("MODEL.META_ARCHITECTURE", "FasterRCNN"), ["META_ARCHITECTURE", "'FasterRCNN'", "GeneralizedRCNN"]),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn"), ["BACKBONE.NAME", "'build_resnet_fpn'", "nearest"]),
        (("MODEL.RESNETS.DEPTH", 20), ["RESNETS.DEPTH", "20", "18"]),
        (("MODEL.RESNETS.NORM", "LN"), ["RESNETS.NORM", "'LN'", "'GN'"]),
        (("MODEL.FPN.NORM", "FrozenBN"), ["FPN.NORM", "'FrozenBN'", "'GN'"]),
        ((*TINY, "MODEL.TINY.NORM", ""), ["TINY.NORM", "''", "'BN'"]),
        ((*TINY, "MODEL.TINY.CHANNELS", []), ["TINY.CHANNELS"]),
        (("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NUM_GROUPS", 32), ["NUM_GROUPS 32", "50"]),
        (
            ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
            ["RES2_OUT_CHANNELS", "256", "64"],
        ),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 0), ["ROI_HEADS.NUM_CLASSES", "0", "default_setup"]),
        ((*TINY, *RETINA, "MODEL.RETINANET.NUM_CLASSES", 0), ["RETINANET.NUM_CLASSES", "0", "default_setup"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]), ["SIZES", "1 level", "[[32], [64]]"]),
        ((*RESNET18, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]), ["SIZES", "5 levels"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [32, 64]), ["SIZES", "[32, 64]"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [32]), ["SIZES", "[32]"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[]]), ["SIZES"]),
        ((*RESNET18, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [0.5]]), ["ASPECT_RATIOS", "5 levels"]),
        (
            (*RESNET18, "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128, 256]]),
            ["SIZES", "same length"],
        ),
        ((*TINY, "MODEL.RPN.CONV_DIMS", []), ["CONV_DIMS"]),
        ((*TINY, "MODEL.RPN.CONV_DIMS", [64]), ["CONV_DIMS", "64"]),
        ((*TINY, "MODEL.PIXEL_MEAN", [1.0]), ["PIXEL_MEAN"]),
        ((*TINY, "MODEL.PIXEL_STD", [1.0, 0.0, 1.0]), ["PIXEL_STD"]),
        ((*TINY, "MODEL.DEVICE", "gpu"), ["MODEL.DEVICE", "'gpu'"]),
        ((*TINY, "MODEL.MASK_ON", True), ["MASK_ON"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        (*TINY, "MODEL.TINY.CHANNELS", [8, 28]),
        (*RESNET18, "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 40),
        (*TINY, *RETINA, "MODEL.RETINANET.NORM", "GN", "MODEL.TINY.OUT_CHANNELS", 40),
    ],
)
def test_widths_that_group_norm_cannot_divide_are_clear_errors_or_work(keys):
    try:
        model = build(*keys, *SMALL_HEAD)
    except UserError as e:
        assert "28" in str(e) or "40" in str(e)
    else:
        assert all(loss.isfinite() for loss in model(two_samples()).values())


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.5])
def test_a_prior_probability_outside_0_to_1_is_a_clear_error(prior):
    with pytest.raises(UserError, match="PRIOR_PROB"):
        build(*TINY, *RETINA, "MODEL.RETINANET.PRIOR_PROB", prior)


def test_a_cuda_device_that_is_not_there_is_a_clear_error():
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match=rf"MODEL\.DEVICE is '{name}'"):
        build(*TINY, "MODEL.DEVICE", name)
