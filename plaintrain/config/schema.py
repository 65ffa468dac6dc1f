"""Allowed values and ranges of config keys: one table, checked by `check_cfg` before anything is built.

Limits that depend on the data, the backbone or the number of processes are checked elsewhere, and so are
the names that forks may extend (MODEL.META_ARCHITECTURE, MODEL.BACKBONE.NAME, INPUT.AUGMENTATIONS).
"""

import math
import re
from typing import Any

from plaintrain.config import rules
from plaintrain.config.config import NULLABLE, CfgNode, get_value
from plaintrain.config.defaults import get_cfg
from plaintrain.config.rules import Rule, allow, between, increasing, integer, list_of, number
from plaintrain.config.yaml import flatten
from plaintrain.utils.errors import ConfigError

DEFAULTS = flatten(get_cfg())
_NORM = allow("", "BN", "SyncBN", "GN")
_BOX_LOSS = allow("smooth_l1", "giou")
_POOLER = allow("ROIAlign", "ROIAlignV2")
_RESNET = "MODEL.BACKBONE.NAME=build_resnet_fpn_backbone|build_retinanet_resnet_fpn_backbone"
_FPN = _RESNET + "|build_mobilenet_v3_large_fpn_backbone"
_SSD = "as in configs/COCO-Detection/ssd*.yaml"
# Rules of all keys, or of all keys that match a pattern, of enabled features or not. Their upper limits
# keep a typing error from filling the memory or running forever; no real run comes near them.
_ALWAYS = {
    "VERSION": allow(2),
    "OUTPUT.WRITERS": list_of(allow("console", "json", "csv", "tensorboard"), "a list of {}"),
    "SEED": number("-1, or at least 0 and below 2**32", lambda value: -1 <= value < 2**32),
    "HANG_TIMEOUT *.MAX_TIME": between(0, 1e9),
    "*.*_PERIOD *_START *.PATIENCE *.NUM_DECAYS *.WARMUP_ITERS *.CHECKPOINT_MAX_TO_KEEP": rules.COUNT,
    "LOG_PERIOD *.MAX_ITER *.MAX_SKIPPED_STEPS": between(1, 2**31 - 1),
    "FLOAT32_PRECISION": allow("", "highest", "high", "medium"),
    "WORKFLOW": rules.WORKFLOW,
    "*.BATCH_SIZE_PER_IMAGE *.IMS_PER_BATCH *.ACCUMULATE_STEPS": between(1, 65536),
    "*.REFERENCE_*": between(0, 65536),
    "*.NMS_THRESH* *.SCORE_THRESH* *.IOU_THRESHOLD *.REPEAT_THRESHOLD *.POSITIVE_FRACTION": rules.PROBABILITY,
    "*.NORM_EPS *.OFFSET *.WARMUP_FACTOR *.GAMMA": rules.PROBABILITY,
    "*_RATIO": rules.FRACTION,
    "*.PRIOR_PROB": rules.INSIDE,
    "*.MOMENTUM *.DECAY": rules.BELOW_1,
    "*LOSS_WEIGHT *_BETA *.CENTER_SAMPLING_RADIUS *.FOCAL_LOSS_GAMMA *.BASE_LR*": rules.FACTOR,
    "*.WEIGHT_DECAY* *_LR_FACTOR *_MULTIPLIER *.CLIP_VALUE": rules.FACTOR,
    "*.TOPK_* *.PRE_NMS_TOPK_* *.POST_NMS_TOPK_* *.DETECTIONS_PER_IMAGE": between(1, 100_000),
    "*.NUM_CONV *.NUM_CONVS *.NUM_FC *.NUM_LEVELS *.FREEZE_AT": between(0, 100),
    "*.OUT_CHANNELS *.CONV_DIM": between(1, 8192),
    "*.FC_DIM": between(1, 16384),
    "*.POOLER_RESOLUTION": between(1, 64),
    "*.POOLER_SAMPLING_RATIO": between(0, 64),
    "*_FEATURES DATASETS.TRAIN DATASETS.TEST": rules.NAMES,
    "*.IOU_LABELS": list_of(integer(-1, 1), "a list of numbers {}"),
    "*.IOU_THRESHOLDS": increasing(list_of(rules.PROBABILITY, "2 increasing numbers in [0, 1]", 2, 2)),
    "*.ROI_HEADS.IOU_THRESHOLDS": list_of(rules.PROBABILITY, "a list of one number in [0, 1]", 1, 1),
    "*.BBOX_REG_WEIGHTS": list_of(rules.POSITIVE, "4 numbers {}", 4, 4),
    "MODEL.PIXEL_MEAN": list_of(between(-1e6, 1e6), "3 numbers {}", 3, 3),
    "MODEL.PIXEL_STD": list_of(rules.POSITIVE, "3 numbers {}", 3, 3),
    "*.LOAD_PROPOSALS *.PRECISE_BN.ENABLED": allow(False),
    "MODEL.EMA.EVALUATE MODEL.EMA.FINAL": allow("averaged", "raw"),
    "MODEL.RESNETS.NUM_GROUPS": between(1, 128),
    "MODEL.RESNETS.WIDTH_PER_GROUP": between(1, 1024),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": list_of(Rule("", lambda x: type(x) is bool), "4 bools", 4, 4),
    "MODEL.TINY.CHANNELS": list_of(integer(1, 8192), "1 to 10 numbers {}", 1, 10),
    "MODEL.ANCHOR_GENERATOR.NAME": allow("AnchorGenerator", "DefaultAnchorGenerator"),
    "MODEL.ANCHOR_GENERATOR.SIZES": rules.list_per_level(between(1, 1e6)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": rules.list_per_level(between(0.001, 1000)),
    "MODEL.RPN.CONV_DIMS": list_of(integer(-1, 8192), "1 to 100 numbers {}", 1, 100),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": list_of(integer(1, 8192), "1 to 100 numbers {}", 1, 100),
    "*.NUM_CLASSES *.NUM_KEYPOINTS *.MIN_KEYPOINTS_PER_IMAGE": between(0, 100_000),
    "*.FOCAL_LOSS_ALPHA": number("0 to 1, or -1 for none", lambda value: 0 <= value <= 1 or value == -1),
    "MODEL.SSD.ASPECT_RATIOS": rules.list_per_level(between(0.001, 1000), shortest=0),
    "MODEL.SSD.SCALES MODEL.SSD.STEPS": list_of(between(0.001, 1e6), "a list of numbers {}"),
    "*.MIN_SIZE_TRAIN *.MIN_SIZES": list_of(integer(0, 16384), "a list of numbers {}"),
    "*.MIN_SIZE_TEST": between(0, 16384),
    "*.MAX_SIZE *.MAX_SIZE_T*": between(1, 1_000_000),
    "INPUT.FIXED_SIZE": rules.FIXED_SIZE,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": allow("choice", "range"),
    "INPUT.AUGMENTATIONS": rules.AUGMENTATIONS,
    "INPUT.CROP.TYPE": allow("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": list_of(rules.POSITIVE, "2 numbers {}", 2, 2),
    "INPUT.FORMAT": allow("RGB", "BGR"),
    "INPUT.PIXEL_RANGE": rules.PIXEL_RANGE,
    "INPUT.RANDOM_FLIP": allow("horizontal", "vertical", "none"),
    "DATASETS.TRAIN_REPEAT_FACTOR": rules.REPEAT_FACTORS,
    "DATALOADER.NUM_WORKERS": between(0, 256),
    "DATALOADER.WORKER_TYPE": allow("process", "thread", "auto"),
    "DATALOADER.CACHE_BYTES": between(0, 2**50),
    "DATALOADER.GROUP_WINDOW SOLVER.MAX_EPOCHS": between(0, 1_000_000),
    "DATALOADER.SAMPLER_TRAIN": allow(
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "ClassBalancedTrainingSampler",
        "WeightedTrainingSampler",
        "RandomSubsetTrainingSampler",
    ),
    "SOLVER.OPTIMIZER": allow("SGD", "AdamW"),
    "SOLVER.MOMENTUM_SCHEDULE": rules.MOMENTUM_SCHEDULE,
    "SOLVER.MOMENTUM_INTERPOLATION": allow("linear", "cosine", "step"),
    "*.LR_SCHEDULER_NAME": allow("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.STEPS": increasing(list_of(rules.COUNT, "increasing iterations, {}")),
    "SOLVER.WARMUP_METHOD": allow("linear", "constant"),
    "*.NORM_TYPE": number("above 0 and at most 1000, or inf", lambda v: 0 < v <= 1000 or v == math.inf),
    "SOLVER.ON_NONFINITE": allow("stop", "skip"),
    "SOLVER.AMP.PRECISION": allow("float16", "bfloat16"),
    "TEST.EXPECTED_RESULTS": rules.EXPECTED_RESULTS,
    "TEST.KEYPOINT_OKS_SIGMAS": list_of(rules.POSITIVE, "a list of numbers {}"),
}
# Keys with a single allowed value exist so that Detectron2's files can be merged. The outer key is the
# condition of its rules: "" always, "KEY=VALUE|VALUE" if that key has one of these values.
_TABLE = {
    "": _ALWAYS,
    "MODEL.ANCHOR_GENERATOR.NAME=AnchorGenerator": {"MODEL.ANCHOR_GENERATOR.OFFSET": allow(0.0)},
    "MODEL.BACKBONE.NAME=build_ssd_vgg16_backbone|build_ssdlite_mobilenet_v3_large_backbone": {
        "MODEL.META_ARCHITECTURE": allow("SSD"),
    },
    _FPN: {"MODEL.FPN.NORM": _NORM, "MODEL.FPN.FUSE_TYPE": allow("sum")},
    _RESNET: {
        "MODEL.RESNETS.DEPTH": allow(18, 34, 50, 101, 152),
        "MODEL.RESNETS.NORM": allow("FrozenBN", "BN", "SyncBN", "GN"),
        "MODEL.RESNETS.RES5_DILATION": allow(1),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": allow(64),
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": allow([False, False, False, False]),
    },
    "MODEL.RESNETS.DEPTH=18|34": {
        "MODEL.RESNETS.NUM_GROUPS": allow(1),
        "MODEL.RESNETS.WIDTH_PER_GROUP": allow(64),
        "MODEL.RESNETS.STRIDE_IN_1X1": allow(False),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": allow(0, 64),
    },
    "MODEL.RESNETS.DEPTH=50|101|152": {"MODEL.RESNETS.RES2_OUT_CHANNELS": allow(0, 256)},
    "MODEL.BACKBONE.NAME=build_mobilenet_v3_large_fpn_backbone": {
        "MODEL.RESNETS.NORM": allow("FrozenBN", "BN", "SyncBN"),
    },
    "MODEL.BACKBONE.NAME=build_resnet_fpn_backbone": {
        "MODEL.RESNETS.OUT_FEATURES MODEL.FPN.IN_FEATURES": allow([], ["res2", "res3", "res4", "res5"]),
        "MODEL.RPN.IN_FEATURES": allow([], ["p2", "p3", "p4", "p5", "p6"]),
        "MODEL.ROI_HEADS.IN_FEATURES": allow([], ["p2", "p3", "p4", "p5"]),
    },
    "MODEL.BACKBONE.NAME=build_retinanet_resnet_fpn_backbone": {
        "MODEL.META_ARCHITECTURE": allow("RetinaNet", "FCOS"),
        "MODEL.FPN.P6_IN_FEATURE": allow("p5", "res5"),
        "MODEL.RESNETS.OUT_FEATURES MODEL.FPN.IN_FEATURES": allow([], ["res3", "res4", "res5"]),
        "MODEL.RETINANET.IN_FEATURES": allow(["p3", "p4", "p5", "p6", "p7"]),
    },
    "MODEL.BACKBONE.NAME=build_tiny_backbone": {"MODEL.TINY.NORM": allow("BN", "SyncBN", "GN")},
    "TEST.AUG.ENABLED=True": {"TEST.AUG.MIN_SIZES": list_of(integer(0, 16384), "1 or more numbers {}", 1)},
    "SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR": {"SOLVER.BASE_LR": rules.ABOVE_0},
    "SOLVER.CLIP_GRADIENTS.ENABLED=True": {
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": rules.ABOVE_0,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": allow("value", "norm", "full_model"),
    },
    "MODEL.META_ARCHITECTURE=RetinaNet|FCOS|SSD|ProposalNetwork": {
        "MODEL.MASK_ON MODEL.KEYPOINT_ON": allow(False),
    },
    "MODEL.META_ARCHITECTURE=GeneralizedRCNN|ProposalNetwork": {
        "MODEL.PROPOSAL_GENERATOR.NAME": allow("RPN"),
        "MODEL.RPN.HEAD_NAME": allow("StandardRPNHead"),
        "MODEL.RPN.BOUNDARY_THRESH": allow(-1),
        "MODEL.RPN.IOU_LABELS": allow([0, -1, 1]),
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RPN.BBOX_REG_WEIGHTS": allow((1.0, 1.0, 1.0, 1.0)),
        "MODEL.RPN.LOSS_NORMALIZER": allow("sampled", "batch_size"),
    },
    "MODEL.META_ARCHITECTURE=GeneralizedRCNN": {
        "MODEL.ROI_BOX_HEAD.NUM_FC": between(1, 100),
        "MODEL.ROI_HEADS.NAME": allow("StandardROIHeads"),
        "MODEL.ROI_HEADS.IOU_LABELS": allow([0, 1]),
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": allow(True),
        "MODEL.ROI_BOX_HEAD.NAME": allow("FastRCNNConvFCHead"),
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_BOX_HEAD.NORM": _NORM,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "*.CLS_AGNOSTIC_BBOX_REG *.TRAIN_ON_PRED_BOXES": allow(False),
    },
    "SOLVER.NESTEROV=True": {"SOLVER.MOMENTUM": rules.INSIDE},
    "MODEL.MASK_ON=True": {
        "MODEL.ROI_MASK_HEAD.NUM_CONV": between(1, 100),
        "MODEL.ROI_MASK_HEAD.NAME": allow("MaskRCNNConvUpsampleHead"),
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_MASK_HEAD.NORM": _NORM,
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": allow(False),
    },
    "MODEL.KEYPOINT_ON=True": {
        "MODEL.ROI_KEYPOINT_HEAD.NAME": allow("KRCNNConvDeconvUpsampleHead"),
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLER,
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": allow(True),
        "MODEL.ROI_KEYPOINT_HEAD.SCORE_TYPE": allow("logit", "probability"),
    },
    "MODEL.META_ARCHITECTURE=SSD": {
        "MODEL.SSD.HEAD_NAME": allow("SSDHead", "SSDLiteHead"),
        "MODEL.BACKBONE.NAME": Rule(f"a backbone without FPN ({_SSD})", lambda name: "fpn" not in name),
        "INPUT.FIXED_SIZE": list_of(integer(1, 16384), f"a height and a width {{}} ({_SSD})", 2, 2),
        "MODEL.SSD.POSITIVE_FRACTION": rules.INSIDE,
    },
    "MODEL.META_ARCHITECTURE=RetinaNet": {
        "MODEL.RETINANET.NUM_CONVS": allow(4),
        "MODEL.RETINANET.IOU_LABELS": allow([0, -1, 1]),
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RETINANET.LOSS_NORMALIZER": allow("image", "ema"),
        "MODEL.RETINANET.NORM": allow("", "GN"),
    },
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE=giou": {"MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": allow(0.0)},
}
RULES = {condition: rules.match_keys(patterns, DEFAULTS) for condition, patterns in _TABLE.items()}
_TYPES: dict[type, tuple[type, ...]] = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}
# Control characters, and halves of UTF-16 pairs, which no file name or log can hold.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check_cfg(cfg: CfgNode) -> None:
    """Check the values of all keys; the keys of a feature that is off only for their types and limits."""
    for key, default in DEFAULTS.items():
        value = get_value(cfg, key)
        types = _TYPES.get(type(default), (type(default),))
        if type(value) not in types and key not in NULLABLE:
            raise ConfigError(f"{key} must be of type {types[0].__name__}, got {value!r}")
    for condition, key_rules in RULES.items():
        switch, _, values = condition.partition("=")
        if switch and str(get_value(cfg, switch)) not in values.split("|"):
            continue
        context = f" with {switch} {get_value(cfg, switch)}" if switch else ""
        for key, rule in key_rules.items():
            value = get_value(cfg, key)
            if not (rule.accepts(value) or (value is None and key in NULLABLE)):
                raise ConfigError(f"{key} must be {rule.words}{context}, got {value!r}")
    for key, value in flatten(cfg).items():
        expected = _find_problem(value)
        # A NORM_TYPE of inf selects the maximum norm.
        if expected and not key.endswith(".NORM_TYPE"):
            raise ConfigError(f"{key} must hold only {expected}, got {value!r}")


def _find_problem(value: Any) -> str:
    """Return what a number or string within a value must be, or "" if all can be used."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next(filter(None, map(_find_problem, value)), "")
    if type(value) is float and not math.isfinite(value):
        return "finite numbers"
    if type(value) is int and value.bit_length() > 64:
        return "numbers below 2**64"
    is_bad = isinstance(value, str) and (len(value) > 4096 or _UNPRINTABLE.search(value))
    return "up to 4096 printable characters" if is_bad else ""
