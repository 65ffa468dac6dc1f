"""Convert weights between Detectron2's and torchvision's parameter names and channel orders.

Supports R-CNN (boxes, masks, keypoints), its RPN and RetinaNet on a ResNet with FPN, and ResNets alone, also
under Caffe2's names (ImageNetPretrained/ in the model zoo).
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from plaintrain.utils.errors import UserError

# Detectron2 saves these, but no model of plaintrain has them as parameters.
_IGNORED = re.compile(r"pixel_(mean|std)$|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+$")
_DETECTRON2 = re.compile(
    r"backbone\.(bottom_up|fpn_lateral\d|fpn_output\d|top_block)\.|(backbone\.)?(stem\.conv1|res[2-5]\.\d+)\."
    r"|proposal_generator\.rpn_head\.|head\.(cls|bbox)_subnet\.|roi_heads\.box_head\.fc[12]\."
)
_CAFFE2 = re.compile(r"(res_)?conv1_(w|bn_\w+)$|res\d_\d+_branch")
# Caffe2's blob names -> Detectron2's.
_CAFFE2_RULES: dict[str, str | Callable[[re.Match], str]] = {
    r"^(res_)?conv1_": "stem.conv1_",
    r"^res(\d)_(\d+)_branch1_": r"res\1.\2.shortcut_",
    r"^res(\d)_(\d+)_branch2([abc])_": lambda m: f"res{m[1]}.{m[2]}.conv{'abc'.index(m[3]) + 1}_",
    r"_(bn|gn)_s$": ".norm.weight",
    r"_(bn|gn)_b$": ".norm.bias",
    r"_bn_rm$": ".norm.running_mean",
    r"_bn_riv$": ".norm.running_var",
    r"_w$": ".weight",
}
_CLASS_SCORES = "roi_heads.box_predictor.cls_score"
# Channels per class of the layers that have none for the background in Detectron2.
_NO_BACKGROUND = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}
# Modules with a fixed name: Detectron2's -> torchvision's.
_FIXED_NAMES = {
    "backbone.bottom_up.stem.conv1": "backbone.body.conv1",
    "backbone.bottom_up.stem.conv1.norm": "backbone.body.bn1",
    "backbone.top_block.p6": "backbone.fpn.extra_blocks.p6",
    "backbone.top_block.p7": "backbone.fpn.extra_blocks.p7",
    "proposal_generator.rpn_head.objectness_logits": "rpn.head.cls_logits",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.head.bbox_pred",
    _CLASS_SCORES: _CLASS_SCORES,
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
    "roi_heads.mask_head.deconv": "roi_heads.mask_predictor.conv5_mask",
    "roi_heads.mask_head.predictor": "roi_heads.mask_predictor.mask_fcn_logits",
    "roi_heads.keypoint_head.score_lowres": "roi_heads.keypoint_predictor.kps_score_lowres",
    "head.cls_score": "head.classification_head.cls_logits",
    "head.bbox_pred": "head.regression_head.bbox_reg",
}
# Modules of a ResNet block.
_BLOCK_NAMES = {"shortcut": "downsample.0", "shortcut.norm": "downsample.1"}
_BLOCK_NAMES |= {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"conv{i}.norm": f"bn{i}" for i in (1, 2, 3)}
# The third stage of ResNet-152 has the most blocks; no head has as many layers.
_MAX_BLOCKS = 36


def _count(names: Iterable[str], pattern: str) -> int:
    """Count the different values of the pattern's first group, matched at the start of the names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def _build_module_map(names: Collection[str]) -> dict[str, str]:
    """Return {Detectron2's module name: torchvision's} for a model with parameters of either's names."""
    pairs = dict(_FIXED_NAMES)
    for stage, block in itertools.product(range(1, 5), range(_MAX_BLOCKS)):
        for source, target in _BLOCK_NAMES.items():
            source = f"backbone.bottom_up.res{stage + 1}.{block}.{source}"
            pairs[source] = f"backbone.body.layer{stage}.{block}.{target}"
    lowest_level = 3 if any(name.startswith("head.") for name in names) else 2
    box_convs = _count(names, r"roi_heads\.box_head\.(conv\d+|\d+\.0)\.weight")
    box_linears = _count(names, r"roi_heads\.box_head\.(fc\d+|\d+)\.weight")
    # torchvision's TwoMLPHead names its layers; any other head is a Sequential with Flatten and ReLU.
    is_two_mlp = (box_convs, box_linears) == (0, 2)
    linear = ("roi_heads.box_head.fc{}", 6, 1) if is_two_mlp else ("roi_heads.box_head.{}", box_convs + 1, 2)
    rpn_convs = _count(names, r"(?:proposal_generator\.rpn_head|rpn\.head)\.conv\.(?:conv)?(\d+)\.")
    rpn_conv = "conv.conv{}" if rpn_convs > 1 else "conv"
    step = 3 if _count(names, r"head\.(cls_subnet\.1|classification_head\.conv\.0\.1)\.weight") else 2
    # Each name is followed by its first index and the step to the next.
    for source, source_start, source_step, target, target_start, target_step in (
        ("backbone.fpn_lateral{}", lowest_level, 1, "backbone.fpn.inner_blocks.{}.0", 0, 1),
        ("backbone.fpn_output{}", lowest_level, 1, "backbone.fpn.layer_blocks.{}.0", 0, 1),
        (f"proposal_generator.rpn_head.{rpn_conv}", 0, 1, "rpn.head.conv.{}.0", 0, 1),
        ("roi_heads.box_head.conv{}", 1, 1, "roi_heads.box_head.{}.0", 0, 1),
        ("roi_heads.box_head.fc{}", 1, 1, *linear),
        ("roi_heads.mask_head.mask_fcn{}", 1, 1, "roi_heads.mask_head.{}.0", 0, 1),
        ("roi_heads.keypoint_head.conv_fcn{}", 1, 1, "roi_heads.keypoint_head.{}", 0, 2),
        ("head.cls_subnet.{}", 0, step, "head.classification_head.conv.{}.0", 0, 1),
        ("head.cls_subnet.{}", 1, step, "head.classification_head.conv.{}.1", 0, 1),
        ("head.bbox_subnet.{}", 0, step, "head.regression_head.conv.{}.0", 0, 1),
        ("head.bbox_subnet.{}", 1, step, "head.regression_head.conv.{}.1", 0, 1),
    ):
        for i in range(_MAX_BLOCKS):
            source_name = source.format(source_start + source_step * i)
            target_name = target.format(target_start + target_step * i)
            pairs.setdefault(source_name, target_name)
            if target.endswith(".{}.0"):
                pairs.setdefault(f"{source_name}.norm", target_name.removesuffix("0") + "1")
    return pairs


