"""Checks before a run, and config values inferred from the datasets."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.checkpoint.pretrained import locate_weights
from plaintrain.config import CfgNode, check_cfg, get_value, set_value
from plaintrain.data.build import check_batch_size
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, compute_hashes, get_common_class_names
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.datasets.builtin import EVALUATORS
from plaintrain.data.records import check_image_files, check_objects, get_detection_dataset_dicts
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.tta import build_tta_mapper
from plaintrain.evaluation.coco_backend import get_oks_sigmas
from plaintrain.evaluation.detections import load_ground_truth
from plaintrain.modeling.build import build_model, get_device, get_num_classes_key
from plaintrain.solver.amp import build_autocast
from plaintrain.structures import find_segmentation_problem
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Per class and image; COCO ignores the others.
_COCO_MAX_DETECTIONS = 100
_NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


def resolve_num_classes(cfg: CfgNode, eval_only: bool) -> list[str]:
    """Set the number of classes, and of keypoints, from the datasets; return the class names."""
    key = get_num_classes_key(cfg)
    # Evaluation does not need the training set.
    train = () if eval_only and cfg.DATASETS.TEST else cfg.DATASETS.TRAIN
    names = [*train, *cfg.DATASETS.TEST]
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty; set --config-file, or name a dataset")
    classes = get_common_class_names(names)
    _resolve_count(cfg, key, names[0], classes)
    if cfg.MODEL.KEYPOINT_ON:
        _resolve_num_keypoints(cfg, names)
    return classes


def check_same_data(cfg: CfgNode, eval_only: bool) -> None:
    """Raise on all ranks if the records of a dataset differ between ranks."""
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    ranks = comm.all_gather(compute_hashes(names))  # all ranks
    for name, *hashes in zip(names, *ranks, strict=True):
        if any(other != hashes[0] for other in hashes):
            counts = ", ".join(f"{other[0]} on rank {rank}" for rank, other in enumerate(hashes))
            key = "images" if len({other[1] for other in hashes}) > 1 else "annotations"
            raise UserError(
                f"the {key} of the dataset {name} must be the same on all ranks, got different ones "
                f"(number of images: {counts}); let all processes read the same files"
            )


def _resolve_num_keypoints(cfg: CfgNode, datasets: Sequence[str]) -> None:
    for dataset in datasets:
        if keypoints := MetadataCatalog.get(dataset).get("keypoint_names"):
            _resolve_count(cfg, _NUM_KEYPOINTS, dataset, keypoints)
    num_keypoints = get_value(cfg, _NUM_KEYPOINTS)
    if not num_keypoints:
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but the dataset {datasets[0]} names no keypoints; set "
            f"{_NUM_KEYPOINTS} and MetadataCatalog's keypoint_names, or MODEL.KEYPOINT_ON False"
        )
    if cfg.DATASETS.TEST:
        get_oks_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, num_keypoints)


def _resolve_count(cfg: CfgNode, key: str, dataset: str, names: Sequence[str]) -> None:
    """Set a count of the dataset's classes or keypoints, or check it."""
    count = get_value(cfg, key)
    if count not in (0, len(names)):
        raise UserError(
            f"{key} must be {len(names)} for the dataset {dataset} ({', '.join(names)}), got {count}; "
            "set it to 0 to take the dataset's number"
        )
    set_value(cfg, key, len(names))
    logger.debug(f"{key} is {len(names)}: {', '.join(names)}")


def check_before_training(
    cfg: CfgNode, resume: bool, eval_only: bool, needs_model: bool = True
) -> nn.Module | None:
    """Check config values, batch size, test sets, weights, augmentation and model before a run.

    Returns the model on the device "meta"; None without `needs_model`, for scoring a file of predictions.
    """
    check_cfg(cfg)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty; name at least one dataset")
        check_batch_size(cfg)
        _check_schedule(cfg)
    for name in cfg.DATASETS.TEST:
        _check_test_dataset(name, needs_images=needs_model, has_masks=cfg.MODEL.MASK_ON)
        if eval_only or name not in cfg.DATASETS.TRAIN:
            check_objects(DatasetCatalog.get(name), name)
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        if limit > _COCO_MAX_DETECTIONS and MetadataCatalog.get(name).evaluator_type == "coco":
            logger.warning(
                f"COCO metrics of {name} count only {_COCO_MAX_DETECTIONS} detections per image and class, "
                f"but TEST.DETECTIONS_PER_IMAGE is {limit}"
            )
    return _check_model(cfg, resume, eval_only) if needs_model else None


