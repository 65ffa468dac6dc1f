"""Translate the names in a file of weights to those of a detector, which are torchvision's."""

import re

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
