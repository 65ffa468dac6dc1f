"""Evaluation of a model on all datasets of DATASETS.TEST."""

import os
from typing import Any

from torch import nn

from plaintrain.checkpoint.training_checkpointer import TrainingCheckpointer
from plaintrain.config import CfgNode
from plaintrain.data.build import build_detection_test_loader, build_detection_val_loader
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.evaluation import (
    build_evaluator,
    compute_validation_losses,
    flatten_results,
    inference_on_dataset,
    report_results,
)
from plaintrain.modeling.tta import build_tta
from plaintrain.solver.amp import build_test_autocast
from plaintrain.solver.schedule import Due
from plaintrain.utils import comm
from plaintrain.utils.storage import get_event_storage


def do_test(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Evaluate on each dataset of DATASETS.TEST; return {dataset: {task: {metric: value}}} on all ranks."""
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        data_loader = build_detection_test_loader(cfg, dataset_name)
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator = build_evaluator(cfg, dataset_name, output_folder)
        with build_test_autocast(cfg, model):
            dataset_results = inference_on_dataset(build_tta(cfg, model), data_loader, evaluator)
        results[dataset_name] = comm.broadcast(dataset_results)
        report_results(dataset_name, results[dataset_name], output_folder)
    return results


def do_validate(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Compute the losses on DATASETS.TEST; return {"val/NAME": mean over images} on all ranks."""
    data_loaders = [build_detection_val_loader(cfg, name) for name in cfg.DATASETS.TEST]
    with build_test_autocast(cfg, model):
        return compute_validation_losses(model, data_loaders, cfg.SEED)


def evaluate(
    cfg: CfgNode,
    eval_model: nn.Module,
    iteration: int,
    actions: Due,
    early_stopping: EarlyStopping,
    checkpointer: TrainingCheckpointer,
) -> dict[str, Any]:
    """Compute the validation losses and test results that are due, log them and save the best weights.

    Returns the test results. All ranks must call it. The mode of the model does not change.
    """
    metrics: dict[str, float] = {}
    results: dict[str, Any] = {}
    if actions.validate:
        metrics |= do_validate(cfg, eval_model)
    if actions.test:
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    # False, without effect, unless the metrics contain TEST.BEST_METRIC.
    is_best = early_stopping.update(iteration, metrics)
    if is_best:
        checkpointer.save_weights("model_best", eval_model, iteration=iteration)
    if early_stopping.triggered and not actions.test:
        # A validation loss has triggered early stopping, but the run still needs test results.
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    get_event_storage().put_scalars(smoothing_hint=False, **metrics)  # type: ignore[arg-type]
    return results
