"""What can be settled and checked before a run starts: numbers the dataset knows, and mistakes."""

import logging
import math

import torch

from plaintrain.checkpoint.pretrained import locate_weights
from plaintrain.config import get_value, set_value
from plaintrain.config.yaml import flatten
from plaintrain.data.build import check_batch_size
from plaintrain.data.catalog import MetadataCatalog, common_class_names
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.datasets.builtin import EVALUATORS
from plaintrain.data.images import get_pixel_range
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.tta import build_tta_mapper
from plaintrain.evaluation.coco_backend import oks_sigmas
from plaintrain.evaluation.detections import ground_truth
from plaintrain.modeling.build import build_model, get_device, num_classes_key
from plaintrain.solver.amp import build_autocast
from plaintrain.solver.lr_scheduler import lr_factor, momentum_at
from plaintrain.solver.schedule import check_workflow
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import WRITERS

logger = logging.getLogger(__name__)

_NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"

# The maximum norm.
_MAY_BE_INFINITE = "SOLVER.CLIP_GRADIENTS.NORM_TYPE"
_LEAST = {
    "DATALOADER.CACHE_BYTES": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "HANG_TIMEOUT": 0,
    "LOG_PERIOD": 1,
    "SOLVER.ACCUMULATE_STEPS": 1,
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": 0,
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_EPOCHS": 0,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.MAX_SKIPPED_STEPS": 1,
    "SOLVER.MAX_TIME": 0,
    "SOLVER.PATIENCE": 0,
    "SOLVER.REFERENCE_IMS_PER_BATCH": 0,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.EVAL_START": 0,
    "TEST.IMS_PER_BATCH": 1,
    "TEST.VAL_LOSS_PERIOD": 0,
}


def settle_num_classes(cfg, eval_only):
    """Take the number of classes from the datasets; return their names.

    Raises:
        UserError: the number in the config, or one of the datasets, contradicts them.
    """
    key = num_classes_key(cfg)
    # Who only evaluates need not have the training images.
    train = () if eval_only and cfg.DATASETS.TEST else cfg.DATASETS.TRAIN
    names = [*train, *cfg.DATASETS.TEST]
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: give --config-file, or name a dataset")
    classes = common_class_names(names)
    given = get_value(cfg, key)
    if given not in (0, len(classes)):
        raise UserError(
            f"{key} is {given}, but the dataset {names[0]} has {len(classes)} classes: "
            f"{', '.join(classes)}; set it to 0 to take the dataset's number"
        )
    set_value(cfg, key, len(classes))
    logger.info(f"{key} is {len(classes)}: {', '.join(classes)}")
    if cfg.MODEL.KEYPOINT_ON:
        _settle_num_keypoints(cfg, names)
    return classes


def _settle_num_keypoints(cfg, names):
    """Take the number of keypoints from the datasets that name theirs."""
    named = {name: MetadataCatalog.get(name).get("keypoint_names") for name in names}
    given = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name, keypoints in named.items():
        if keypoints and given not in (0, len(keypoints)):
            raise UserError(
                f"{_NUM_KEYPOINTS} is {given}, but the dataset {name} has {len(keypoints)} keypoints: "
                f"{', '.join(keypoints)}; set it to 0 to take the dataset's number"
            )
        given = len(keypoints) if keypoints else given
    if not given:
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but the dataset {names[0]} names no keypoints: set {_NUM_KEYPOINTS}"
            " and MetadataCatalog's keypoint_names, or turn KEYPOINT_ON off"
        )
    set_value(cfg, _NUM_KEYPOINTS, given)
    logger.info(f"{_NUM_KEYPOINTS} is {given}")
    if cfg.DATASETS.TEST:
        oks_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, given)


