"""Checks before a run starts, and the numbers that the datasets decide."""

import logging

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.checkpoint.pretrained import locate_weights
from plaintrain.config import check_cfg, get_value, set_value
from plaintrain.data.build import check_batch_size
from plaintrain.data.catalog import MetadataCatalog, get_common_class_names
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.datasets.builtin import EVALUATORS
from plaintrain.data.images import get_pixel_range
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.tta import build_tta_mapper
from plaintrain.evaluation.coco_backend import get_oks_sigmas
from plaintrain.evaluation.detections import load_ground_truth
from plaintrain.modeling.build import build_model, get_device, get_num_classes_key
from plaintrain.solver.amp import build_autocast
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


def resolve_num_classes(cfg, eval_only):
    """Take the number of classes from the datasets; return their names."""
    key = get_num_classes_key(cfg)
    # Who only evaluates need not have the training images.
    train = () if eval_only and cfg.DATASETS.TEST else cfg.DATASETS.TRAIN
    names = [*train, *cfg.DATASETS.TEST]
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: give --config-file, or name a dataset")
    classes = get_common_class_names(names)
    _settle_number(cfg, key, names[0], classes, "classes")
    if cfg.MODEL.KEYPOINT_ON:
        _settle_num_keypoints(cfg, names)
    return classes


def _settle_num_keypoints(cfg, names):
    """Take the number of keypoints from the datasets that name theirs."""
    for name in names:
        keypoints = MetadataCatalog.get(name).get("keypoint_names")
        if keypoints:
            _settle_number(cfg, _NUM_KEYPOINTS, name, keypoints, "keypoints")
    number = get_value(cfg, _NUM_KEYPOINTS)
    if not number:
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but the dataset {names[0]} names no keypoints: set {_NUM_KEYPOINTS}"
            " and MetadataCatalog's keypoint_names, or turn KEYPOINT_ON off"
        )
    if cfg.DATASETS.TEST:
        get_oks_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, number)


def _settle_number(cfg, key, dataset, names, noun):
    number = get_value(cfg, key)
    if number not in (0, len(names)):
        raise UserError(
            f"{key} is {number}, but the dataset {dataset} has {len(names)} {noun}: {', '.join(names)}; "
            "set it to 0 to take the dataset's number"
        )
    set_value(cfg, key, len(names))
    logger.info(f"{key} is {len(names)}: {', '.join(names)}")


def check_before_training(cfg, resume, eval_only, needs_model=True):
    """Reject what would make a run fail later: values, batch, test sets, weights, augmentation, model.

    Returns:
        The model on the device "meta"; without `needs_model`, to score a file of predictions, None.
    """
    check_cfg(cfg)
    get_pixel_range(cfg)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
        check_batch_size(cfg)
        _check_schedule(cfg)
    for name in cfg.DATASETS.TEST:
        _check_test_dataset(name, needs_images=needs_model)
    return _check_model(cfg, resume, eval_only) if needs_model else None


def _check_model(cfg, resume, eval_only):
    # The files of rank 0 are those of all machines.
    if cfg.MODEL.WEIGHTS and not resume and comm.is_main_process():
        locate_weights(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("--eval-only needs DATASETS.TEST: name at least one dataset")
    if eval_only and not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last checkpoint")
    if cfg.TEST.AUG.ENABLED:
        for name in cfg.DATASETS.TEST:
            build_tta_mapper(cfg, name)
    amp, is_used = cfg.SOLVER.AMP, cfg.TEST.AMP or (cfg.SOLVER.AMP.ENABLED and not eval_only)
    build_autocast(is_used, amp.PRECISION, get_device(cfg.MODEL.DEVICE).type)
    # Without memory, to check MODEL before an earlier run is moved.
    meta_cfg = cfg.clone()
    set_value(meta_cfg, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(meta_cfg)
    if not eval_only:
        _check_norms(cfg, model, resume)
        steps = build_augmentation(cfg, is_train=True)
        DatasetMapper(cfg, augmentations=steps, num_keypoints=0, records=[None])
    return model


def _check_schedule(cfg):
    """Reject settings of the solver, and of the tests in between, that do not go together."""
    solver, test = cfg.SOLVER, cfg.TEST
    validates = test.VAL_LOSS_PERIOD > 0 or any(mode == "val" for mode, _ in cfg.WORKFLOW)
    for key, is_on in (
        ("TEST.VAL_LOSS_PERIOD or a val flow in WORKFLOW", validates),
        ("TEST.BEST_METRIC", test.BEST_METRIC),
    ):
        if is_on and not cfg.DATASETS.TEST:
            raise UserError(f"{key} is set, but DATASETS.TEST is empty: name at least one dataset")
    if validates and cfg.MODEL.MASK_ON:
        get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False, need_masks=True)
    if test.EVAL_START and not test.EVAL_PERIOD:
        raise UserError(f"TEST.EVAL_START is {test.EVAL_START}, but TEST.EVAL_PERIOD is 0: set it too")
    of_losses = test.BEST_METRIC.startswith("val/")
    if of_losses and not validates:
        raise UserError(
            f"TEST.BEST_METRIC is {test.BEST_METRIC}, but no validation losses are computed: set "
            "TEST.VAL_LOSS_PERIOD, or a val flow in WORKFLOW"
        )
    if solver.PATIENCE and not (test.BEST_METRIC and (test.EVAL_PERIOD or of_losses)):
        raise UserError(
            f"SOLVER.PATIENCE is {solver.PATIENCE}: it needs TEST.BEST_METRIC, and TEST.EVAL_PERIOD"
        )


def _check_test_dataset(name, needs_images):
    """Reject a test set whose images are missing or that no evaluator can score."""
    records, _, _ = load_ground_truth(name)
    if needs_images:
        check_image_files(records, name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") is None:
        logger.warning(f"the dataset {name} has no evaluator_type; it is scored with COCO metrics")
        metadata.set(evaluator_type="coco")
    elif metadata.evaluator_type not in EVALUATORS:
        raise UserError(
            f"the dataset {name} has the evaluator_type {metadata.evaluator_type!r}; known: "
            + ", ".join(EVALUATORS)
        )


def _check_norms(cfg, model, resume):
    norms = {type(module) for module in model.modules()}
    device = get_device(cfg.MODEL.DEVICE)
    if nn.SyncBatchNorm in norms and device.type != "cuda":
        raise UserError(f"SyncBN needs GPUs, but MODEL.DEVICE is {device}; use BN or GN")
    is_frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or any(issubclass(n, FrozenBatchNorm2d) for n in norms)
    if is_frozen and not cfg.MODEL.WEIGHTS and not resume:
        logger.warning(
            "MODEL.WEIGHTS is empty, but parts of the backbone are frozen (MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}, or FrozenBN): from random weights this does not learn; use "
            "FREEZE_AT 0 with BN or GN"
        )
