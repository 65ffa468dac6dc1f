"""Check MODEL.WEIGHTS against the config and the dataset before a run.

A file of weights does not record pixel normalization or RoIAlign's sampling; with other conventions a model
loads but detects little or nothing. The names of its tensors and its other entries tell who wrote the file.
"""

import math
import re
from typing import Any

from torch import Tensor, nn

from plaintrain.checkpoint.pretrained import Weights, download_weights, read_for_model
from plaintrain.checkpoint.torchvision import select_class_rows
from plaintrain.config import CfgNode, get_value
from plaintrain.config.yaml import flatten, parse_yaml
from plaintrain.structures import are_numbers
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError

_FORMAT = "INPUT.FORMAT"
_MEAN = "MODEL.PIXEL_MEAN"
_STD = "MODEL.PIXEL_STD"
_STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
_P6 = "MODEL.FPN.P6_IN_FEATURE"
_ANCHOR_HEADS = ("rpn.head.", "head.regression_head.bbox_reg.")
# Keys on which the projects differ: (prefixes of the affected tensors, Detectron2's value, torchvision's).
_KEYS: dict[str, tuple[str | tuple[str, ...], Any, Any]] = {
    _FORMAT: ("", "BGR", "RGB"),
    _MEAN: ("", [103.53, 116.28, 123.675], [123.675, 116.28, 103.53]),
    _STD: ("", [1.0, 1.0, 1.0], [58.395, 57.12, 57.375]),
    _STRIDE: ("backbone.body.layer2.0.conv3.", True, False),
    "MODEL.ANCHOR_GENERATOR.NAME": (_ANCHOR_HEADS, "DefaultAnchorGenerator", "AnchorGenerator"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("roi_heads.box_predictor.", "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": ("roi_heads.box_predictor.", 0, 2),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("roi_heads.mask_head.", "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": ("roi_heads.mask_head.", 0, 2),
    "MODEL.ROI_MASK_HEAD.ALIGNED": ("roi_heads.mask_head.", True, False),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ("roi_heads.keypoint_head.", "ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": ("roi_heads.keypoint_head.", 0, 2),
}
_PREFIXES = {key: prefixes for key, (prefixes, _, _) in _KEYS.items()}
_PREFIXES[_P6] = "backbone.fpn.extra_blocks.p6."
_DETECTRON2 = {key: value for key, (_, value, _) in _KEYS.items()}
_TORCHVISION = {key: value for key, (_, _, value) in _KEYS.items()}
_SSD300 = {_FORMAT: "RGB", _MEAN: [122.99925, 116.9991, 103.9992], _STD: [1.0, 1.0, 1.0]}
_SSDLITE = {_FORMAT: "RGB", _MEAN: [127.5, 127.5, 127.5], _STD: [127.5, 127.5, 127.5]}
# Authors of backbones in Detectron2's format that were trained on RGB.
_RGB_AUTHORS = ("torchvision", "MOCO")
_HINTS = {
    "Detectron2": "list configs/Detectron2/Base-Detectron2.yaml last in _BASE_, ",
    "torchvision": "see configs/torchvision/, ",
}


def check_weights(cfg: CfgNode, model: nn.Module, name: str, class_names: list[str], *, strict: bool) -> None:
    """Reject weights that contradict the config or the classes of the dataset.

    `name` is MODEL.WEIGHTS or a checkpoint; the model may be on the device "meta". If `strict`, for
    evaluation, the weights must be complete and for exactly these classes.
    """
    state = model.state_dict()
    weights = read_for_model(model, name, download_weights(name))
    check_trained_classes(name, weights.content.get("class_names"), class_names, strict=strict)
    used = {key: value for key, value in weights.matched.items() if key in state}
    source, expected = _infer_conventions(weights, used)
    wrong = [
        f"{key} {_format(value)} (got {_format(get_value(cfg, key))})"
        for key, value in expected.items()
        if any(name.startswith(_PREFIXES[key]) for name in used) and not _is_close(value, get_value(cfg, key))
    ]
    if wrong:
        raise UserError(
            f"{name} has weights of {source}, whose conventions the config contradicts; set "
            f"{', '.join(wrong)}; {_HINTS.get(source, '')}or convert the file to keep the config "
            "(scripts/convert_weights.py)"
        )
    if not strict:
        return
    selected = select_class_rows(weights.matched, class_names, weights.from_detectron2)
    parameters = [key for key, _ in model.named_parameters()]
    missing = [key for key in parameters if key not in selected or selected[key].shape != state[key].shape]
    if missing:
        raise UserError(
            f"{name} is missing {len(missing)} of the model's parameters or has other shapes, such as for "
            f"{missing[0]}; it must have the same architecture and the {len(class_names)} classes of the "
            "dataset, which CLASSES in DATASETS.DECLARE chooses"
        )


def _format(value: Any) -> str:
    return str(value).replace(" ", "")


def _is_close(expected: Any, value: Any) -> bool:
    """Return whether values are equal, or lists of numbers that differ by less than 2%."""
    are_lists = isinstance(expected, list) and isinstance(value, list)
    if not are_lists or not are_numbers(expected + value):
        return expected == value
    # Projects round the means and standard deviations of the same weights differently.
    pairs = zip(expected, value, strict=False)
    return len(expected) == len(value) and all(math.isclose(a, b, rel_tol=0.02) for a, b in pairs)


def _infer_conventions(weights: Weights, used: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return (source of the weights, {key: value}), without the keys whose value is unknown."""
    author = str(weights.content.get("__author__"))
    config = weights.content.get("config")
    if isinstance(config, str):
        saved = flatten(parse_yaml(config, "the config in the weights"))
        return "a run", {key: saved[key] for key in _PREFIXES if key in saved}
    if author == "plaintrain":
        return author, {}
    if weights.from_detectron2 and author in _RGB_AUTHORS:
        return author, _TORCHVISION
    if weights.from_detectron2:
        return "Detectron2", _infer_detectron2(weights.tensors, used)
    # Checkpoints of plaintrain have the same parameter names as torchvision's weights.
    is_checkpoint = {"class_names", "iteration"} & weights.content.keys()
    return "torchvision", {} if is_checkpoint else _infer_torchvision(weights.tensors, used)


def _infer_detectron2(tensors: dict[str, Tensor], used: dict[str, Tensor]) -> dict[str, Any]:
    values = _DETECTRON2 | _infer_p6(used)
    conv2 = used.get("backbone.body.layer1.0.conv2.weight")
    # Like group norm, Caffe2's frozen norm has no running statistics.
    stem = "backbone.bottom_up.stem.conv1"
    has_frozen_norm = f"{stem}.norm.running_mean" in tensors or f"{stem}.weight" not in tensors
    if conv2 is not None and conv2.shape[:1] != conv2.shape[1:2]:
        # Grouped convolutions: Caffe2's ResNeXt.
        values |= {_STD: [57.375, 57.12, 58.395], _STRIDE: False}
    elif any("_gn_" in name for name in tensors) or not has_frozen_norm:
        # Group norm of Caffe2, or a model trained from scratch with another pixel scale.
        values |= {_STRIDE: False}
        del values[_STD]
    if "pixel_mean" in tensors and "pixel_std" in tensors:
        mean = tensors["pixel_mean"].flatten().tolist()
        std = tensors["pixel_std"].flatten().tolist()
        values |= {_MEAN: mean, _STD: std, _FORMAT: "BGR" if mean[0] <= mean[-1] else "RGB"}
    return values


def _infer_torchvision(tensors: dict[str, Tensor], used: dict[str, Tensor]) -> dict[str, Any]:
    if any(name.startswith("head.classification_head.module_list.") for name in tensors):
        ssd = {"backbone.features.0.weight": _SSD300, "backbone.features.0.0.0.weight": _SSDLITE}
        return next((values for name, values in ssd.items() if name in tensors), {})
    has_body = {"backbone.body.conv1.weight", "backbone.body.0.0.weight"} & tensors.keys()
    is_detector = has_body and any(name.startswith(("rpn.head.", "head.")) for name in tensors)
    if not is_detector and not any(re.match(r"(fc|classifier(\.\d)?)\.weight$", name) for name in tensors):
        return {}
    # SSD normalizes pixels differently from its pretrained backbone.
    is_ssd = any(name.startswith("backbone.features.") for name in used)
    return {_FORMAT: "RGB"} if is_ssd else _TORCHVISION | _infer_p6(used)


def _infer_p6(used: dict[str, Tensor]) -> dict[str, Any]:
    p6 = used.get("backbone.fpn.extra_blocks.p6.weight")
    return {} if p6 is None else {_P6: "p5" if p6.shape[:1] == p6.shape[1:2] else "res5"}
