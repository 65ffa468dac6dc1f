"""Backbones, held against torchvision's, and their folded norms: modeling.backbones."""

import copy

import pytest
import torch
import torchvision
from model_helpers import RESNET18, RETINANET18, SSD, SSDLITE, TINY, make_cfg, norm_types, shapes
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.modeling.backbones import FoldedConv2d, FoldedNorm, build_backbone, fold_frozen_norms

NORM_CLASSES = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "GN": nn.GroupNorm}
VGG = (*SSD, "MODEL.BACKBONE.NAME", "build_ssd_vgg16_backbone", "INPUT.FIXED_SIZE", (300, 300))


@pytest.mark.parametrize(("freeze_at", "norm"), [(0, "BN"), (1, "GN"), (2, "BN"), (3, "FrozenBN"), (5, "BN")])
def test_the_first_stages_of_a_resnet_are_frozen(freeze_at, norm):
    keys = ("MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.NORM_EPS", 0.25, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    body = build_backbone(make_cfg(*RESNET18, *keys)).body
    assert {m.eps for m in body.modules() if hasattr(m, "eps")} == {0.25}
    stages = [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3, body.layer4]
    for i, stage in enumerate(stages):
        frozen = i < freeze_at
        assert {p.requires_grad for p in stage.parameters()} == {not frozen}
        # Statistics of frozen stages do not move either.
        kind = FrozenBatchNorm2d if frozen and norm == "BN" else NORM_CLASSES[norm]
        assert norm_types(stage) == {kind}


# Convolutions in the first stages. VGG-16's fifth stage comes after SSD's first output.
MOBILENET = [0, 3, 9, 24, 46, 61, 62]
FROZEN = {
    "tiny": ((*TINY, "MODEL.TINY.NORM", "BN"), [0, 2, 4, 6]),
    "mobilenet": (("MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"), MOBILENET),
    "vgg": (VGG, [0, 2, 4, 7, 10, 13]),
    "ssdlite": (SSDLITE, MOBILENET),
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_first_stages_of_other_backbones_are_frozen(name):
    keys, counts = FROZEN[name]
    for freeze_at, count in enumerate(counts):
        overrides = (*keys, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
        with torch.device("meta"):
            backbone = build_backbone(make_cfg(*overrides))
        is_trained = [p.requires_grad for p in backbone.parameters() if p.ndim == 4]
        assert is_trained == [False] * count + [True] * (len(is_trained) - count)
        # Statistics of frozen stages do not move either.
        assert all(m.weight.requires_grad for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
        assert (FrozenBatchNorm2d in norm_types(backbone)) == (freeze_at > 0 and name != "vgg")


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        (RESNET18, {"0": 32, "1": 16, "2": 8, "3": 4, "pool": 2}),
        (RETINANET18, {"0": 16, "1": 8, "2": 4, "p6": 2, "p7": 1}),
        # torchvision's levels, too: its last two stages have the same stride.
        (("MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"), {"0": 4, "1": 4, "pool": 2}),
        (TINY, {"0": 16}),
        ((*TINY, "MODEL.TINY.CHANNELS", [8, 8]), {"0": 32}),
        ((*TINY, "MODEL.TINY.NUM_LEVELS", 3), {"0": 64, "1": 32, "2": 16}),
    ],
)
def test_levels_widths_and_strides_of_the_backbones(keys, sizes):
    backbone = build_backbone(make_cfg(*keys)).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 128, 128))
    assert backbone.level_names == list(features) == list(sizes)
    for (name, size), stride in zip(sizes.items(), backbone.strides, strict=True):
        assert size * stride == 128
        assert features[name].shape == (1, backbone.out_channels, size, size)


def test_stride_in_1x1_moves_the_stride_and_nothing_else():
    for flag in (False, True):
        with torch.device("meta"):
            backbone = build_backbone(make_cfg("MODEL.RESNETS.STRIDE_IN_1X1", flag))
        for stage in (backbone.body.layer2, backbone.body.layer3, backbone.body.layer4):
            strides = (stage[0].conv1.stride, stage[0].conv2.stride)
            assert strides == (((2, 2), (1, 1)) if flag else ((1, 1), (2, 2)))
            assert stage[0].downsample[0].stride == (2, 2)
            assert stage[1].conv1.stride == stage[1].conv2.stride == (1, 1)


