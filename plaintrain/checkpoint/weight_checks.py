"""Check MODEL.WEIGHTS against the config and the dataset, before a run.

A file of weights does not say how pixels are normalized or where RoIAlign samples: under other conventions
a model loads, and detects little or nothing. Who wrote the file is known by its names and its other entries.
"""

import math
import re

from plaintrain.checkpoint.pretrained import download_weights, read_for_model
from plaintrain.checkpoint.torchvision import select_class_rows
from plaintrain.config import get_value
from plaintrain.config.yaml import flatten, parse_yaml
from plaintrain.structures import are_numbers
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError

_FORMAT, _MEAN, _STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
_STRIDE, _P6 = "MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.FPN.P6_IN_FEATURE"
_RPN, _DENSE = "rpn.head.", "head.regression_head.bbox_reg."
_BOX, _MASK, _KEYPOINT = "roi_heads.box_predictor.", "roi_heads.mask_head.", "roi_heads.keypoint_head."
# What the projects compute differently: key -> (tensors that it concerns, Detectron2's value, torchvision's).
_KEYS = {
    _FORMAT: ("", "BGR", "RGB"),
    _MEAN: ("", [103.53, 116.28, 123.675], [123.675, 116.28, 103.53]),
    _STD: ("", [1.0, 1.0, 1.0], [58.395, 57.12, 57.375]),
    _STRIDE: ("backbone.body.layer2.0.conv3.", True, False),
    "MODEL.ANCHOR_GENERATOR.NAME": ((_RPN, _DENSE), "DefaultAnchorGenerator", "AnchorGenerator"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (_BOX, "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (_BOX, 0, 2),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": (_MASK, "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": (_MASK, 0, 2),
    "MODEL.ROI_MASK_HEAD.ALIGNED": (_MASK, True, False),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": (_KEYPOINT, "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": (_KEYPOINT, 0, 2),
}
_CONCERNED = {key: prefixes for key, (prefixes, _, _) in _KEYS.items()} | {
    _P6: "backbone.fpn.extra_blocks.p6."
}
_DETECTRON2 = {key: value for key, (_, value, _) in _KEYS.items()}
_TORCHVISION = {key: value for key, (_, _, value) in _KEYS.items()}
_SSD300 = {_FORMAT: "RGB", _MEAN: [122.99925, 116.9991, 103.9992], _STD: [1.0, 1.0, 1.0]}
_SSDLITE = {_FORMAT: "RGB", _MEAN: [127.5, 127.5, 127.5], _STD: [127.5, 127.5, 127.5]}
# Authors of backbones under Detectron2's names that were trained on RGB.
_RGB_AUTHORS = ("torchvision", "MOCO")
_HINTS = {
    "Detectron2": "list configs/Detectron2/Base-Detectron2.yaml last in _BASE_, ",
    "torchvision": "see configs/torchvision/, ",
}


def check_weights(cfg, model, name, class_names, *, strict):
    """Reject weights that contradict the config or the classes of the dataset.

    Args:
        cfg, model: the config and its model, which may be on the device "meta".
        name: MODEL.WEIGHTS, or a checkpoint.
        class_names: the dataset's, in the order of their labels.
        strict: the weights are evaluated as they are: they must be complete, and for exactly these classes.
    """
    state, weights = model.state_dict(), read_for_model(model, name, download_weights(name))
    check_trained_classes(name, weights.content.get("class_names"), class_names, strict=strict)
    used = {key: value for key, value in weights.matched.items() if key in state}
    source, expected = _conventions(weights, used)
    wrong = [
        f"{key} {_format(value)} (got {_format(get_value(cfg, key))})"
        for key, value in expected.items()
        if any(name.startswith(_CONCERNED[key]) for name in used) and not _agree(value, get_value(cfg, key))
    ]
    if wrong:
        raise UserError(
            f"{name} has weights of {source}, whose conventions the config contradicts; set "
            f"{', '.join(wrong)}; {_HINTS.get(source, '')}or convert the file to keep the config "
            "(scripts/convert_weights.py)"
        )
    if not strict:
        return
    selected = select_class_rows(weights.matched, class_names, weights.of_detectron2)
    parameters = [key for key, _ in model.named_parameters()]
    missing = [key for key in parameters if key not in selected or selected[key].shape != state[key].shape]
    if missing:
        raise UserError(
            f"{name} is missing {len(missing)} of the model's parameters, or has them in another shape, the "
            f"first {missing[0]}: it is of another architecture, or of another number of classes than the "
            f"{len(class_names)} here; CLASSES of a dataset in DATASETS.DECLARE chooses its classes"
        )


def _format(value):
    return str(value).replace(" ", "")


def _agree(expected, value):
    are_lists = isinstance(expected, list) and isinstance(value, list)
    if not are_lists or not are_numbers(expected + value):
        return expected == value
    # Means and standard deviations that are in use for the same weights differ by less than 2%.
    pairs = zip(expected, value, strict=False)
    return len(expected) == len(value) and all(math.isclose(a, b, rel_tol=0.02) for a, b in pairs)


def _conventions(weights, used):
    """Return (who made the weights, {key: value}), without the keys about which nothing is known."""
    content, tensors, author = weights.content, weights.tensors, weights.content.get("__author__")
    if isinstance(content.get("config"), str):
        saved = flatten(parse_yaml(content["config"], "the config in the weights"))
        return "a run", {key: saved[key] for key in _CONCERNED if key in saved}
    if author == "plaintrain":
        return author, {}
    if weights.of_detectron2 and author in _RGB_AUTHORS:
        return author, _TORCHVISION
    if weights.of_detectron2:
        return "Detectron2", _of_detectron2(tensors, used)
    # Checkpoints of this project have the same names as torchvision's weights.
    is_checkpoint = {"class_names", "iteration"} & content.keys()
    return "torchvision", {} if is_checkpoint else _of_torchvision(tensors, used)


def _of_detectron2(tensors, used):
    values = _DETECTRON2 | _of_p6(used)
    conv2 = used.get("backbone.body.layer1.0.conv2.weight")
    # Caffe2's frozen norms have no statistics, as group norms.
    stem = "backbone.bottom_up.stem.conv1"
    has_frozen_norm = f"{stem}.norm.running_mean" in tensors or f"{stem}.weight" not in tensors
    if conv2 is not None and conv2.shape[:1] != conv2.shape[1:2]:
        # Caffe2's ResNeXt.
        values |= {_STD: [57.375, 57.12, 58.395], _STRIDE: False}
    elif any("_gn_" in name for name in tensors) or not has_frozen_norm:
        # Caffe2's, or trained from random weights with another scale.
        values |= {_STRIDE: False}
        del values[_STD]
    if "pixel_mean" in tensors and "pixel_std" in tensors:
        mean, std = tensors["pixel_mean"].flatten().tolist(), tensors["pixel_std"].flatten().tolist()
        values |= {_MEAN: mean, _STD: std, _FORMAT: "BGR" if mean[0] <= mean[-1] else "RGB"}
    return values


def _of_torchvision(tensors, used):
    if any(name.startswith("head.classification_head.module_list.") for name in tensors):
        ssd = {"backbone.features.0.weight": _SSD300, "backbone.features.0.0.0.weight": _SSDLITE}
        return next((values for name, values in ssd.items() if name in tensors), {})
    has_body = {"backbone.body.conv1.weight", "backbone.body.0.0.weight"} & tensors.keys()
    is_detector = has_body and any(name.startswith((_RPN, "head.")) for name in tensors)
    if not is_detector and not any(re.match(r"(fc|classifier(\.\d)?)\.weight$", name) for name in tensors):
        return {}
    # SSD starts from backbones under its own scale of pixels.
    is_ssd = any(name.startswith("backbone.features.") for name in used)
    return {_FORMAT: "RGB"} if is_ssd else _TORCHVISION | _of_p6(used)


def _of_p6(used):
    p6 = used.get("backbone.fpn.extra_blocks.p6.weight")
    return {} if p6 is None else {_P6: "p5" if p6.shape[:1] == p6.shape[1:2] else "res5"}
