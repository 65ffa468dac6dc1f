"""Every number of the configs that claim a recipe of Detectron2 or torchvision, against that recipe."""

from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import detection

from plaintrain.config import get_cfg
from plaintrain.config.yaml import flatten

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Defaults of Detectron2 of the keys that have the same name here, and what its code does without a key.
DETECTRON2 = Path(__file__).parent / "golden" / "detectron2_defaults.yaml"
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
_KEYPOINT = {
    **_RCNN,
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1500,
    "DATASETS.TRAIN": ["keypoints_coco_2017_train"],
    "DATASETS.TEST": ["keypoints_coco_2017_val"],
}
_VOC = {
    "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.STEPS": [12000, 16000],
    "SOLVER.MAX_ITER": 18000,
    "SOLVER.WARMUP_ITERS": 100,
}
# What each part of a file's name stands for.
_PARTS = {
    "faster_rcnn": _RCNN,
    "/rpn": {**_RCNN, "MODEL.META_ARCHITECTURE": "ProposalNetwork", "MODEL.RPN.POST_NMS_TOPK_TEST": 2000},
    "retinanet": _RETINANET,
    "mask_rcnn": {**_RCNN, "MODEL.MASK_ON": True},
    "keypoint_rcnn": _KEYPOINT,
    "R_101": {"MODEL.RESNETS.DEPTH": 101},
    "_3x": {"SOLVER.MAX_ITER": 270000, "SOLVER.STEPS": [210000, 250000]},
    "PascalVOC": _VOC,
}
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
RECIPES = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in [*CONFIGS.glob("COCO-[!O]*/*.yaml"), *CONFIGS.glob("[DP]*/*.yaml")]
    if "Base-" not in path.name
)
RECIPES = [name for name in RECIPES if name not in TRAININGS]
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
    ours, recipe = resolved(name), {}
    for part, keys in _PARTS.items():
        recipe |= keys if part in name else {}
    theirs = flatten(yaml.safe_load(DETECTRON2.read_text())) | _IN_CODE | recipe
    if not name.startswith("Detectron2/"):
        theirs |= {key: value for key, value in TORCHVISIONS.items() if key not in recipe}
        theirs["MODEL.WEIGHTS"] = f"torchvision://resnet{theirs['MODEL.RESNETS.DEPTH']}/IMAGENET1K_V1"
    theirs = {key: value for key, value in theirs.items() if matters(key, theirs["MODEL.META_ARCHITECTURE"])}
    assert differences(ours, theirs) == {}


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
