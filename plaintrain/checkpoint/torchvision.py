"""Translate the names in a file of weights to those of a detector, which are torchvision's."""

import re

from plaintrain.checkpoint.detectron2 import from_detectron2, is_detectron2

# Where torchvision's SSD and SSDlite cut VGG16 and MobileNetV3-Large.
_VGG_CUT, _MOBILENET_CUT = 23, 13


def _in_vgg_ssd(name):
    """Translate a name of torchvision's VGG16, which SSD cuts in two before its fourth pooling."""
    match = re.match(r"features\.(\d+)\.", name)
    if match and int(match[1]) >= _VGG_CUT:
        return f"backbone.extra.0.{int(match[1]) - _VGG_CUT}.{name[match.end() :]}"
    return "backbone." + name


def _in_mobilenet_ssd(name):
    """Translate a name of torchvision's MobileNetV3-Large, which SSDlite cuts in two.

    The first part ends with the expansion of the block that makes stride 32; the second starts inside it.
    """
    match = re.match(r"features\.(\d+)\.(block\.(\d+)\.)?", name)
    if not match or int(match[1]) < _MOBILENET_CUT:
        return name.replace("features.", "backbone.features.0.", 1)
    rest = name[match.end() :]
    if int(match[1]) > _MOBILENET_CUT:
        return f"backbone.features.1.{int(match[1]) - _MOBILENET_CUT}.{match[2] or ''}{rest}"
    if match[3] == "0":
        return f"backbone.features.0.{_MOBILENET_CUT}.{rest}"
    return f"backbone.features.1.0.{match[3]}.{rest}"


# Where a file's names can have their place in a model; the one that fits most is taken.
_PLACES = (
    lambda name: name,
    lambda name: "backbone.body." + name.removeprefix("backbone.").removeprefix("features."),
    _in_vgg_ssd,
    _in_mobilenet_ssd,
)

# Before torchvision 0.13, from which most published files are, convolutions were not wrapped with their norm.
_OLD_NAMES = (
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(roi_heads\.mask_head)\.mask_fcn(\d)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    # Every second one was a ReLU.
    (r"^(head\.\w+\.conv)\.([0246])\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)


def match_names(tensors, wanted):
    """Return the tensors under the model's names as far as a rule brings them there.

    Args:
        tensors: {name: tensor} of a detector of torchvision, or of a backbone alone.
        wanted: the model's names.
    """
    best = max(_PLACES, key=lambda place: sum(place(name) in wanted for name in tensors))
    tensors = {best(name): value for name, value in tensors.items()}
    # FCOS numbers its convolutions in steps of three.
    old_names = _OLD_NAMES[:-1] if "head.classification_head.conv.1.weight" in tensors else _OLD_NAMES
    matched = {}
    for name, value in tensors.items():
        renamed = name
        for pattern, new in old_names:
            renamed = re.sub(pattern, new, renamed)
        is_old = name not in wanted and renamed in wanted
        matched[renamed if is_old else name] = value
    return matched


def strip_wrappers(tensors):
    """Return the tensors without the prefixes of wrapped and compiled modules in their names."""
    return {re.sub(r"^((module|model|_orig_mod)\.)+", "", name): v for name, v in tensors.items()}


def translate(tensors, num_ratios):
    """Return a file's tensors under torchvision's names, and whether Detectron2 wrote them.

    Args:
        tensors: {name: tensor}.
        num_ratios: see `from_detectron2`.
    """
    of_detectron2 = is_detectron2(tensors)
    return (from_detectron2(tensors, num_ratios) if of_detectron2 else tensors), of_detectron2