def _check_model(cfg: CfgNode, resume: bool, eval_only: bool) -> nn.Module:
    # Only rank 0 reads the weights.
    if cfg.MODEL.WEIGHTS and not resume and comm.is_main_process():
        locate_weights(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("--eval-only needs DATASETS.TEST; name at least one dataset")
    if eval_only and not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs MODEL.WEIGHTS, or --resume for the last checkpoint")
    if cfg.TEST.AUG.ENABLED:
        for name in cfg.DATASETS.TEST:
            build_tta_mapper(cfg, name)
    use_amp = cfg.TEST.AMP or (cfg.SOLVER.AMP.ENABLED and not eval_only)
    build_autocast(use_amp, cfg.SOLVER.AMP.PRECISION, get_device(cfg.MODEL.DEVICE).type)
    # The device "meta" allocates no memory.
    meta_cfg = cfg.clone()
    set_value(meta_cfg, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(meta_cfg)
    if not eval_only:
        _check_norms(cfg, model, resume)
        steps = build_augmentation(cfg, is_train=True)
        DatasetMapper(cfg, augmentations=steps, num_keypoints=0, records=[{}])
    return model


def _check_schedule(cfg: CfgNode) -> None:
    """Reject contradicting settings of validation, evaluation and early stopping."""
    test = cfg.TEST
    validates = test.VAL_LOSS_PERIOD > 0 or any(mode == "val" for mode, _ in cfg.WORKFLOW)
    if not cfg.DATASETS.TEST and (validates or test.BEST_METRIC):
        key = "TEST.VAL_LOSS_PERIOD or a val flow in WORKFLOW" if validates else "TEST.BEST_METRIC"
        raise UserError(f"{key} is set, but DATASETS.TEST is empty; name at least one dataset")
    if validates and cfg.MODEL.MASK_ON:
        get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False, need_masks=True)
    if test.EVAL_START and not test.EVAL_PERIOD:
        raise UserError(f"TEST.EVAL_PERIOD must be above 0 with TEST.EVAL_START {test.EVAL_START}, got 0")
    is_loss = test.BEST_METRIC.startswith("val/")
    if is_loss and not validates:
        raise UserError(
            f"TEST.BEST_METRIC is {test.BEST_METRIC}, but no validation losses are computed; set "
            "TEST.VAL_LOSS_PERIOD, or a val flow in WORKFLOW"
        )
    patience = cfg.SOLVER.PATIENCE
    if patience and not (test.BEST_METRIC and (test.EVAL_PERIOD or is_loss)):
        raise UserError(f"SOLVER.PATIENCE {patience} needs TEST.BEST_METRIC and TEST.EVAL_PERIOD")


def _check_test_dataset(name: str, needs_images: bool, has_masks: bool) -> None:
    """Reject a test set with missing images, malformed segmentations or an unknown evaluator."""
    records, _, _ = load_ground_truth(name)
    if has_masks:
        for record in records:
            for segmentation in filter(None, (a.get("segmentation") for a in record["annotations"])):
                if problem := find_segmentation_problem(segmentation, record["height"], record["width"]):
                    raise UserError(f"an annotation of {record['file_name']} {problem[1]}")
    if needs_images:
        check_image_files(records, name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") is None:
        logger.warning(f"the dataset {name} has no evaluator_type; it is scored with COCO metrics")
        metadata.set(evaluator_type="coco")
    elif metadata.evaluator_type not in EVALUATORS:
        types = ", ".join(EVALUATORS)
        raise UserError(f"evaluator_type of {name} must be one of {types}, got {metadata.evaluator_type!r}")


def _check_norms(cfg: CfgNode, model: nn.Module, resume: bool) -> None:
    norms = {type(module) for module in model.modules()}
    device = get_device(cfg.MODEL.DEVICE)
    if nn.SyncBatchNorm in norms and device.type != "cuda":
        raise UserError(f"SyncBN needs GPUs, but MODEL.DEVICE is {device}; use BN or GN")
    is_frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or any(issubclass(n, FrozenBatchNorm2d) for n in norms)
    if is_frozen and not cfg.MODEL.WEIGHTS and not resume:
        logger.warning(
            "MODEL.WEIGHTS is empty, but a frozen backbone (MODEL.BACKBONE.FREEZE_AT above 0, or FrozenBN) "
            "does not learn from random weights; use FREEZE_AT 0 with BN or GN"
        )
