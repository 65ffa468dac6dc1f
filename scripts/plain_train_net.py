#!/usr/bin/env python
"""Train and evaluate a detector in one plain loop.

python scripts/plain_train_net.py --config-file configs/quickstart.yaml
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --resume
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --eval-only \\
    MODEL.WEIGHTS output/quickstart/model_final.pth

The file is made to be copied: change the data, the evaluator or the loss where they are called.
examples/minimal_train.py is the same loop without options.
"""

import logging
import os
from time import perf_counter

from plaintrain.utils.arguments import default_argument_parser

if __name__ == "__main__":
    # Parsed here, so that --help does not wait for the imports of torch below.
    args = default_argument_parser(epilog=__doc__).parse_args()

from plaintrain.checkpoint import build_checkpointer, load_for_evaluation
from plaintrain.config import get_cfg
from plaintrain.data import build_detection_test_loader, build_detection_train_loader
from plaintrain.engine import build_writers, create_ddp_model, default_setup, launch, require_default
from plaintrain.engine.dry_run import finish_dry_run
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.engine.nonfinite import build_nonfinite_guard
from plaintrain.engine.run_facts import write_report
from plaintrain.engine.testing import do_validate
from plaintrain.evaluation import (
    build_evaluator,
    flatten_results,
    inference_on_dataset,
    report_results,
    verify_results,
)
from plaintrain.modeling import build_model, build_tta
from plaintrain.solver import Due, build_gradient_clipper, build_lr_scheduler, build_optimizer, every
from plaintrain.solver.accumulation import add_losses, split_batch, sum_losses, sync_gradients
from plaintrain.solver.amp import build_amp, build_test_autocast
from plaintrain.solver.ema import build_ema
from plaintrain.utils import comm
from plaintrain.utils.events import EventStorage, closing_all, get_event_storage, write_all
from plaintrain.utils.memory import get_peak_memory
from plaintrain.utils.stop import StopSignal

logger = logging.getLogger("plaintrain")


def due(cfg, iteration, stopping=False):
    """Return what is due after an iteration (from 0); `stopping`: the run is asked to end."""
    is_last_iter = iteration == cfg.SOLVER.MAX_ITER - 1
    if stopping and not is_last_iter:
        # What else is due is done by the resumed run, see `start_iter > 0` in do_train.
        return Due(save=True, stop=True)
    validate = every(cfg.TEST.VAL_LOSS_PERIOD, iteration)
    test = is_last_iter or every(cfg.TEST.EVAL_PERIOD, iteration, start=cfg.TEST.EVAL_START)
    # A checkpoint precedes each evaluation, so that one that fails or is interrupted loses nothing.
    save = validate or test or every(cfg.SOLVER.CHECKPOINT_PERIOD, iteration)
    log = validate or test or every(cfg.LOG_PERIOD, iteration)
    return Due(save=save, validate=validate, test=test, log=log)


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


