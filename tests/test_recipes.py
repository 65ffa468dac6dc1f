"""Every number of the configs that claim a recipe of Detectron2 or torchvision, against that recipe."""

from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import detection

from plaintrain.config import get_cfg
from plaintrain.config.yaml import flatten

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Detectron2's defaults (detectron2/config/defaults.py) of the keys that have the same name here; the last
# lines are what its code does without a key.
DETECTRON2 = """
VERSION: 2
OUTPUT_DIR: ./output
SEED: -1
CUDNN_BENCHMARK: False
FLOAT32_PRECISION: ""
MODEL:
  LOAD_PROPOSALS: False
  MASK_ON: False
  KEYPOINT_ON: False
  META_ARCHITECTURE: GeneralizedRCNN
  PIXEL_MEAN: [103.53, 116.28, 123.675]
  PIXEL_STD: [1.0, 1.0, 1.0]
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 2}
  FPN: {OUT_CHANNELS: 256, NORM: "", FUSE_TYPE: sum}
  PROPOSAL_GENERATOR: {NAME: RPN}
  ANCHOR_GENERATOR: {NAME: DefaultAnchorGenerator, SIZES: [[32, 64, 128, 256, 512]],
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]], OFFSET: 0.0}
  RPN: {HEAD_NAME: StandardRPNHead, BOUNDARY_THRESH: -1, IOU_THRESHOLDS: [0.3, 0.7], IOU_LABELS: [0, -1, 1],
    BATCH_SIZE_PER_IMAGE: 256, POSITIVE_FRACTION: 0.5, BBOX_REG_LOSS_TYPE: smooth_l1, LOSS_WEIGHT: 1.0,
    BBOX_REG_LOSS_WEIGHT: 1.0, BBOX_REG_WEIGHTS: [1.0, 1.0, 1.0, 1.0], SMOOTH_L1_BETA: 0.0,
    PRE_NMS_TOPK_TRAIN: 12000, PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TRAIN: 2000, POST_NMS_TOPK_TEST: 1000,
    NMS_THRESH: 0.7, CONV_DIMS: [-1]}
  ROI_HEADS: {NAME: Res5ROIHeads, IOU_THRESHOLDS: [0.5], IOU_LABELS: [0, 1], BATCH_SIZE_PER_IMAGE: 512,
    POSITIVE_FRACTION: 0.25, SCORE_THRESH_TEST: 0.05, NMS_THRESH_TEST: 0.5, PROPOSAL_APPEND_GT: True}
  ROI_BOX_HEAD: {NAME: "", BBOX_REG_LOSS_TYPE: smooth_l1, BBOX_REG_LOSS_WEIGHT: 1.0, SMOOTH_L1_BETA: 0.0,
    BBOX_REG_WEIGHTS: [10.0, 10.0, 5.0, 5.0], POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0,
    POOLER_TYPE: ROIAlignV2, NUM_FC: 0, FC_DIM: 1024, NUM_CONV: 0, CONV_DIM: 256, NORM: "",
    CLS_AGNOSTIC_BBOX_REG: False, TRAIN_ON_PRED_BOXES: False}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0,
    NUM_CONV: 0, CONV_DIM: 256, NORM: "", CLS_AGNOSTIC_MASK: False, POOLER_TYPE: ROIAlignV2}
  ROI_KEYPOINT_HEAD: {NAME: KRCNNConvDeconvUpsampleHead, POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0,
    CONV_DIMS: [512, 512, 512, 512, 512, 512, 512, 512], MIN_KEYPOINTS_PER_IMAGE: 1, LOSS_WEIGHT: 1.0,
    NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS: True, POOLER_TYPE: ROIAlignV2}
  RETINANET: {IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CONVS: 4, IOU_THRESHOLDS: [0.4, 0.5], NORM: "",
    IOU_LABELS: [0, -1, 1], PRIOR_PROB: 0.01, SCORE_THRESH_TEST: 0.05, TOPK_CANDIDATES_TEST: 1000,
    NMS_THRESH_TEST: 0.5, BBOX_REG_WEIGHTS: [1.0, 1.0, 1.0, 1.0], FOCAL_LOSS_GAMMA: 2.0,
    FOCAL_LOSS_ALPHA: 0.25, SMOOTH_L1_LOSS_BETA: 0.1, BBOX_REG_LOSS_TYPE: smooth_l1}
  RESNETS: {DEPTH: 50, NUM_GROUPS: 1, NORM: FrozenBN, WIDTH_PER_GROUP: 64, STRIDE_IN_1X1: True,
    RES5_DILATION: 1, STEM_OUT_CHANNELS: 64, DEFORM_ON_PER_STAGE: [False, False, False, False]}
INPUT: {MIN_SIZE_TRAIN: [800], MIN_SIZE_TRAIN_SAMPLING: choice, MAX_SIZE_TRAIN: 1333, MIN_SIZE_TEST: 800,
  MAX_SIZE_TEST: 1333, RANDOM_FLIP: horizontal, FORMAT: BGR,
  CROP: {ENABLED: False, TYPE: relative_range, SIZE: [0.9, 0.9]}}
DATALOADER: {NUM_WORKERS: 4, ASPECT_RATIO_GROUPING: True, SAMPLER_TRAIN: TrainingSampler,
  REPEAT_THRESHOLD: 0.0, REPEAT_SQRT: True, FILTER_EMPTY_ANNOTATIONS: True}
SOLVER: {LR_SCHEDULER_NAME: WarmupMultiStepLR, MAX_ITER: 40000, BASE_LR: 0.001, BASE_LR_END: 0.0,
  MOMENTUM: 0.9, NESTEROV: False, WEIGHT_DECAY: 0.0001, WEIGHT_DECAY_NORM: 0.0, GAMMA: 0.1, STEPS: [30000],
  NUM_DECAYS: 3, WARMUP_FACTOR: 0.001, WARMUP_ITERS: 1000, WARMUP_METHOD: linear, RESCALE_INTERVAL: False,
  CHECKPOINT_PERIOD: 5000, IMS_PER_BATCH: 16, REFERENCE_WORLD_SIZE: 0, BIAS_LR_FACTOR: 1.0,
  WEIGHT_DECAY_BIAS: null, AMP: {ENABLED: False},
  CLIP_GRADIENTS: {ENABLED: False, CLIP_TYPE: value, CLIP_VALUE: 1.0, NORM_TYPE: 2.0}}
TEST: {EXPECTED_RESULTS: [], EVAL_PERIOD: 0, KEYPOINT_OKS_SIGMAS: [], DETECTIONS_PER_IMAGE: 100,
  PRECISE_BN: {ENABLED: False}, AUG: {ENABLED: False, MAX_SIZE: 4000, FLIP: True,
  MIN_SIZES: [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]}}
"""
_IN_CODE = {
    "MODEL.RPN.LOSS_NORMALIZER": "batch_size",
    "MODEL.RPN.SCORE_THRESH": 0.0,
    "MODEL.FPN.P6_IN_FEATURE": "res5",
    "MODEL.RESNETS.NORM_EPS": 1e-5,
    "SOLVER.OPTIMIZER": "SGD",
    "INPUT.AUGMENTATIONS": [],
    "INPUT.FIXED_SIZE": [0, 0],
    "MODEL.ROI_MASK_HEAD.ALIGNED": True,
}
# Its configs, each as the differences from the defaults.
_1X = {"SOLVER.MAX_ITER": 90000, "SOLVER.STEPS": [60000, 80000]}
_3X = {"SOLVER.MAX_ITER": 270000, "SOLVER.STEPS": [210000, 250000]}
_COCO = {
    **_1X,
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
}
_RCNN = {
    **_COCO,
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "SOLVER.BASE_LR": 0.02,
}
_RETINANET = {
    **_COCO,
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)],
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    "SOLVER.BASE_LR": 0.01,
}
_MASK = {**_RCNN, "MODEL.MASK_ON": True}
_KEYPOINT = {
    **_RCNN,
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1500,
    "DATASETS.TRAIN": ["keypoints_coco_2017_train"],
    "DATASETS.TEST": ["keypoints_coco_2017_val"],
}
_R101 = {"MODEL.RESNETS.DEPTH": 101}
RECIPES = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": _RCNN,
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": _RCNN | _3X,
    "COCO-Detection/faster_rcnn_R_101_FPN_1x": _RCNN | _R101,
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": _RCNN | _R101 | _3X,
    "COCO-Detection/rpn_R_50_FPN_1x": _RCNN
    | {"MODEL.META_ARCHITECTURE": "ProposalNetwork", "MODEL.RPN.POST_NMS_TOPK_TEST": 2000},
    "COCO-Detection/retinanet_R_50_FPN_1x": _RETINANET,
    "COCO-Detection/retinanet_R_50_FPN_3x": _RETINANET | _3X,
    "COCO-Detection/retinanet_R_101_FPN_1x": _RETINANET | _R101,
    "COCO-Detection/retinanet_R_101_FPN_3x": _RETINANET | _R101 | _3X,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": _MASK,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": _MASK | _3X,
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": _MASK | _R101 | _3X,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": _KEYPOINT,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": _KEYPOINT | _3X,
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x": _KEYPOINT | _R101 | _3X,
    "PascalVOC-Detection/faster_rcnn_R_50_FPN": _RCNN
    | {
        "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
        "DATASETS.TEST": ["voc_2007_test"],
        "SOLVER.STEPS": [12000, 16000],
        "SOLVER.MAX_ITER": 18000,
        "SOLVER.WARMUP_ITERS": 100,
    },
    "Detectron2/faster_rcnn_R_50_FPN_3x": _RCNN | _3X,
    "Detectron2/faster_rcnn_R_101_FPN_3x": _RCNN | _R101 | _3X,
    "Detectron2/mask_rcnn_R_50_FPN_3x": _MASK | _3X,
    "Detectron2/keypoint_rcnn_R_50_FPN_3x": _KEYPOINT | _3X,
    "Detectron2/retinanet_R_50_FPN_3x": _RETINANET | _3X,
}
# Keys on which all files but those of Detectron2/ follow torchvision: their weights come from there.
TORCHVISIONS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.P6_IN_FEATURE": "p5",
    "MODEL.ANCHOR_GENERATOR.NAME": "AnchorGenerator",
    "MODEL.RPN.SMOOTH_L1_BETA": 1 / 9,
    "MODEL.RPN.LOSS_NORMALIZER": "sampled",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1 / 9,
    **{f"MODEL.ROI_{head}_HEAD.POOLER_TYPE": "ROIAlign" for head in ("BOX", "MASK", "KEYPOINT")},
    **{f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO": 2 for head in ("BOX", "MASK", "KEYPOINT")},
}
# What a file of another architecture says nothing about: the key's section -> where it matters.
_SECTIONS = {
    "MODEL.RETINANET": ["RetinaNet"],
    "MODEL.RPN": ["GeneralizedRCNN", "ProposalNetwork"],
    "MODEL.ROI": ["GeneralizedRCNN"],
}