def test_groups_and_width_make_a_resnext():
    # On the meta device, where a big network costs nothing.
    with torch.device("meta"):
        keys = ("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4)
        body = build_backbone(make_cfg(*keys, "MODEL.RESNETS.NORM", "BN")).body
        expected = torchvision.models.resnext50_32x4d(weights=None)
    assert shapes(body) == {k: v for k, v in shapes(expected).items() if not k.startswith("fc.")}
    assert body.layer1[0].conv2.groups == expected.layer1[0].conv2.groups


@pytest.mark.parametrize("channels", [32, 512])
@pytest.mark.parametrize("source", ["p5", "res5"])
def test_p6_is_made_from_p5_or_res5(source, channels):
    """Also where both have the 512 channels of a ResNet-18's res5."""
    keys = (*RETINANET18, "MODEL.FPN.OUT_CHANNELS", channels, "MODEL.FPN.P6_IN_FEATURE", source)
    backbone, inputs = build_backbone(make_cfg(*keys)).eval(), {}
    backbone.fpn.extra_blocks.p6.register_forward_hook(lambda _, args, __: inputs.update(p6=args[0]))
    with torch.no_grad():
        outputs = backbone(torch.ones(1, 3, 64, 64))
        res5 = backbone.body(torch.ones(1, 3, 64, 64))["2"]
    assert inputs["p6"].equal(outputs["2"] if source == "p5" else res5)


@pytest.mark.parametrize(
    "keys", [(*TINY, "MODEL.TINY.CHANNELS", [8, 28]), (*RESNET18, "MODEL.FPN.NORM", "GN")]
)
def test_group_norm_takes_widths_that_32_groups_do_not_divide(keys):
    cfg = make_cfg(*keys, "MODEL.FPN.OUT_CHANNELS", 40, "MODEL.TINY.OUT_CHANNELS", 40)
    features = build_backbone(cfg)(torch.rand(1, 3, 64, 64))
    assert all(f.shape[1] == 40 and f.isfinite().all() for f in features.values())


def test_folded_norms_have_outputs_and_gradients_of_norms_on_their_own():
    torch.manual_seed(0)
    plain = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    # Factors and statistics of a trained network.
    for name, buffer in plain.named_buffers():
        buffer.uniform_(0.5, 1.5)
        buffer.sub_(1.0 * name.endswith(("bias", "running_mean")))
    folded = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    fold_frozen_norms(folded)
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, FoldedConv2d) for m in convolutions) and len(convolutions) == 20
    # What is loaded after the folding counts.
    folded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    outputs, expected = folded(x), plain(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for out in (outputs, expected):
        out.square().sum().backward()
    for (name, ours), theirs in zip(folded.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    # A copy has its own norms.
    copied = copy.deepcopy(folded)
    for norm in (m for m in folded.modules() if isinstance(m, FoldedNorm)):
        norm.bias.zero_()
    torch.testing.assert_close(copied(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded(x), expected, atol=1e-2)
    # In evaluation nothing is folded, and what counts is the norm's mode alone.
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    assert folded.eval()(x).equal(plain.eval()(x))
    folded.conv1.train()
    assert folded(x).equal(plain(x))
    folded.bn1.train()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def test_norms_that_learn_or_follow_no_convolution_are_left():
    parts = [nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4)]
    module = nn.Sequential(*parts, nn.ReLU(), FrozenBatchNorm2d(4))
    fold_frozen_norms(module)
    assert list(module)[:4] == parts and type(module[5]) is FrozenBatchNorm2d
    # A backbone has none of its own left.
    backbone = build_backbone(make_cfg(*RESNET18, "MODEL.RESNETS.NORM", "FrozenBN"))
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 20 and all(isinstance(norm, FoldedNorm) for norm in norms)