def train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite):
    """Forward, backward and optimizer step on one batch.

    Returns the detached losses and the gradient norm; {} if the step is skipped.
    """
    optimizer.zero_grad()
    losses = {}
    # One micro-batch, unless SOLVER.ACCUMULATE_STEPS is larger; `weight` is its fraction of the batch.
    for micro_batch, weight, is_last in micro_batches:
        # DistributedDataParallel averages gradients over ranks with the last micro-batch only.
        with sync_gradients(model, is_last):
            with amp.autocast:
                loss_dict = model(micro_batch)
            if is_last:
                comm.check_loss_names(loss_dict)  # all ranks: if one lacks a loss, others hang in backward()
            total_loss = sum_losses(loss_dict)
            amp.scaler.scale(total_loss * weight).backward()
        losses = add_losses(losses, {"total_loss": total_loss, **loss_dict}, weight)
    amp.scaler.unscale_(optimizer)
    grad_norm = clip_gradients()
    # True, except with SOLVER.ON_NONFINITE "skip" if any rank has NaN: then all ranks skip (device sync).
    # With "stop" a bad step is taken, and raise_if_found() in do_train ends the run before it is saved.
    take_step = nonfinite.allows_step(losses, grad_norm)
    if take_step:
        amp.scaler.step(optimizer)
    amp.scaler.update()  # also without a step: unscale_() has looked for infinite gradients
    return {**losses, "grad_norm": grad_norm} if take_step else {}


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_ITER iterations; returns the results of the last test.

    Lines marked "all ranks" communicate, so every rank must reach them; "device sync" waits for the GPU.
    """
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    clip_gradients = build_gradient_clipper(cfg, model)
    amp = build_amp(cfg, model)
    ema = build_ema(cfg, model)
    data_loader = build_detection_train_loader(cfg)
    nonfinite = build_nonfinite_guard(cfg, model, data_loader, amp.scaler)
    early_stopping = EarlyStopping(cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE)
    storage = EventStorage()
    writers = build_writers(cfg)

    # Saved and restored by name, with the model and the random state of each rank.
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": amp.scaler, "ema": ema}
    states |= {"data_loader": data_loader, "nonfinite": nonfinite, "early_stopping": early_stopping}
    checkpointer = build_checkpointer(cfg, model, storage=storage, **states)
    # Only a resumed checkpoint has an iteration; other weights start at 0.
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    logger.info(f"starting training from iteration {start_iter} of {cfg.SOLVER.MAX_ITER}")

    with StopSignal(cfg.SOLVER.MAX_TIME) as stop, storage, closing_all(writers), checkpointer:
        results = {}
        if start_iter > 0:
            # The checkpoint is from before the evaluation and log of its iteration: do these, maybe again.
            actions = due(cfg, start_iter - 1)
            if actions.validate or actions.test:
                results = evaluate(cfg, ema.eval_model, start_iter - 1, actions, early_stopping, checkpointer)
            if actions.log:
                write_all(writers)
        # A run that early stopping has ended trains no further: the range is empty.
        end_iter = start_iter if early_stopping.triggered else cfg.SOLVER.MAX_ITER

        start = perf_counter()
        for iteration, samples in data_loader.iterations(start_iter, end_iter):
            data_time = perf_counter() - start
            storage.iter = iteration
            actions = due(cfg, iteration, stopping=stop.requested_on_any_rank())  # all ranks

            micro_batches = split_batch(samples, cfg.SOLVER.ACCUMULATE_STEPS)
            losses = train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite)  # all ranks
            # Also after a skipped step: averages and schedule count iterations.
            ema.update(model)
            storage.put_scalars(**scheduler.scalars(), smoothing_hint=False)
            scheduler.step()

            # All ranks. Losses stay on the device until someone reads them from the storage.
            storage.put_scalars(**comm.reduce_dict(losses), time=perf_counter() - start, data_time=data_time)
            if actions.save or actions.log:
                # Raise on all ranks if a loss or norm since the last save or log is NaN on any rank.
                nonfinite.raise_if_found(storage)  # device sync
                storage.put_scalars(**amp.scalars(), **get_peak_memory(), smoothing_hint=False)

            if actions.save:
                checkpointer.save_iteration(iteration)  # all ranks
            if actions.validate or actions.test:
                results |= evaluate(cfg, ema.eval_model, iteration, actions, early_stopping, checkpointer)
            if actions.log:
                write_all(writers)
            if actions.stop or early_stopping.triggered:
                break
            start = perf_counter()

        # A run that was told to stop is unfinished.
        if not actions.stop:
            checkpointer.save_final()  # all ranks
    return results


def setup(args):
    """Return the config of the command line, after the checks that can be made before training."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if not args.eval_only:
        require_default(cfg, "WORKFLOW", "epoch_train_net.py reads it; here there is TEST.VAL_LOSS_PERIOD")
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """Train or evaluate; runs on each rank."""
    cfg = setup(args)
    model = build_model(cfg)
    logger.info(f"model:\n{model}")
    if args.eval_only:
        load_for_evaluation(cfg, model, resume=args.resume)
        results = do_test(cfg, model)
    else:
        results = do_train(cfg, create_ddp_model(model), resume=args.resume)
        finish_dry_run(args, cfg, results, do_train)
        write_report(cfg)
    if comm.is_main_process() and results:
        verify_results(cfg.TEST.EXPECTED_RESULTS, next(iter(results.values())))
    return results


if __name__ == "__main__":
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