def _check_values(cfg):
    get_pixel_range(cfg)
    for key, least in _LEAST.items():
        if get_value(cfg, key) < least:
            raise UserError(f"{key} is {get_value(cfg, key)}, but must be at least {least}")
    for key, value in flatten(cfg).items():
        if isinstance(value, float) and not math.isfinite(value) and key != _MAY_BE_INFINITE:
            raise UserError(f"{key} is {value}, but must be a finite number")
    if not 0 <= cfg.MODEL.EMA.DECAY < 1:
        raise UserError(f"MODEL.EMA.DECAY is {cfg.MODEL.EMA.DECAY}, but must be at least 0 and below 1")
    for name in cfg.OUTPUT.WRITERS:
        if name not in WRITERS:
            raise UserError(f"OUTPUT.WRITERS holds {name!r}; known: {', '.join(WRITERS)}")
    for row in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(row, list) or len(row) != 4:
            raise UserError(f"TEST.EXPECTED_RESULTS holds {row!r}, not [task, metric, value, tolerance]")


def check_before_training(cfg, resume, eval_only, needs_model=True):
    """Refuse what would make a run fail later: values, batch, test sets, weights, augmentation, model.

    Without `needs_model`, for predictions that are there already: values and annotations only.
    """
    _check_values(cfg)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
        check_batch_size(cfg)
        _check_schedule(cfg)
    for name in cfg.DATASETS.TEST:
        _check_test_dataset(name, needs_images=needs_model)
    if not needs_model:
        return
    if cfg.MODEL.WEIGHTS and not resume:
        locate_weights(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("--eval-only needs DATASETS.TEST: name at least one dataset")
    if eval_only and not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last checkpoint")
    if not eval_only:
        _check_norms(cfg, resume)
        steps = build_augmentation(cfg, is_train=True)
        DatasetMapper(cfg, augmentations=steps, num_keypoints=0, records=[None])
    _check_test_augmentation(cfg)
    amp, is_used = cfg.SOLVER.AMP, cfg.TEST.AMP or (cfg.SOLVER.AMP.ENABLED and not eval_only)
    build_autocast(is_used, amp.PRECISION, get_device(cfg.MODEL.DEVICE).type)


def _check_test_augmentation(cfg):
    if cfg.TEST.AUG.ENABLED:
        for name in cfg.DATASETS.TEST:
            build_tta_mapper(cfg, name)


def _check_schedule(cfg):
    """Refuse settings of the solver, and of the tests in between, that do not go together."""
    solver, test = cfg.SOLVER, cfg.TEST
    lr_factor(cfg)
    if solver.MOMENTUM_SCHEDULE:
        momentum_at(solver.MOMENTUM_SCHEDULE, solver.MOMENTUM_INTERPOLATION)
    check_workflow(cfg.WORKFLOW)
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


def build_meta_model(cfg):
    """The model without memory: a mistake in MODEL is met before an earlier run is moved."""
    cfg = cfg.clone()
    set_value(cfg, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        return build_model(cfg)


def _check_test_dataset(name, needs_images):
    """Refuse a test set whose images are missing or that no evaluator can score."""
    records, _, _ = ground_truth(name)
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


def _norms(cfg):
    """(norms of the backbone, norms of the FPN and the heads) that the model is built with."""
    model, backbone = cfg.MODEL, cfg.MODEL.BACKBONE.NAME
    tiny, ssd = backbone == "build_tiny_backbone", backbone.startswith("build_ssd")
    heads = [] if tiny or ssd else [model.FPN.NORM]
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        heads += [model.ROI_BOX_HEAD.NORM] * (model.ROI_BOX_HEAD.NUM_CONV > 0)
        heads += [model.ROI_MASK_HEAD.NORM] * model.MASK_ON
    if ssd:
        return [], heads
    return [model.TINY.NORM if tiny else model.RESNETS.NORM], heads


def _check_norms(cfg, resume):
    device = get_device(cfg.MODEL.DEVICE)
    backbone, heads = _norms(cfg)
    if "SyncBN" in backbone + heads and device.type != "cuda":
        raise UserError(f"SyncBN needs GPUs, but MODEL.DEVICE is {device}; use BN or GN")
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or "FrozenBN" in backbone
    if frozen and not cfg.MODEL.WEIGHTS and not resume:
        norm = f", its norm {backbone[0]}" if backbone else ""
        logger.warning(
            "MODEL.WEIGHTS is empty, but parts of the backbone are frozen (MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}{norm}): from random weights this does not learn; use "
            "FREEZE_AT 0 with BN or GN"
        )
