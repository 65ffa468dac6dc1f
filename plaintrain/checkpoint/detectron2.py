"""Detectron2's parameter names and row orders, from and to torchvision's.

Covered are R-CNN (boxes, masks, keypoints), its RPN and RetinaNet, all on a ResNet with an FPN, and
ResNets alone, also as Caffe2 named them.
"""

import dataclasses
import re

import torch

from plaintrain.utils.errors import UserError

# What Detectron2 saves and no model here has as a parameter.
_IGNORED = re.compile(r"pixel_(mean|std)$|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+$")
_DETECTRON2 = re.compile(
    r"backbone\.(bottom_up|fpn_lateral\d|fpn_output\d|top_block)\.|(backbone\.)?(stem\.conv1|res[2-5]\.\d+)\."
    r"|proposal_generator\.rpn_head\.|head\.(cls|bbox)_subnet\.|roi_heads\.box_head\.fc[12]\."
)
_CAFFE2 = re.compile(r"(res_)?conv1_(w|bn_\w+)$|res\d_\d+_branch")
_CAFFE2_ENDINGS = {
    "_(bn|gn)_s": ".norm.weight",
    "_(bn|gn)_b": ".norm.bias",
    "_bn_rm": ".norm.running_mean",
    "_bn_riv": ".norm.running_var",
    "_w": ".weight",
}
_CLASS_SCORES = "roi_heads.box_predictor.cls_score"
# Rows per class of the layers in which Detectron2 has none for the background.
_NO_BACKGROUND = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}
# Blocks in ResNet-152's third stage, and the FPN's coarsest level.
_MOST_BLOCKS, _HIGHEST = 36, 5


def _from_caffe2(name):
    """A blob's name in Caffe2's ResNets -> Detectron2's."""
    name = re.sub(r"^(res_)?conv1_", "stem.conv1_", name)
    name = re.sub(r"^res(\d)_(\d+)_branch1_", r"res\1.\2.shortcut_", name)
    for letter, number in (("a", 1), ("b", 2), ("c", 3)):
        name = re.sub(rf"^res(\d)_(\d+)_branch2{letter}_", rf"res\1.\2.conv{number}_", name)
    for ending, full in _CAFFE2_ENDINGS.items():
        name = re.sub(ending + "$", full, name)
    return name


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What decides how both projects number their modules."""

    lowest: int  # The FPN's finest level.
    convs: int  # Of the box head,
    linears: int  # and its fully connected layers.
    rpn_convs: int
    norms: bool  # RetinaNet's towers have norms.


def _find(names, pattern):
    """What the pattern's group finds at the start of the names, each once."""
    return {match[1] for match in map(re.compile(pattern).match, names) if match}


def _count(names, pattern):
    return len(_find(names, pattern))


def _detectron2_layout(names):
    return _Layout(
        lowest=min(map(int, _find(names, r"backbone\.fpn_\w+(\d)\.")), default=_HIGHEST + 1),
        convs=_count(names, r"roi_heads\.box_head\.conv(\d+)\."),
        linears=_count(names, r"roi_heads\.box_head\.fc(\d+)\."),
        rpn_convs=_count(names, r"proposal_generator\.rpn_head\.conv\.conv(\d+)\.") or 1,
        norms="head.cls_subnet.1.weight" in names,
    )


def _torchvision_layout(names):
    return _Layout(
        lowest=_HIGHEST + 1 - _count(names, r"backbone\.fpn\.inner_blocks\.(\d)\.0\.weight"),
        convs=_count(names, r"roi_heads\.box_head\.(\d+)\.0\."),
        linears=_count(names, r"roi_heads\.box_head\.((?:fc)?\d+)\.(?:weight|bias)"),
        rpn_convs=_count(names, r"rpn\.head\.conv\.(\d+)\.0\.") or 1,
        norms="head.classification_head.conv.0.1.weight" in names,
    )


def _conv(there, here):
    """A convolution and its norm: Detectron2's names -> torchvision's."""
    return {there: f"{here}.0", f"{there}.norm": f"{here}.1"}


def _resnet_modules():
    pairs = {"stem.conv1": "conv1", "stem.conv1.norm": "bn1"}
    for stage in range(1, 5):
        for block in range(_MOST_BLOCKS):
            there, here = f"res{stage + 1}.{block}", f"layer{stage}.{block}"
            pairs |= _conv(f"{there}.shortcut", f"{here}.downsample")
            for i in (1, 2, 3):
                pairs |= {f"{there}.conv{i}": f"{here}.conv{i}", f"{there}.conv{i}.norm": f"{here}.bn{i}"}
    return {f"backbone.bottom_up.{there}": f"backbone.body.{here}" for there, here in pairs.items()}


def _box_head_modules(layout):
    pairs = {}
    for i in range(layout.convs):
        pairs |= _conv(f"conv{i + 1}", str(i))
    for i in range(layout.linears):
        # After the convolutions comes a Flatten, and a ReLU after each layer.
        plain = (layout.convs, layout.linears) == (0, 2)
        pairs[f"fc{i + 1}"] = f"fc{i + 6}" if plain else str(layout.convs + 1 + 2 * i)
    return {f"roi_heads.box_head.{there}": f"roi_heads.box_head.{here}" for there, here in pairs.items()}


