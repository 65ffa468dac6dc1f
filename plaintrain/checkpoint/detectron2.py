"""Detectron2's parameter names and row orders, from and to torchvision's.

Covered are R-CNN (boxes, masks, keypoints), its RPN and RetinaNet, all on a ResNet with an FPN, and
ResNets alone, also as Caffe2 named them (ImageNetPretrained/ in the model zoo).
"""

import itertools
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
# From the names of Caffe2's blobs to Detectron2's.
_FROM_CAFFE2 = {
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
# Rows per class of the layers in which Detectron2 has none for the background.
_NO_BACKGROUND = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}
# Modules that have one name in each project: Detectron2's -> torchvision's.
_NAMED = {
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
# Those of a block of a ResNet.
_IN_BLOCK = {"shortcut": "downsample.0", "shortcut.norm": "downsample.1"}
_IN_BLOCK |= {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"conv{i}.norm": f"bn{i}" for i in (1, 2, 3)}
# Blocks in ResNet-152's third stage, the most of any; no head has as many layers.
_MOST = 36


def _from_caffe2(name):
    for pattern, new in _FROM_CAFFE2.items():
        name = re.sub(pattern, new, name)
    return name


def _count(names, pattern):
    """Return how many different groups the pattern finds at the start of the names of either project."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def _modules(names):
    """Return the modules of a model with these names: Detectron2's name -> torchvision's."""
    pairs = dict(_NAMED)
    for stage, block, (there, here) in itertools.product(range(1, 5), range(_MOST), _IN_BLOCK.items()):
        there = f"backbone.bottom_up.res{stage + 1}.{block}.{there}"
        pairs[there] = f"backbone.body.layer{stage}.{block}.{here}"
    lowest = 3 if any(name.startswith("head.") for name in names) else 2
    box_convs = _count(names, r"roi_heads\.box_head\.(conv\d+|\d+\.0)\.weight")
    box_linears = _count(names, r"roi_heads\.box_head\.(fc\d+|\d+)\.weight")
    # Behind convolutions, or as one or three, linear layers have a place in a sequence with Flatten and ReLU.
    is_two_mlp = (box_convs, box_linears) == (0, 2)
    linear = ("roi_heads.box_head.fc{}", 6, 1) if is_two_mlp else ("roi_heads.box_head.{}", box_convs + 1, 2)
    rpn_convs = _count(names, r"(?:proposal_generator\.rpn_head|rpn\.head)\.conv\.(?:conv)?(\d+)\.")
    rpn_conv = "conv.conv{}" if rpn_convs > 1 else "conv"
    step = 3 if _count(names, r"head\.(cls_subnet\.1|classification_head\.conv\.0\.1)\.weight") else 2
    # Each name with the first of its numbers and the step to the next.
    for there, first_there, step_there, here, first_here, step_here in (
        ("backbone.fpn_lateral{}", lowest, 1, "backbone.fpn.inner_blocks.{}.0", 0, 1),
        ("backbone.fpn_output{}", lowest, 1, "backbone.fpn.layer_blocks.{}.0", 0, 1),
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
        for i in range(_MOST):
            theirs, ours = there.format(first_there + step_there * i), here.format(first_here + step_here * i)
            pairs.setdefault(theirs, ours)
            if here.endswith(".{}.0"):
                pairs.setdefault(f"{theirs}.norm", ours.removesuffix("0") + "1")
    return pairs


def count_anchors(tensors):
    """Return {layer: anchors per location} of the layers that predict for anchors, torchvision's names."""
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
    for layer, number in count_anchors(tensors).items():
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
    """Return whether the names are those of a Detectron2 model with a ResNet, or of Caffe2's ResNets."""
    return any(_DETECTRON2.match(name) or _CAFFE2.match(name) for name in tensors)


def convert_from_detectron2(tensors, num_ratios=3):
    """Return weights under torchvision's names and in its order of rows, from Detectron2's.

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
    modules = _modules(tensors)
    translated = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if not _IGNORED.match(name):
            translated[f"{modules[module]}.{leaf}" if module in modules else name] = value
    _move_background(translated, to_torchvision=True)
    _swap_anchors(translated, num_ratios, to_torchvision=True)
    return translated


def convert_to_detectron2(tensors, num_ratios=3):
    """Invert `from_detectron2`."""
    modules = {here: there for there, here in _modules(tensors).items()}
    unknown = [name for name in tensors if name.rpartition(".")[0] not in modules]
    if unknown:
        raise UserError(
            f"Detectron2's R-CNN and RetinaNet with ResNet-FPN have no counterpart of {unknown[0]} "
            f"({len(unknown)} such names)"
        )
    tensors = dict(tensors)
    _swap_anchors(tensors, num_ratios, to_torchvision=False)
    _move_background(tensors, to_torchvision=False)
    translated = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        translated[f"{modules[module]}.{leaf}"] = value
    return translated
