"""Allowed values and ranges of config keys: one table, checked by `check_cfg` before anything is built.

Limits that depend on the data, the backbone or the number of processes are checked elsewhere, and so are
the names that forks may extend (MODEL.META_ARCHITECTURE, MODEL.BACKBONE.NAME, INPUT.AUGMENTATIONS).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from plaintrain.config.config import CfgNode, get_value
from plaintrain.config.yaml import flatten
from plaintrain.utils.errors import ConfigError


class Rule(NamedTuple):
    """Condition on a value, in words for the error and as a predicate."""

    words: str
    accepts: Callable[[Any], bool]


def _one_of(*allowed: Any) -> Rule:
    return Rule(" or ".join(map(repr, allowed)), lambda value: value in allowed)


def _number(words: str, is_in_range: Callable[[float], bool]) -> Rule:
    def accepts(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and is_in_range(value)

    return Rule(words, accepts)


def _list_of(rule: Rule, words: str, length: int | None = None) -> Rule:
    return Rule(words, lambda values: length in (None, len(values)) and all(map(rule.accepts, values)))


_ANY_NUMBER = _number("a number", lambda value: True)
_AT_LEAST_0 = _number("at least 0", lambda value: value >= 0)
_AT_LEAST_1 = _number("at least 1", lambda value: value >= 1)
_ABOVE_0 = _number("above 0", lambda value: value > 0)
_BELOW_1 = _number("at least 0 and below 1", lambda value: 0 <= value < 1)
_FRACTION = _number("above 0 and at most 1", lambda value: 0 < value <= 1)
_INSIDE = _number("above 0 and below 1", lambda value: 0 < value < 1)
_WIDTHS = Rule("1 or more numbers >= 1", lambda values: values and all(map(_AT_LEAST_1.accepts, values)))
_NORM = _one_of("", "BN", "SyncBN", "GN")
_BOX_LOSS = _one_of("smooth_l1", "giou")
_POOLER = _one_of("ROIAlign", "ROIAlignV2")
_WRITER = _one_of("console", "json", "csv", "tensorboard")
_EXPECTED = Rule("[task, metric, value, tolerance]", lambda item: isinstance(item, list) and len(item) == 4)


def _is_momentum_schedule(points: list) -> bool:
    are_pairs = all(isinstance(point, list) and len(point) == 2 for point in points)
    if not are_pairs or not all(_ANY_NUMBER.accepts(start) and _BELOW_1.accepts(m) for start, m in points):
        return False
    return all(before[0] < after[0] for before, after in itertools.pairwise(points))


def _is_workflow(flows: list) -> bool:
    def is_flow(flow):
        is_pair = isinstance(flow, list | tuple) and len(flow) == 2
        return is_pair and flow[0] in ("train", "val") and type(flow[1]) is int and flow[1] >= 1

    return all(map(is_flow, flows)) and any(mode == "train" for mode, _ in flows)


def _thresholds(count: int) -> Rule:
    def accepts(values):
        are_numbers = len(values) == count and all(map(_ANY_NUMBER.accepts, values))
        return are_numbers and all(a <= b for a, b in itertools.pairwise([0, *values, 1]))

    words = "a list of one number in [0, 1]" if count == 1 else f"{count} increasing numbers in [0, 1]"
    return Rule(words, accepts)


_MOMENTA = "[[iteration, momentum], ...], iterations increasing, momenta in [0, 1)"
_FLOWS = '[["train" or "val", epochs], ...], epochs at least 1, with a train flow'
_RESNET = "MODEL.BACKBONE.NAME=build_resnet_fpn_backbone|build_retinanet_resnet_fpn_backbone"
_FPN = _RESNET + "|build_mobilenet_v3_large_fpn_backbone"
# Keys with a single allowed value exist so that Detectron2's files can be merged. The outer key is the
# condition of its rules: "" always, "KEY=VALUE|VALUE" if that key has one of these values.
RULES = {
    "": {
        "VERSION": _one_of(2),
        "OUTPUT.WRITERS": _list_of(_WRITER, f"a list of {_WRITER.words}"),
        "SEED": _number("-1, or at least 0 and below 2**32", lambda value: -1 <= value < 2**32),
        "HANG_TIMEOUT": _AT_LEAST_0,
        "LOG_PERIOD": _AT_LEAST_1,
        "FLOAT32_PRECISION": _one_of("", "highest", "high", "medium"),
        "WORKFLOW": Rule(_FLOWS, _is_workflow),
        "MODEL.PIXEL_MEAN": _list_of(_ANY_NUMBER, "3 numbers", 3),
        "MODEL.PIXEL_STD": _list_of(_ABOVE_0, "3 numbers above 0", 3),
        "MODEL.LOAD_PROPOSALS": _one_of(False),
        "MODEL.EMA.DECAY": _BELOW_1,
        "MODEL.EMA.EVALUATE": _one_of("averaged", "raw"),
        "MODEL.EMA.FINAL": _one_of("averaged", "raw"),
        "MODEL.BACKBONE.FREEZE_AT": _AT_LEAST_0,
        "MODEL.ANCHOR_GENERATOR.NAME": _one_of("AnchorGenerator", "DefaultAnchorGenerator"),
        "INPUT.FORMAT": _one_of("RGB", "BGR"),
        "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
        "DATALOADER.NUM_WORKERS": _AT_LEAST_0,
        "DATALOADER.WORKER_TYPE": _one_of("process", "thread", "auto"),
        "DATALOADER.CACHE_BYTES": _AT_LEAST_0,
        "DATALOADER.GROUP_WINDOW": _AT_LEAST_0,
        "DATALOADER.SAMPLER_TRAIN": _one_of(
            "TrainingSampler",
            "RepeatFactorTrainingSampler",
            "ClassBalancedTrainingSampler",
            "WeightedTrainingSampler",
            "RandomSubsetTrainingSampler",
        ),
        "DATALOADER.RANDOM_SUBSET_RATIO": _FRACTION,
        "SOLVER.OPTIMIZER": _one_of("SGD", "AdamW"),
        "SOLVER.IMS_PER_BATCH": _AT_LEAST_1,
        "SOLVER.MAX_ITER": _AT_LEAST_1,
        "SOLVER.MAX_EPOCHS": _AT_LEAST_0,
        "SOLVER.MAX_TIME": _AT_LEAST_0,
        "SOLVER.ACCUMULATE_STEPS": _AT_LEAST_1,
        "SOLVER.PATIENCE": _AT_LEAST_0,
        "SOLVER.BASE_LR": _AT_LEAST_0,
        "SOLVER.MOMENTUM_SCHEDULE": Rule(_MOMENTA, _is_momentum_schedule),
        "SOLVER.MOMENTUM_INTERPOLATION": _one_of("linear", "cosine", "step"),
        "SOLVER.LR_SCHEDULER_NAME": _one_of(
            "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
        ),
        "SOLVER.STEPS": _list_of(_ANY_NUMBER, "iterations"),
        "SOLVER.WARMUP_ITERS": _AT_LEAST_0,
        "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
        "SOLVER.CHECKPOINT_PERIOD": _AT_LEAST_0,
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": _AT_LEAST_0,
        "SOLVER.ON_NONFINITE": _one_of("stop", "skip"),
        "SOLVER.MAX_SKIPPED_STEPS": _AT_LEAST_1,
        "SOLVER.AMP.PRECISION": _one_of("float16", "bfloat16"),
        "SOLVER.REFERENCE_WORLD_SIZE": _AT_LEAST_0,
        "SOLVER.REFERENCE_IMS_PER_BATCH": _AT_LEAST_0,
        "TEST.EVAL_PERIOD": _AT_LEAST_0,
        "TEST.EVAL_START": _AT_LEAST_0,
        "TEST.VAL_LOSS_PERIOD": _AT_LEAST_0,
        "TEST.DETECTIONS_PER_IMAGE": _AT_LEAST_1,
        "TEST.IMS_PER_BATCH": _AT_LEAST_1,
        "TEST.EXPECTED_RESULTS": _list_of(_EXPECTED, f"a list of {_EXPECTED.words}"),
        "TEST.PRECISE_BN.ENABLED": _one_of(False),
    },
    "MODEL.ANCHOR_GENERATOR.NAME=AnchorGenerator": {"MODEL.ANCHOR_GENERATOR.OFFSET": _one_of(0.0)},
    "MODEL.BACKBONE.NAME=build_ssd_vgg16_backbone|build_ssdlite_mobilenet_v3_large_backbone": {
        "MODEL.META_ARCHITECTURE": _one_of("SSD"),
    },
    _FPN: {"MODEL.FPN.NORM": _NORM, "MODEL.FPN.FUSE_TYPE": _one_of("sum")},
    _RESNET: {
        "MODEL.RESNETS.DEPTH": _one_of(18, 34, 50, 101, 152),
        "MODEL.RESNETS.NORM": _one_of("FrozenBN", "BN", "SyncBN", "GN"),
        "MODEL.RESNETS.RES5_DILATION": _one_of(1),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": _one_of(64),
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": _one_of([False, False, False, False]),
    },
    "MODEL.RESNETS.DEPTH=18|34": {
        "MODEL.RESNETS.NUM_GROUPS": _one_of(1),
        "MODEL.RESNETS.WIDTH_PER_GROUP": _one_of(64),
        "MODEL.RESNETS.STRIDE_IN_1X1": _one_of(False),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": _one_of(0, 64),
    },
    "MODEL.RESNETS.DEPTH=50|101|152": {"MODEL.RESNETS.RES2_OUT_CHANNELS": _one_of(0, 256)},
    "MODEL.BACKBONE.NAME=build_mobilenet_v3_large_fpn_backbone": {
        "MODEL.RESNETS.NORM": _one_of("FrozenBN", "BN", "SyncBN"),
    },
    "MODEL.BACKBONE.NAME=build_resnet_fpn_backbone": {
        "MODEL.RESNETS.OUT_FEATURES": _one_of([], ["res2", "res3", "res4", "res5"]),
        "MODEL.FPN.IN_FEATURES": _one_of([], ["res2", "res3", "res4", "res5"]),
        "MODEL.RPN.IN_FEATURES": _one_of([], ["p2", "p3", "p4", "p5", "p6"]),
        "MODEL.ROI_HEADS.IN_FEATURES": _one_of([], ["p2", "p3", "p4", "p5"]),
    },
    "MODEL.BACKBONE.NAME=build_retinanet_resnet_fpn_backbone": {
        "MODEL.META_ARCHITECTURE": _one_of("RetinaNet", "FCOS"),
        "MODEL.FPN.P6_IN_FEATURE": _one_of("p5", "res5"),
        "MODEL.RESNETS.OUT_FEATURES": _one_of([], ["res3", "res4", "res5"]),
        "MODEL.FPN.IN_FEATURES": _one_of([], ["res3", "res4", "res5"]),
        "MODEL.RETINANET.IN_FEATURES": _one_of(["p3", "p4", "p5", "p6", "p7"]),
    },
    "MODEL.BACKBONE.NAME=build_tiny_backbone": {
        "MODEL.TINY.CHANNELS": _WIDTHS,
        "MODEL.TINY.NORM": _one_of("BN", "SyncBN", "GN"),
    },
    "INPUT.CROP.ENABLED=True": {
        "INPUT.CROP.TYPE": _one_of("relative", "relative_range", "absolute", "absolute_range"),
    },
    "DATALOADER.SAMPLER_TRAIN=RepeatFactorTrainingSampler": {"DATALOADER.REPEAT_THRESHOLD": _FRACTION},
    "SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR": {"SOLVER.BASE_LR": _ABOVE_0},
    "SOLVER.CLIP_GRADIENTS.ENABLED=True": {
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm", "full_model"),
    },
    "MODEL.META_ARCHITECTURE=RetinaNet|FCOS|SSD|ProposalNetwork": {
        "MODEL.MASK_ON": _one_of(False),
        "MODEL.KEYPOINT_ON": _one_of(False),
    },
    "MODEL.META_ARCHITECTURE=GeneralizedRCNN|ProposalNetwork": {
        "MODEL.PROPOSAL_GENERATOR.NAME": _one_of("RPN"),
        "MODEL.RPN.HEAD_NAME": _one_of("StandardRPNHead"),
        "MODEL.RPN.BOUNDARY_THRESH": _one_of(-1),
        "MODEL.RPN.IOU_THRESHOLDS": _thresholds(2),
        "MODEL.RPN.IOU_LABELS": _one_of([0, -1, 1]),
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RPN.BBOX_REG_WEIGHTS": _one_of((1.0, 1.0, 1.0, 1.0)),
        "MODEL.RPN.SMOOTH_L1_BETA": _AT_LEAST_0,
        "MODEL.RPN.LOSS_NORMALIZER": _one_of("sampled", "batch_size"),
    },
    "MODEL.META_ARCHITECTURE=GeneralizedRCNN": {
        "MODEL.ROI_HEADS.NAME": _one_of("StandardROIHeads"),
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": _thresholds(1),
        "MODEL.ROI_HEADS.IOU_LABELS": _one_of([0, 1]),
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": _one_of(True),
        "MODEL.ROI_BOX_HEAD.NAME": _one_of("FastRCNNConvFCHead"),
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_BOX_HEAD.NUM_FC": _AT_LEAST_1,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": _AT_LEAST_0,
        "MODEL.ROI_BOX_HEAD.NORM": _NORM,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _AT_LEAST_0,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": _one_of(False),
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": _one_of(False),
    },
    "MODEL.MASK_ON=True": {
        "MODEL.ROI_MASK_HEAD.NAME": _one_of("MaskRCNNConvUpsampleHead"),
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": _AT_LEAST_1,
        "MODEL.ROI_MASK_HEAD.NORM": _NORM,
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": _one_of(False),
    },
    "MODEL.KEYPOINT_ON=True": {
        "MODEL.ROI_KEYPOINT_HEAD.NAME": _one_of("KRCNNConvDeconvUpsampleHead"),
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": _WIDTHS,
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": _one_of(True),
        "MODEL.ROI_KEYPOINT_HEAD.SCORE_TYPE": _one_of("logit", "probability"),
    },
    "MODEL.META_ARCHITECTURE=SSD": {
        "MODEL.SSD.HEAD_NAME": _one_of("SSDHead", "SSDLiteHead"),
        "MODEL.BACKBONE.NAME": Rule("a backbone without FPN", lambda name: "fpn" not in name),
        "INPUT.FIXED_SIZE": _list_of(_AT_LEAST_1, "a height and a width", 2),
        "MODEL.SSD.POSITIVE_FRACTION": _INSIDE,
    },
    "MODEL.META_ARCHITECTURE=FCOS": {"MODEL.FCOS.PRIOR_PROB": _INSIDE},
    "MODEL.META_ARCHITECTURE=RetinaNet": {
        "MODEL.RETINANET.NUM_CONVS": _one_of(4),
        "MODEL.RETINANET.IOU_THRESHOLDS": _thresholds(2),
        "MODEL.RETINANET.IOU_LABELS": _one_of([0, -1, 1]),
        "MODEL.RETINANET.PRIOR_PROB": _INSIDE,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _AT_LEAST_0,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _AT_LEAST_0,
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": _number(
            "0 to 1, or -1 for none", lambda value: 0 <= value <= 1 or value == -1
        ),
        "MODEL.RETINANET.LOSS_NORMALIZER": _one_of("image", "ema"),
        "MODEL.RETINANET.NORM": _one_of("", "GN"),
    },
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE=giou": {"MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _one_of(0.0)},
}
# inf selects the maximum norm.
_MAY_BE_INFINITE = "SOLVER.CLIP_GRADIENTS.NORM_TYPE"


def check_cfg(cfg: CfgNode) -> None:
    """Check the values of all keys; the keys of a feature only if it is enabled."""
    for condition, rules in RULES.items():
        switch, _, values = condition.partition("=")
        if switch and str(get_value(cfg, switch)) not in values.split("|"):
            continue
        context = f" with {switch} {get_value(cfg, switch)}" if switch else ""
        for key, rule in rules.items():
            value = get_value(cfg, key)
            if not rule.accepts(value):
                raise ConfigError(f"{key} must be {rule.words}{context}, got {value!r}")
    for key, value in flatten(cfg).items():
        if isinstance(value, float) and not math.isfinite(value) and key != _MAY_BE_INFINITE:
            raise ConfigError(f"{key} must be a finite number, got {value}")
