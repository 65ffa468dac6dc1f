"""Backbones: an image tensor in, a dict of feature maps of one width out.

Those that any detector but SSD can use set `out_channels`, `level_names` (the keys of their output,
finest first) and `strides` (input pixels per location, one a level).
Parameter names are torchvision's.
"""

import functools
import math

from torch import nn
from torchvision.models import mobilenet_v3_large, vgg16
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from plaintrain.modeling.frozen_norm import fold_frozen_norms
from plaintrain.utils.errors import UserError, nearest

_NORMS = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels, eps=1e-5: nn.GroupNorm(math.gcd(32, channels), channels, eps),
}
_RESNETS = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}


def get_norm(name, key, allowed=("", "BN", "SyncBN", "GN")):
    """The norm layer a config key names: a callable from channels to a module, or None for "".

    GN has 32 groups, or as many of them as divide the channels.

    Raises:
        UserError: names the key and the allowed values.
    """
    if name not in allowed:
        raise UserError(f"{key} is {name!r}, but must be one of {', '.join(map(repr, allowed))}")
    return _NORMS[name] if name else None


def _freeze(stages, freeze_at):
    """Stop the first `freeze_at` stages from training, their batch-norm statistics included."""
    if not 0 <= freeze_at <= len(stages):
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but must be 0 to {len(stages)}")
    for stage in stages[:freeze_at]:
        for module in stage:
            module.requires_grad_(False)
            for parent in list(module.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                        setattr(parent, name, FrozenBatchNorm2d(child.num_features, child.eps))


def _resnet(cfg):
    resnets = cfg.MODEL.RESNETS
    norms = ("FrozenBN", "BN", "SyncBN", "GN")
    norm = functools.partial(get_norm(resnets.NORM, "MODEL.RESNETS.NORM", norms), eps=resnets.NORM_EPS)
    if resnets.DEPTH not in _RESNETS:
        raise UserError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but must be one of {list(_RESNETS)}")
    block, layers = _RESNETS[resnets.DEPTH]
    groups, width = resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
    if block is BasicBlock and (groups, width) != (1, 64):
        raise UserError(
            f"MODEL.RESNETS.NUM_GROUPS {groups} and WIDTH_PER_GROUP {width} need a DEPTH of 50 or more"
        )
    if resnets.RES2_OUT_CHANNELS not in (0, 64 * block.expansion):
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}, but depth "
            f"{resnets.DEPTH} has {64 * block.expansion}"
        )
    if resnets.STRIDE_IN_1X1 and block is BasicBlock:
        raise UserError(f"MODEL.RESNETS.STRIDE_IN_1X1 needs a DEPTH of 50 or more, not {resnets.DEPTH}")
    body = ResNet(block, layers, groups=groups, width_per_group=width, norm_layer=norm)
    if resnets.STRIDE_IN_1X1:
        for stage in (body.layer2, body.layer3, body.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    stem = nn.ModuleList([body.conv1])
    if isinstance(body.bn1, nn.BatchNorm2d | nn.SyncBatchNorm) and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        body.bn1 = FrozenBatchNorm2d(64, body.bn1.eps)
    stem.append(body.bn1)
    _freeze([stem, body.layer1, body.layer2, body.layer3, body.layer4], cfg.MODEL.BACKBONE.FREEZE_AT)
    return body, 64 * block.expansion


def _resnet_fpn(cfg, body, width, stages, extra_blocks, extra_names):
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{stage}": str(i) for i, stage in enumerate(stages)},
        in_channels_list=[width * 2 ** (stage - 1) for stage in stages],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        extra_blocks=extra_blocks,
        norm_layer=get_norm(cfg.MODEL.FPN.NORM, "MODEL.FPN.NORM"),
    )
    backbone.level_names = [str(i) for i in range(len(stages))] + extra_names
    backbone.strides = [2 ** (stages[0] + 1 + i) for i in range(len(backbone.level_names))]
    return backbone


def build_resnet_fpn_backbone(cfg):
    """ResNet or ResNeXt with an FPN on res2 to res5; levels of stride 4, 8, 16, 32 and 64."""
    body, width = _resnet(cfg)
    return _resnet_fpn(cfg, body, width, [1, 2, 3, 4], LastLevelMaxPool(), ["pool"])


def build_retinanet_resnet_fpn_backbone(cfg):
    """ResNet or ResNeXt with an FPN on res3 to res5, P6 from P5 or res5, P7 from P6; strides 8 to 128."""
    body, width = _resnet(cfg)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top = LastLevelP6P7(channels if cfg.MODEL.FPN.P6_IN_FEATURE == "p5" else width * 8, channels)
    top.use_P5 = cfg.MODEL.FPN.P6_IN_FEATURE == "p5"
    return _resnet_fpn(cfg, body, width, [2, 3, 4], top, ["p6", "p7"])


def _split(features, starts):
    """The layers of a network as stages, each from one of `starts` to the next."""
    return [features[start:end] for start, end in zip(starts, [*starts[1:], len(features)], strict=True)]


def _mobilenet(norm, reduced_tail, freeze_at):
    """(layers of MobileNetV3-Large, where its stages start), the first stages frozen."""
    features = mobilenet_v3_large(norm_layer=norm, reduced_tail=reduced_tail).features
    starts = [0] + [i for i, block in enumerate(features) if getattr(block, "_is_cn", False)]
    starts.append(len(features) - 1)
    _freeze(_split(features, starts), freeze_at)
    return features, starts


