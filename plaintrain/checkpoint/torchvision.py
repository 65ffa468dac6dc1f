"""Translate published weights: names of any version of torchvision, and COCO's classes to a dataset's."""

import logging
import re

import torch
from torchvision.models import detection

logger = logging.getLogger(__name__)

# Before torchvision 0.13, from which most published files are, convolutions were not wrapped with their norm.
_OLD_NAMES = (
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(roi_heads\.mask_head)\.mask_fcn(\d)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    # Every second one was a ReLU.
    (r"^(head\.\w+\.conv)\.([0246])\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)


def _candidates(names, wanted):
    """Return the names that those of a file can have in a model, as three lists in the same order."""
    body = ["backbone.body." + name.removeprefix("backbone.").removeprefix("features.") for name in names]
    # torchvision's SSD and SSDlite cut VGG16 and MobileNetV3-Large in two, in the order of their layers.
    layers = iter([name for name in wanted if name.startswith(("backbone.features.", "backbone.extra."))])
    extractor = [next(layers, name) if name.startswith("features.") else "backbone." + name for name in names]
    return names, body, extractor


def match_names(tensors, wanted):
    """Return the tensors under the model's names as far as a rule brings them there.

    Args:
        tensors: {name: tensor} of a detector of torchvision, or of a backbone alone.
        wanted: the model's names, in its order.
    """
    best = max(_candidates(list(tensors), wanted), key=lambda names: sum(name in wanted for name in names))
    # FCOS numbers its convolutions in steps of three.
    old_names = _OLD_NAMES[:-1] if "head.classification_head.conv.1.weight" in tensors else _OLD_NAMES
    matched = {}
    for name, value in zip(best, tensors.values(), strict=True):
        renamed = name
        for pattern, new in old_names:
            renamed = re.sub(pattern, new, renamed)
        is_old = name not in wanted and renamed in wanted
        matched[renamed if is_old else name] = value
    return matched


# torchvision's 91 classes: the background, then COCO's category ids, with "N/A" where there is none.
_COCO = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_NAMES = [name for name in _COCO[1:] if name != "N/A"]
# Layers with rows for classes, one each, or four of boxes; cls_logits have no background here.
_CLASS_LAYERS = re.compile(
    r"(roi_heads\.(box_predictor\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits)"
    r"|head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?))\.(weight|bias)"
)


def _count_classes(weights):
    """Return how many classes the weights' scores are for, or 0 without scores."""
    for name, scores in weights.items():
        if name == "roi_heads.box_predictor.cls_score.bias":
            return len(scores)
        # Layers with boxes tell the number of anchors.
        boxes = name.replace("classification", "regression").replace("cls_logits", "bbox_reg")
        if re.fullmatch(r"head\.classification_head\.(cls_logits|module_list\.0(\.1)?)\.bias", name):
            return len(scores) * 4 // len(weights[boxes]) if boxes in weights else 0
    return 0


def select_class_rows(weights, class_names, of_detectron2):
    """Return weights with the rows of COCO's classes reduced to the dataset's, if COCO has all of them.

    Args:
        weights: {name: tensor} under torchvision's names; others than for COCO's classes are returned as is.
        class_names: the dataset's, in the order of their labels.
        of_detectron2: they have Detectron2's order of classes, without gaps.
    """
    file_names = _COCO
    if of_detectron2:
        is_dense = "head.classification_head.cls_logits.bias" in weights
        file_names = COCO_NAMES if is_dense else ["", *COCO_NAMES]
    if len(file_names) != _count_classes(weights) or not set(class_names) <= set(COCO_NAMES):
        return weights
    rows = torch.tensor([file_names.index(name) for name in class_names])
    selected = dict(weights)
    for name, value in weights.items():
        per_class = 4 if "bbox_pred" in name else 1
        if _CLASS_LAYERS.fullmatch(name) and len(value) % (len(file_names) * per_class) == 0:
            index = rows if "cls_logits" in name else torch.cat([rows.new_zeros(1), rows])
            value = value.unflatten(0, (-1, len(file_names), per_class))[:, index]
            selected[name] = value.flatten(0, 2)
    logger.info(f"of the {len(file_names)} classes of the weights the dataset's {len(class_names)} are kept")
    return selected
