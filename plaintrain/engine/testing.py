"""Evaluation of a model on all datasets of DATASETS.TEST."""

import os

from plaintrain.data.build import build_detection_test_loader, build_detection_val_loader
from plaintrain.evaluation import (
    build_evaluator,
    compute_validation_losses,
    flatten_results,
    inference_on_dataset,
    report_results,
)
from plaintrain.modeling.tta import build_tta
from plaintrain.solver.amp import build_test_autocast
from plaintrain.utils import comm
from plaintrain.utils.storage import get_event_storage


def do_test(cfg, model):
    """Evaluate on each dataset of DATASETS.TEST; returns {dataset: {task: {metric: number}}} on all ranks."""
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


def do_validate(cfg, model):
    """Compute the losses on DATASETS.TEST; returns {"val/NAME": mean over images} on all ranks."""
    data_loaders = [build_detection_val_loader(cfg, name) for name in cfg.DATASETS.TEST]
    with build_test_autocast(cfg, model):
        return compute_validation_losses(model, data_loaders, cfg.SEED)


def evaluate(cfg, eval_model, iteration, actions, early_stopping, checkpointer):
    """Validate and test as `actions` says, log the metrics, save the best weights; returns test results.

    All ranks call it. Modules return to the mode they had, training or evaluation.
    """
    metrics = {}
    results = {}
    if actions.validate:
        metrics |= do_validate(cfg, eval_model)
    if actions.test:
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    # False, and without effect, unless the metrics contain TEST.BEST_METRIC.
    is_best = early_stopping.update(iteration, metrics)
    if is_best:
        checkpointer.save_weights("model_best", eval_model, iteration=iteration)
    if early_stopping.triggered and not actions.test:
        # The run ends here because of a validation loss: it gets test results all the same.
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    get_event_storage().put_scalars(**metrics, smoothing_hint=False)
    return results