def count_anchors(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return {layer: anchors per location} of the anchor heads, under torchvision's names."""
    counts = {}
    for scores, boxes in (
        ("rpn.head.cls_logits", "rpn.head.bbox_pred"),
        ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    ):
        if f"{boxes}.bias" in tensors:
            counts[scores] = counts[boxes] = len(tensors[f"{boxes}.bias"]) // 4
    return counts


def _swap_anchors(tensors: dict[str, Tensor], num_ratios: int, to_torchvision: bool) -> None:
    """Reorder anchors in place: Detectron2 has the sizes in the outer loop, torchvision the ratios."""
    for layer, num_anchors in count_anchors(tensors).items():
        num_sizes = num_anchors // num_ratios
        if not num_sizes or num_sizes * num_ratios != num_anchors:
            continue
        outer = (num_sizes, num_ratios) if to_torchvision else (num_ratios, num_sizes)
        for name in {f"{layer}.weight", f"{layer}.bias"} & tensors.keys():
            if len(tensors[name]) % num_anchors:
                continue
            anchors = tensors[name].unflatten(0, (*outer, -1))
            tensors[name] = anchors.transpose(0, 1).flatten(0, 2).contiguous()


def _move_background(tensors: dict[str, Tensor], to_torchvision: bool) -> None:
    """Move the background class in place: last and without boxes and masks in Detectron2, else first."""
    if f"{_CLASS_SCORES}.bias" not in tensors:
        return
    num_classes = len(tensors[f"{_CLASS_SCORES}.bias"]) - 1
    for name, value in list(tensors.items()):
        layer = name.rpartition(".")[0]
        if layer == _CLASS_SCORES:
            tensors[name] = value.roll(1 if to_torchvision else -1, 0)
        per_class = _NO_BACKGROUND.get(layer)
        if per_class and to_torchvision and len(value) == num_classes * per_class:
            tensors[name] = torch.cat([torch.zeros_like(value[:per_class]), value])
        elif per_class and not to_torchvision:
            tensors[name] = value[per_class:].clone()


def _rename(tensors: dict[str, Tensor], modules: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{modules[module]}.{leaf}" if module in modules else name] = value
    return renamed


def is_detectron2(tensors: Iterable[str]) -> bool:
    """Return whether the names are those of a Detectron2 model with a ResNet, or of Caffe2's ResNets."""
    return any(_DETECTRON2.match(name) or _CAFFE2.match(name) for name in tensors)


def convert_from_detectron2(tensors: dict[str, Tensor], num_ratios: int = 3) -> dict[str, Tensor]:
    """Convert Detectron2's weights to torchvision's names and orders of anchors and classes.

    Names without a counterpart are kept. Boxes and masks of the background become 0. Anchors keep their
    order if their number is not a multiple of `num_ratios`, the aspect ratios per size.
    """
    named = {}
    for name, value in tensors.items():
        if _CAFFE2.match(name):
            for pattern, new in _CAFFE2_RULES.items():
                name = re.sub(pattern, new, name)
        if not _IGNORED.match(name):
            named[re.sub(r"^(backbone\.)?(stem\.|res\d\.)", r"backbone.bottom_up.\2", name)] = value
    converted = _rename(named, _build_module_map(named))
    _move_background(converted, to_torchvision=True)
    _swap_anchors(converted, num_ratios, to_torchvision=True)
    return converted


def convert_to_detectron2(tensors: dict[str, Tensor], num_ratios: int = 3) -> dict[str, Tensor]:
    """Invert `convert_from_detectron2`."""
    modules = {target: source for source, target in _build_module_map(tensors).items()}
    unknown = [name for name in tensors if name.rpartition(".")[0] not in modules]
    if unknown:
        raise UserError(
            f"Detectron2's R-CNN and RetinaNet with ResNet-FPN have no counterpart of {unknown[0]} "
            f"({len(unknown)} such names)"
        )
    tensors = dict(tensors)
    _swap_anchors(tensors, num_ratios, to_torchvision=False)
    _move_background(tensors, to_torchvision=False)
    return _rename(tensors, modules)
