"""Backbones, with torchvision's parameter names: an image tensor in, a dict of feature maps out."""

import functools
import itertools
import math
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import get_model, mobilenet_v3_large, vgg16
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from plaintrain.config import CfgNode
from plaintrain.utils.errors import UserError, suggest_similar
from plaintrain.utils.user_code import describe_import

Norm = Callable[..., nn.Module]
_NORMS: dict[str, Norm] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    # 32 groups, or as many of them as divide the channels.
    "GN": lambda channels, eps=1e-5: nn.GroupNorm(math.gcd(32, channels), channels, eps),
}
# SSDlite ignores MODEL.RESNETS.NORM.
SSDLITE_NORM = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class Backbone(nn.Module):
    """Base class of backbones; SSD uses none of these attributes."""

    out_channels: int
    # Keys of the output and input pixels per location, finest level first.
    level_names: list[str]
    strides: list[int]


def get_norm(name: str) -> Norm | None:
    """Return the norm layer of a config key, None for ""."""
    return _NORMS[name] if name else None


def _freeze_stages(stages, freeze_at):
    """Freeze the first `freeze_at` stages, including their batch-norm statistics."""
    if freeze_at > len(stages):
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to {len(stages)}, got {freeze_at}")
    for stage in stages[:freeze_at]:
        stage.requires_grad_(False)
        for parent in list(stage.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                    setattr(parent, name, FrozenBatchNorm2d(child.num_features, child.eps))


def _build_resnet(cfg: CfgNode) -> tuple[nn.Module, dict[str, int]]:
    """Build a ResNet or ResNeXt; return it with the channels of each layer."""
    resnets = cfg.MODEL.RESNETS
    body = get_model(
        f"resnet{resnets.DEPTH}",
        groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        norm_layer=functools.partial(_NORMS[resnets.NORM], eps=resnets.NORM_EPS),
    )
    if resnets.STRIDE_IN_1X1:
        for stage in (body.layer2, body.layer3, body.layer4):
            stage[0].conv1.stride = (2, 2)
            stage[0].conv2.stride = (1, 1)
    stem = nn.ModuleDict({"conv1": body.conv1, "bn1": body.bn1})
    _freeze_stages([stem, body.layer1, body.layer2, body.layer3, body.layer4], cfg.MODEL.BACKBONE.FREEZE_AT)
    body.bn1 = stem["bn1"]
    width = body.fc.in_features // 8
    return body, {f"layer{stage}": width * 2 ** (stage - 1) for stage in (1, 2, 3, 4)}


def _add_fpn(cfg, body, channels, extra_blocks, extra_names, strides):
    """Put an FPN on the layers of a body, given as {layer: channels}."""
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


def build_resnet_fpn_backbone(cfg: CfgNode) -> Backbone:
    """Build a ResNet or ResNeXt with an FPN on res2 to res5; strides 4 to 64."""
    return _add_fpn(cfg, *_build_resnet(cfg), LastLevelMaxPool(), ["pool"], [4, 8, 16, 32, 64])


def build_retinanet_resnet_fpn_backbone(cfg: CfgNode) -> Backbone:
    """Build a ResNet or ResNeXt with an FPN on res3 to res5, P6 from P5 or res5, P7; strides 8 to 128."""
    body, channels = _build_resnet(cfg)
    del channels["layer1"]
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    use_p5 = cfg.MODEL.FPN.P6_IN_FEATURE == "p5"
    top = LastLevelP6P7(out_channels if use_p5 else channels["layer4"], out_channels)
    top.use_P5 = use_p5
    return _add_fpn(cfg, body, channels, top, ["p6", "p7"], [8, 16, 32, 64, 128])


def _split_stages(features, starts):
    return [features[start:end] for start, end in zip(starts, [*starts[1:], len(features)], strict=True)]


def _build_mobilenet(norm, reduced_tail, freeze_at):
    """Build MobileNetV3-Large; return its layers and the indices at which its stages start."""
    features = mobilenet_v3_large(norm_layer=norm, reduced_tail=reduced_tail).features
    starts = [0] + [i for i, block in enumerate(features) if getattr(block, "_is_cn", False)]
    starts.append(len(features) - 1)
    _freeze_stages(_split_stages(features, starts), freeze_at)
    return features, starts


def build_mobilenet_v3_large_fpn_backbone(cfg: CfgNode) -> Backbone:
    """Build MobileNetV3-Large with an FPN on its last two stages; strides 32, 32 and 64."""
    norm = functools.partial(_NORMS[cfg.MODEL.RESNETS.NORM], eps=cfg.MODEL.RESNETS.NORM_EPS)
    features, starts = _build_mobilenet(norm, False, cfg.MODEL.BACKBONE.FREEZE_AT)
    channels = {str(i): features[i].out_channels for i in starts[-2:]}
    return _add_fpn(cfg, features, channels, LastLevelMaxPool(), ["pool"], [32, 32, 64])


def build_ssd_vgg16_backbone(cfg: CfgNode) -> Backbone:
    """Build VGG-16 with SSD's extra levels: 6 levels, from stride 8 to the whole image at 300 pixels."""
    features = vgg16().features
    starts = [0] + [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)][:-1]
    _freeze_stages(_split_stages(features, starts), cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDFeatureExtractorVGG(features, highres=False)


def build_ssdlite_mobilenet_v3_large_backbone(cfg: CfgNode) -> Backbone:
    """Build MobileNetV3-Large with the paper's reduced tail (table 6) and SSDlite's 4 extra levels."""
    features, starts = _build_mobilenet(SSDLITE_NORM, True, cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDLiteFeatureExtractorMobileNet(features, starts[-2], SSDLITE_NORM)


def _build_conv(in_channels, out_channels, stride, norm):
    layers = Conv2dNormActivation(in_channels, out_channels, stride=stride, norm_layer=norm)
    nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")
    return layers


class TinyBackbone(Backbone):
    """Small CNN to train from scratch on a CPU.

    Each stage has two 3x3 convolutions, the first of stride 2; output levels add one to the last stages.
    """

    def __init__(self, channels: list[int], out_channels: int, num_levels: int, norm: Norm | None):
        super().__init__()
        widths = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(_build_conv(before, after, 2, norm), _build_conv(after, after, 1, norm))
            for before, after in zip(widths, channels, strict=False)
        )
        self.outputs = nn.ModuleList(_build_conv(c, out_channels, 1, norm) for c in channels[-num_levels:])
        self.out_channels = out_channels
        self.level_names = [str(i) for i in range(num_levels)]
        self.strides = [2 ** (len(channels) - num_levels + 1 + i) for i in range(num_levels)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        levels = zip(self.level_names, self.outputs, maps[-len(self.outputs) :], strict=True)
        return {name: output(level) for name, output, level in levels}


def get_tiny_norm(cfg: CfgNode) -> Norm | None:
    """Return the norm layer of MODEL.TINY.NORM; GN has 8 channels per group."""
    if cfg.MODEL.TINY.NORM != "GN":
        return get_norm(cfg.MODEL.TINY.NORM)
    # 32 groups would leave one channel per group in the first layers.
    return lambda channels: nn.GroupNorm(math.gcd(max(1, channels // 8), channels), channels)


def build_tiny_backbone(cfg: CfgNode) -> TinyBackbone:
    """Build `TinyBackbone` from MODEL.TINY."""
    tiny = cfg.MODEL.TINY
    if not 1 <= tiny.NUM_LEVELS <= len(tiny.CHANNELS):
        raise UserError(
            f"MODEL.TINY.NUM_LEVELS must be 1 to {len(tiny.CHANNELS)}, the length of CHANNELS, got "
            f"{tiny.NUM_LEVELS}"
        )
    backbone = TinyBackbone(tiny.CHANNELS, tiny.OUT_CHANNELS, tiny.NUM_LEVELS, get_tiny_norm(cfg))
    _freeze_stages(backbone.stages, cfg.MODEL.BACKBONE.FREEZE_AT)
    return backbone


class FoldedNorm(FrozenBatchNorm2d):
    """Frozen batch norm that in training is folded into the convolution before it.

    Scaling the weights is cheaper than scaling all activations, and the same up to rounding. In evaluation
    nothing is folded: pretrained weights give torchvision's exact outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class FoldedConv2d(nn.Conv2d):
    """Convolution without a bias that applies the `FoldedNorm` after it, `_norm[0]`."""

    _norm: tuple[FoldedNorm]

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        if not norm.training:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )


def fold_frozen_norms(module: nn.Module) -> None:
    """Fold each frozen batch norm into the convolution without a bias registered before it, in place.

    State dicts stay the same. Statistics are read in every forward pass, so weights may be loaded later.
    """
    for parent in module.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                conv.__class__ = FoldedConv2d
                norm.__class__ = FoldedNorm
                # A tuple keeps the norm from being registered as a child.
                conv._norm = (norm,)  # type: ignore[assignment]


_BUILDERS: list[Callable[[CfgNode], Backbone]] = [
    build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone, build_mobilenet_v3_large_fpn_backbone,
    build_ssd_vgg16_backbone, build_ssdlite_mobilenet_v3_large_backbone, build_tiny_backbone,
]  # fmt: skip
BACKBONES = {builder.__name__: builder for builder in _BUILDERS}


def build_backbone(cfg: CfgNode) -> Backbone:
    """Build the backbone of MODEL.BACKBONE.NAME."""
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONES:
        raise UserError(
            f"MODEL.BACKBONE.NAME must be one of {', '.join(BACKBONES)}, got {name!r}; did you mean "
            f"{suggest_similar(name, BACKBONES)}? MODEL.RESNETS.DEPTH is the depth of a ResNet "
            f"({describe_import()})"
        )
    backbone = BACKBONES[name](cfg)
    fold_frozen_norms(backbone)
    return backbone
