"""Backbones: an image tensor in, a dict of feature maps of one width out.

Those that any detector but SSD can use set `out_channels`, `level_names` (the keys of their output,
finest first) and `strides` (input pixels per location, one a level).
Parameter names are torchvision's.
"""

import functools
import itertools
import math

from torch import nn
from torchvision.models import get_model, mobilenet_v3_large, vgg16
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from plaintrain.utils.errors import UserError, suggest_similar

_NORMS = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels, eps=1e-5: nn.GroupNorm(math.gcd(32, channels), channels, eps),
}
# SSDlite's, whatever MODEL.RESNETS.NORM says.
SSDLITE_NORM = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


def get_norm(name):
    """Return the norm layer of a config key: a callable from channels to a module, or None for "".

    GN has 32 groups, or as many of them as divide the channels.
    """
    return _NORMS[name] if name else None


def _freeze(stages, freeze_at):
    """Stop the first `freeze_at` stages from training, their batch-norm statistics included."""
    if freeze_at > len(stages):
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to {len(stages)}, got {freeze_at}")
    for stage in stages[:freeze_at]:
        stage.requires_grad_(False)
        for parent in list(stage.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                    setattr(parent, name, FrozenBatchNorm2d(child.num_features, child.eps))


def _resnet(cfg):
    """Return a ResNet or ResNeXt and {layer: its channels}."""
    resnets = cfg.MODEL.RESNETS
    body = get_model(
        f"resnet{resnets.DEPTH}",
        groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        norm_layer=functools.partial(get_norm(resnets.NORM), eps=resnets.NORM_EPS),
    )
    if resnets.STRIDE_IN_1X1:
        for stage in (body.layer2, body.layer3, body.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    stem = nn.ModuleDict({"conv1": body.conv1, "bn1": body.bn1})
    _freeze([stem, body.layer1, body.layer2, body.layer3, body.layer4], cfg.MODEL.BACKBONE.FREEZE_AT)
    body.bn1 = stem["bn1"]
    width = body.fc.in_features // 8
    return body, {f"layer{stage}": width * 2 ** (stage - 1) for stage in (1, 2, 3, 4)}


def _with_fpn(cfg, body, channels, extra_blocks, extra_names, strides):
    """Put an FPN on layers of a body, {layer: its channels}."""
    backbone = BackboneWithFPN(
        body,
        return_layers={layer: str(i) for i, layer in enumerate(channels)},
        in_channels_list=list(channels.values()),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        extra_blocks=extra_blocks,
        norm_layer=get_norm(cfg.MODEL.FPN.NORM),
    )
    backbone.level_names = [str(i) for i in range(len(channels))] + extra_names
    backbone.strides = strides
    return backbone


def build_resnet_fpn_backbone(cfg):
    """ResNet or ResNeXt with an FPN on res2 to res5; levels of stride 4, 8, 16, 32 and 64."""
    return _with_fpn(cfg, *_resnet(cfg), LastLevelMaxPool(), ["pool"], [4, 8, 16, 32, 64])


def build_retinanet_resnet_fpn_backbone(cfg):
    """ResNet or ResNeXt with an FPN on res3 to res5, P6 from P5 or res5, P7 from P6; strides 8 to 128."""
    body, channels = _resnet(cfg)
    del channels["layer1"]
    out_channels, use_p5 = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.P6_IN_FEATURE == "p5"
    top = LastLevelP6P7(out_channels if use_p5 else channels["layer4"], out_channels)
    top.use_P5 = use_p5
    return _with_fpn(cfg, body, channels, top, ["p6", "p7"], [8, 16, 32, 64, 128])


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
    norm = functools.partial(get_norm(cfg.MODEL.RESNETS.NORM), eps=cfg.MODEL.RESNETS.NORM_EPS)
    features, starts = _mobilenet(norm, False, cfg.MODEL.BACKBONE.FREEZE_AT)
    channels = {str(i): features[i].out_channels for i in starts[-2:]}
    return _with_fpn(cfg, features, channels, LastLevelMaxPool(), ["pool"], [32, 32, 64])


def build_ssd_vgg16_backbone(cfg):
    """VGG-16 with SSD's further levels: 6 of them, of stride 8 to the whole image at 300 pixels."""
    features = vgg16().features
    starts = [0] + [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)][:-1]
    _freeze(_split(features, starts), cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDFeatureExtractorVGG(features, highres=False)


def build_ssdlite_mobilenet_v3_large_backbone(cfg):
    """MobileNetV3-Large with the reduced tail of its paper's table 6, and SSDlite's 4 further levels."""
    features, starts = _mobilenet(SSDLITE_NORM, True, cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDLiteFeatureExtractorMobileNet(features, starts[-2], SSDLITE_NORM)


def _convolution(in_channels, out_channels, stride, norm):
    """3x3 convolution, norm, ReLU."""
    layers = Conv2dNormActivation(in_channels, out_channels, stride=stride, norm_layer=norm)
    nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")
    return layers


class TinyBackbone(nn.Module):
    """Two 3x3 convolutions for each of `channels`, the first of stride 2; one more for each output level,
    of which the last `num_levels` stages have one.

    Made to be trained from random weights on a CPU; Kaiming initialisation.
    """

    def __init__(self, channels, out_channels, num_levels, norm):
        super().__init__()
        widths = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(_convolution(before, after, 2, norm), _convolution(after, after, 1, norm))
            for before, after in zip(widths, channels, strict=False)
        )
        self.outputs = nn.ModuleList(
            _convolution(width, out_channels, 1, norm) for width in channels[-num_levels:]
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
    """Return the norm that MODEL.TINY.NORM names; its GN has 8 channels a group."""
    if cfg.MODEL.TINY.NORM != "GN":
        return get_norm(cfg.MODEL.TINY.NORM)
    # 32 groups would leave one channel a group in the first layers.
    return lambda channels: nn.GroupNorm(math.gcd(max(1, channels // 8), channels), channels)


def build_tiny_backbone(cfg):
    """`TinyBackbone` as MODEL.TINY.* describes it."""
    tiny = cfg.MODEL.TINY
    if not 1 <= tiny.NUM_LEVELS <= len(tiny.CHANNELS):
        raise UserError(
            f"MODEL.TINY.NUM_LEVELS must be 1 to {len(tiny.CHANNELS)}, the entries of CHANNELS, got "
            f"{tiny.NUM_LEVELS}"
        )
    backbone = TinyBackbone(tiny.CHANNELS, tiny.OUT_CHANNELS, tiny.NUM_LEVELS, get_tiny_norm(cfg))
    _freeze(backbone.stages, cfg.MODEL.BACKBONE.FREEZE_AT)
    return backbone


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm whose work the convolution before it does while `training` is set.

    torchvision's `FrozenBatchNorm2d` reads and writes all activations twice, and in the backward pass once; a
    factor on the weights is the same arithmetic on far fewer numbers, but for rounding. In evaluation nothing
    is folded, so that published weights find what they find in torchvision, to the last digits.
    """

    def forward(self, x):
        return x if self.training else super().forward(x)


class FoldedConv2d(nn.Conv2d):
    """A convolution without a bias, with the `FoldedNorm` that follows it as `_norm[0]`."""

    def forward(self, x):
        (norm,) = self._norm
        if not norm.training:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )


def fold_frozen_norms(module):
    """Fold each frozen batch norm that follows a convolution without a bias, in place.

    Following means in the order in which a parent registers its children, which is that of the data in
    torchvision's backbones. Names and shapes of a state dict stay. Statistics are read at each step, so that
    they may be loaded later; whoever replaces one of the two modules later must replace both.
    """
    for parent in module.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedNorm
                # In a tuple it is not a child.
                conv._norm = (norm,)


BACKBONES = {
    "build_resnet_fpn_backbone": build_resnet_fpn_backbone,
    "build_retinanet_resnet_fpn_backbone": build_retinanet_resnet_fpn_backbone,
    "build_mobilenet_v3_large_fpn_backbone": build_mobilenet_v3_large_fpn_backbone,
    "build_ssd_vgg16_backbone": build_ssd_vgg16_backbone,
    "build_ssdlite_mobilenet_v3_large_backbone": build_ssdlite_mobilenet_v3_large_backbone,
    "build_tiny_backbone": build_tiny_backbone,
}


def build_backbone(cfg):
    """Build the backbone that MODEL.BACKBONE.NAME names."""
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONES:
        raise UserError(
            f"MODEL.BACKBONE.NAME must be one of {', '.join(BACKBONES)}, got {name!r}; did you mean "
            f"{suggest_similar(name, BACKBONES)}?"
        )
    backbone = BACKBONES[name](cfg)
    fold_frozen_norms(backbone)
    return backbone
