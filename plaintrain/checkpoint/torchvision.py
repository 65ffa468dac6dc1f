"""Adapt published weights: parameter names of older torchvision versions, COCO's classes to a dataset's."""

import logging
import re
from collections.abc import Collection

import torch
from torch import Tensor
from torchvision.models import detection

logger = logging.getLogger(__name__)

# torchvision 0.13, after most files were published, wrapped convolutions in Conv2dNormActivation.
_OLD_NAMES = (
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(roi_heads\.mask_head)\.mask_fcn(\d)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    # A ReLU followed each convolution.
    (r"^(head\.\w+\.conv)\.([0246])\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)


def match_names(tensors: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Rename the tensors of a torchvision detector or backbone to the model's names, `wanted`."""
    body = ["backbone.body." + name.removeprefix("backbone.").removeprefix("features.") for name in tensors]
    # SSD and SSDlite split VGG16 and MobileNetV3-Large in two, without changing the order of layers.
    layers = iter([name for name in wanted if name.startswith(("backbone.features.", "backbone.extra."))])
    ssd = [next(layers, name) if name.startswith("features.") else "backbone." + name for name in tensors]
    best = max(list(tensors), body, ssd, key=lambda names: sum(name in wanted for name in names))
    # FCOS keeps that numbering: a norm layer follows each of its convolutions.
    old_names = _OLD_NAMES[:-1] if "head.classification_head.conv.1.weight" in tensors else _OLD_NAMES
    matched = {}
    for name, value in zip(best, tensors.values(), strict=True):
        renamed = name
        for pattern, new in old_names:
            renamed = re.sub(pattern, new, renamed)
        is_old = name not in wanted and renamed in wanted
        matched[renamed if is_old else name] = value
    return matched


# torchvision's 91 classes: background, then COCO's category ids, with "N/A" for unused ids.
_COCO = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_NAMES = [name for name in _COCO[1:] if name != "N/A"]
# Layers with channels per class, 4 for boxes; cls_logits of plaintrain have no background class.
_CLASS_LAYERS = re.compile(
    r"(roi_heads\.(box_predictor\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits)"
    r"|head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?))\.(weight|bias)"
)


def _count_classes(weights: dict[str, Tensor]) -> int:
    """Return the number of classes that the weights have scores for, or 0."""
    for name, scores in weights.items():
        if name == "roi_heads.box_predictor.cls_score.bias":
            return len(scores)
        # The number of anchors follows from the box regression layer.
        boxes = name.replace("classification", "regression").replace("cls_logits", "bbox_reg")
        if re.fullmatch(r"head\.classification_head\.(cls_logits|module_list\.0(\.1)?)\.bias", name):
            return len(scores) * 4 // len(weights[boxes]) if boxes in weights else 0
    return 0


def select_class_rows(
    weights: dict[str, Tensor], class_names: list[str], from_detectron2: bool
) -> dict[str, Tensor]:
    """Reduce heads for COCO's classes to the dataset's, if COCO has all of them; else change nothing.

    The weights have torchvision's names; with `from_detectron2` the classes have its order, without gaps.
    """
    file_names = _COCO
    if from_detectron2:
        is_dense = "head.classification_head.cls_logits.bias" in weights
        file_names = COCO_NAMES if is_dense else ["", *COCO_NAMES]
    if len(file_names) != _count_classes(weights) or not set(class_names) <= set(COCO_NAMES):
        return weights
    classes = torch.tensor([file_names.index(name) for name in class_names])
    selected = dict(weights)
    for name, value in weights.items():
        per_class = 4 if "bbox_pred" in name else 1
        if _CLASS_LAYERS.fullmatch(name) and len(value) % (len(file_names) * per_class) == 0:
            index = classes if "cls_logits" in name else torch.cat([classes.new_zeros(1), classes])
            value = value.unflatten(0, (-1, len(file_names), per_class))[:, index]
            selected[name] = value.flatten(0, 2)
    logger.info(f"kept the dataset's {len(class_names)} of the {len(file_names)} classes of the weights")
    return selected