def resolved(name):
    cfg = get_cfg()
    cfg.merge_from_file(CONFIGS / f"{name}.yaml")
    return flatten(cfg)


def close(a, b, rel=1e-6):
    """Return whether two values are equal, numbers up to rounding."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(close(x, y, rel) for x, y in zip(a, b, strict=True))
    is_float = isinstance(a, float) or isinstance(b, float)
    return a == pytest.approx(b, rel=rel) if is_float and a is not None and b is not None else a == b


def differences(ours, theirs, rel=1e-6):
    return {key: (ours[key], value) for key, value in theirs.items() if not close(ours[key], value, rel)}


def matters(key, architecture):
    return all(architecture in used for section, used in _SECTIONS.items() if key.startswith(section))


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_is_that_of_detectron2(name):
    ours, recipe = resolved(name), RECIPES[name]
    theirs = flatten(yaml.safe_load(DETECTRON2)) | _IN_CODE | recipe
    if not name.startswith("Detectron2/"):
        theirs |= {key: value for key, value in TORCHVISIONS.items() if key not in recipe}
        theirs["MODEL.WEIGHTS"] = f"torchvision://resnet{theirs['MODEL.RESNETS.DEPTH']}/IMAGENET1K_V1"
    theirs = {key: value for key, value in theirs.items() if matters(key, theirs["MODEL.META_ARCHITECTURE"])}
    assert differences(ours, theirs) == {}


# Of torchvision's references/detection: 120 epochs with steps at 80 and 110, 660 epochs, each over the 117266
# images of COCO with objects, on 8 GPUs. Of Detectron2: FCOS, and its baselines with large-scale jitter
# (which also use mixed precision).
TRAININGS = {
    "COCO-Detection/fcos_R_50_FPN_1x": {
        **_COCO,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.01,
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.FPN.P6_IN_FEATURE": "p5",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_LSJ_copy_paste": {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RPN.CONV_DIMS": [-1, -1],
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.FPN.NORM": "SyncBN",
        "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
        "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
        "SOLVER.IMS_PER_BATCH": 64,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.WEIGHT_DECAY": 0.00004,
        "SOLVER.WARMUP_ITERS": 500,
        "SOLVER.WARMUP_FACTOR": 0.067,
        "SOLVER.STEPS": [163889, 177546],
        "SOLVER.MAX_ITER": 184375,
        "SOLVER.GAMMA": 0.1,
    },
    "COCO-Detection/ssd300_VGG_16": {
        "SOLVER.IMS_PER_BATCH": 8 * 4,
        "SOLVER.MAX_ITER": 120 * 117266 / 32,
        "SOLVER.STEPS": [80 * 117266 / 32, 110 * 117266 / 32],
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.WEIGHT_DECAY": 0.0005,
        "SOLVER.GAMMA": 0.1,
        "SOLVER.MOMENTUM": 0.9,
    },
    "COCO-Detection/ssdlite320_MobileNetV3_large": {
        "SOLVER.IMS_PER_BATCH": 8 * 24,
        "SOLVER.MAX_ITER": 660 * 117266 / 192,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.BASE_LR": 0.15,
        "SOLVER.WEIGHT_DECAY": 0.00004,
        "SOLVER.MOMENTUM": 0.9,
    },
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "torchvision").glob("*.yaml")), ids=lambda path: path.stem)
def test_images_of_a_model_have_torchvisions_sizes(path):
    """Settings of the modules are compared in test_architectures.py; schedules are for fine-tuning."""
    ours = resolved(f"torchvision/{path.stem}")
    if "ssd" in path.stem:
        # As the names say.
        theirs = {"INPUT.FIXED_SIZE": [320, 320] if "320" in path.stem else [300, 300]}
    else:
        with torch.device("meta"):
            transform = getattr(detection, path.stem)(weights=None, weights_backbone=None).transform
        theirs = {"INPUT.MIN_SIZE_TEST": transform.min_size[-1], "INPUT.MAX_SIZE_TEST": transform.max_size}
    if "rcnn" in path.stem:
        # torchvision's losses have no arguments.
        theirs |= {f"MODEL.{head}.SMOOTH_L1_BETA": 1 / 9 for head in ("RPN", "ROI_BOX_HEAD")}
    assert differences(ours, theirs) == {}


@pytest.mark.parametrize("name", TRAININGS)
def test_every_number_of_a_training_is_that_of_its_project(name):
    # Iterations of epochs are rounded to hundreds.
    rel = 1e-3 if "ssd" in name else 1e-6
    assert differences(resolved(name), TRAININGS[name], rel) == {}


def test_every_config_with_a_recipe_is_compared():
    files = [*CONFIGS.glob("COCO-[!O]*/*.yaml"), *CONFIGS.glob("[DP]*/*.yaml")]
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files}
    names = {name for name in names if "Base-" not in name}
    assert names == RECIPES.keys() | TRAININGS.keys()