def _modules(layout):
    """Every module with parameters: Detectron2's name -> torchvision's."""
    pairs = _resnet_modules() | _box_head_modules(layout)
    for i in range(_HIGHEST + 1 - layout.lowest):
        pairs |= _conv(f"backbone.fpn_lateral{i + layout.lowest}", f"backbone.fpn.inner_blocks.{i}")
        pairs |= _conv(f"backbone.fpn_output{i + layout.lowest}", f"backbone.fpn.layer_blocks.{i}")
    for i in range(layout.rpn_convs):
        there = "conv" if layout.rpn_convs == 1 else f"conv.conv{i}"
        pairs[f"proposal_generator.rpn_head.{there}"] = f"rpn.head.conv.{i}.0"
    for i in range(16):
        pairs |= _conv(f"roi_heads.mask_head.mask_fcn{i + 1}", f"roi_heads.mask_head.{i}")
        pairs[f"roi_heads.keypoint_head.conv_fcn{i + 1}"] = f"roi_heads.keypoint_head.{2 * i}"
        for there, here in (("cls", "classification"), ("bbox", "regression")):
            at = (3 if layout.norms else 2) * i
            pairs[f"head.{there}_subnet.{at}"] = f"head.{here}_head.conv.{i}.0"
            if layout.norms:
                pairs[f"head.{there}_subnet.{at + 1}"] = f"head.{here}_head.conv.{i}.1"
    return pairs | {
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


def anchor_counts(tensors):
    """{layer: anchors per location} of the layers that predict for anchors, under torchvision's names."""
    counts = {}
    for scores, boxes in (
        ("rpn.head.cls_logits", "rpn.head.bbox_pred"),
        ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    ):
        if f"{boxes}.bias" in tensors:
            counts[scores] = counts[boxes] = len(tensors[f"{boxes}.bias"]) // 4
    return counts


def _swap_anchors(tensors, num_ratios, to_torchvision):
    """Detectron2 goes through the ratios of each size, torchvision through the sizes of each ratio."""
    for layer, number in anchor_counts(tensors).items():
        sizes = number // num_ratios
        if sizes * num_ratios != number:
            continue
        outer = (sizes, num_ratios) if to_torchvision else (num_ratios, sizes)
        for name in {f"{layer}.weight", f"{layer}.bias"} & tensors.keys():
            rows = tensors[name].unflatten(0, (*outer, -1))
            tensors[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()


def _move_background(tensors, to_torchvision):
    """Detectron2's background is the last class and has no box and mask; torchvision's is the first."""
    if f"{_CLASS_SCORES}.bias" not in tensors:
        return
    classes = len(tensors[f"{_CLASS_SCORES}.bias"]) - 1
    for name, value in list(tensors.items()):
        layer = name.rpartition(".")[0]
        if layer == _CLASS_SCORES:
            tensors[name] = value.roll(1 if to_torchvision else -1, 0)
        rows = _NO_BACKGROUND.get(layer)
        if rows and to_torchvision and len(value) == classes * rows:
            tensors[name] = torch.cat([torch.zeros_like(value[:rows]), value])
        elif rows and not to_torchvision:
            tensors[name] = value[rows:].clone()


def is_detectron2(tensors):
    """Whether the names are those of a Detectron2 model with a ResNet, or of Caffe2's ResNets."""
    return any(_DETECTRON2.match(name) or _CAFFE2.match(name) for name in tensors)


def from_detectron2(tensors, num_ratios=3):
    """Weights under Detectron2's names -> under torchvision's, rows in torchvision's order.

    Args:
        tensors: {name: tensor}.
        num_ratios: aspect ratios per size of anchor; layers of a number of anchors that it does not
            divide keep their order.

    Returns:
        {name: tensor}; names without a counterpart stay as they are. The background, of which
        Detectron2 has no box and mask, gets zeros there.
    """
    tensors = {_from_caffe2(name) if _CAFFE2.match(name) else name: v for name, v in tensors.items()}
    resnet = re.compile(r"^(backbone\.)?(stem\.|res\d\.)")
    tensors = {resnet.sub(r"backbone.bottom_up.\2", name): value for name, value in tensors.items()}
    modules = _modules(_detectron2_layout(tensors))
    found = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if not _IGNORED.match(name):
            found[f"{modules[module]}.{leaf}" if module in modules else name] = value
    _move_background(found, to_torchvision=True)
    _swap_anchors(found, num_ratios, to_torchvision=True)
    return found


def to_detectron2(tensors, num_ratios=3):
    """The inverse of `from_detectron2`.

    Raises:
        UserError: a name that no ResNet-FPN model of Detectron2 has a counterpart of.
    """
    modules = {here: there for there, here in _modules(_torchvision_layout(tensors)).items()}
    strangers = [name for name in tensors if name.rpartition(".")[0] not in modules]
    if strangers:
        raise UserError(
            f"Detectron2's R-CNN and RetinaNet with ResNet-FPN have no counterpart of {strangers[0]} "
            f"({len(strangers)} such names)"
        )
    tensors = dict(tensors)
    _swap_anchors(tensors, num_ratios, to_torchvision=False)
    _move_background(tensors, to_torchvision=False)
    split = {name: name.rpartition(".") for name in tensors}
    return {f"{modules[split[name][0]]}.{split[name][2]}": value for name, value in tensors.items()}