def build_mobilenet_v3_large_fpn_backbone(cfg):
    """MobileNetV3-Large with an FPN on its last two stages; levels of stride 32, 32 and 64."""
    norm = get_norm(cfg.MODEL.RESNETS.NORM, "MODEL.RESNETS.NORM", ("FrozenBN", "BN", "SyncBN"))
    norm = functools.partial(norm, eps=cfg.MODEL.RESNETS.NORM_EPS)
    features, starts = _mobilenet(norm, False, cfg.MODEL.BACKBONE.FREEZE_AT)
    backbone = BackboneWithFPN(
        features,
        return_layers={str(starts[-2]): "0", str(starts[-1]): "1"},
        in_channels_list=[features[i].out_channels for i in starts[-2:]],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=get_norm(cfg.MODEL.FPN.NORM, "MODEL.FPN.NORM"),
    )
    backbone.level_names, backbone.strides = ["0", "1", "pool"], [32, 32, 64]
    return backbone


def build_ssd_vgg16_backbone(cfg):
    """VGG-16 with SSD's further levels: 6 of them, of stride 8 to the whole image at 300 pixels."""
    features = vgg16().features
    starts = [0] + [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)][:-1]
    _freeze(_split(features, starts), cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDFeatureExtractorVGG(features, highres=False)


def build_ssdlite_mobilenet_v3_large_backbone(cfg):
    """MobileNetV3-Large with the reduced tail of its paper's table 6, and SSDlite's 4 further levels.

    Batch norm with torchvision's eps 0.001 and momentum 0.03, whatever MODEL.RESNETS.NORM says.
    """
    norm = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    features, starts = _mobilenet(norm, True, cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDLiteFeatureExtractorMobileNet(features, starts[-2], norm)


class _Convolution(nn.Sequential):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, in_channels, out_channels, stride, norm):
        convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, norm(out_channels), nn.ReLU(inplace=True))


def _small_group_norm(channels):
    # 32 groups would leave one channel a group in the first layers.
    return nn.GroupNorm(math.gcd(max(1, channels // 8), channels), channels)


class TinyBackbone(nn.Module):
    """Two 3x3 convolutions per width, the first of stride 2; one more for each output level.

    Made to be trained from random weights on a CPU; Kaiming initialisation.
    """

    def __init__(self, channels, out_channels, num_levels, norm):
        """
        Args:
            channels: width of each stage; the last one's stride is 2 ** len(channels).
            out_channels: width of the outputs.
            num_levels: how many stages, from the last one back, have an output.
            norm: callable from channels to a module.
        """
        super().__init__()
        widths = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(_Convolution(before, after, 2, norm), _Convolution(after, after, 1, norm))
            for before, after in zip(widths, channels, strict=False)
        )
        self.outputs = nn.ModuleList(
            _Convolution(width, out_channels, 1, norm) for width in channels[-num_levels:]
        )
        self.out_channels, self.level_names = out_channels, [str(i) for i in range(num_levels)]
        self.strides = [2 ** (len(channels) - num_levels + 1 + i) for i in range(num_levels)]

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        levels = zip(self.level_names, self.outputs, maps[-len(self.outputs) :], strict=True)
        return {name: output(level) for name, output, level in levels}


def get_tiny_norm(cfg):
    """The norm that MODEL.TINY.NORM names; its GN has 8 channels a group."""
    norm = get_norm(cfg.MODEL.TINY.NORM, "MODEL.TINY.NORM", ("BN", "SyncBN", "GN"))
    return _small_group_norm if cfg.MODEL.TINY.NORM == "GN" else norm


def build_tiny_backbone(cfg):
    """`TinyBackbone` as MODEL.TINY.* describes it."""
    tiny = cfg.MODEL.TINY
    if not tiny.CHANNELS:
        raise UserError("MODEL.TINY.CHANNELS is empty: give the width of at least one stage")
    if not 1 <= tiny.NUM_LEVELS <= len(tiny.CHANNELS):
        raise UserError(
            f"MODEL.TINY.NUM_LEVELS is {tiny.NUM_LEVELS}, but must be 1 to the {len(tiny.CHANNELS)} "
            "entries of CHANNELS"
        )
    backbone = TinyBackbone(tiny.CHANNELS, tiny.OUT_CHANNELS, tiny.NUM_LEVELS, get_tiny_norm(cfg))
    _freeze(backbone.stages, cfg.MODEL.BACKBONE.FREEZE_AT)
    return backbone


BACKBONES = {
    "build_resnet_fpn_backbone": build_resnet_fpn_backbone,
    "build_retinanet_resnet_fpn_backbone": build_retinanet_resnet_fpn_backbone,
    "build_mobilenet_v3_large_fpn_backbone": build_mobilenet_v3_large_fpn_backbone,
    "build_ssd_vgg16_backbone": build_ssd_vgg16_backbone,
    "build_ssdlite_mobilenet_v3_large_backbone": build_ssdlite_mobilenet_v3_large_backbone,
    "build_tiny_backbone": build_tiny_backbone,
}


def build_backbone(cfg):
    """The backbone that MODEL.BACKBONE.NAME names.

    Raises:
        UserError: an unknown name, or settings the backbone does not have.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONES:
        raise UserError(
            f"MODEL.BACKBONE.NAME is {name!r}; known: {', '.join(BACKBONES)}; the nearest is "
            + nearest(name, BACKBONES)
        )
    ssd_only, is_ssd = name.startswith("build_ssd"), cfg.MODEL.META_ARCHITECTURE == "SSD"
    if ssd_only != is_ssd and name != "build_tiny_backbone":
        fitting = [n for n in BACKBONES if n.startswith("build_ssd") == is_ssd or "tiny" in n]
        raise UserError(
            f"MODEL.BACKBONE.NAME {name} does not fit MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE}, which takes {', '.join(fitting)}"
        )
    backbone = BACKBONES[name](cfg)
    fold_frozen_norms(backbone)
    return backbone
