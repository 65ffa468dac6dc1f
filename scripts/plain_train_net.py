#!/usr/bin/env python
"""Train and evaluate a detector in one plain loop.

python scripts/plain_train_net.py --config-file configs/quickstart.yaml
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --resume
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --eval-only \\
    MODEL.WEIGHTS output/quickstart/model_final.pth

Copy this script and change the dataset, the evaluator or the loss. examples/minimal_train.py is the same loop
without options.
"""

import logging
import os
from time import perf_counter

from plaintrain.utils.arguments import default_argument_parser

if __name__ == "__main__":
    # --help should not wait for the imports below.
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
    """Return the actions that are due after an iteration (from 0), or that end a run that is `stopping`."""
    is_last_iter = iteration == cfg.SOLVER.MAX_ITER - 1
    if stopping and not is_last_iter:
        # A resumed run does the rest, see `start_iter > 0` in do_train.
        return Due(save=True, stop=True)
    validate = every(cfg.TEST.VAL_LOSS_PERIOD, iteration)
    test = is_last_iter or every(cfg.TEST.EVAL_PERIOD, iteration, start=cfg.TEST.EVAL_START)
    # A checkpoint precedes each evaluation, which may fail or be interrupted.
    save = validate or test or every(cfg.SOLVER.CHECKPOINT_PERIOD, iteration)
    log = validate or test or every(cfg.LOG_PERIOD, iteration)
    return Due(save=save, validate=validate, test=test, log=log)


def do_test(cfg, model):
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


def evaluate(cfg, eval_model, iteration, actions, early_stopping, checkpointer):
    """Compute the validation losses and test results that are due, log them and save the best weights.

    Returns the test results. All ranks must call it. The mode of the model does not change.
    """
    metrics = {}
    results = {}
    if actions.validate:
        metrics |= do_validate(cfg, eval_model)
    if actions.test:
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    # This is False unless the metrics contain TEST.BEST_METRIC.
    is_best = early_stopping.update(iteration, metrics)
    if is_best:
        checkpointer.save_weights("model_best", eval_model, iteration=iteration)
    if early_stopping.triggered and not actions.test:
        # A validation loss has triggered early stopping, and the run needs final test results.
        results = do_test(cfg, eval_model)
        metrics |= flatten_results(results)
    get_event_storage().put_scalars(**metrics, smoothing_hint=False)
    return results


def train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite):
    """Run forward, backward and optimizer step on one batch.

    Returns the detached losses and the gradient norm; {} if the step is skipped.
    """
    optimizer.zero_grad()
    losses = {}
    # There is one micro-batch unless SOLVER.ACCUMULATE_STEPS > 1; `weight` is its fraction of the batch.
    for micro_batch, weight, is_last in micro_batches:
        # DistributedDataParallel averages gradients over ranks in the last backward() only.
        with sync_gradients(model, is_last):
            with amp.autocast:
                loss_dict = model(micro_batch)
            if is_last:
                comm.check_loss_names(loss_dict)  # all ranks: a missing loss would deadlock backward()
            total_loss = sum_losses(loss_dict)
            amp.scaler.scale(total_loss * weight).backward()
        losses = add_losses(losses, {"total_loss": total_loss, **loss_dict}, weight)
    amp.scaler.unscale_(optimizer)
    grad_norm = clip_gradients()
    # SOLVER.ON_NONFINITE "skip": all ranks skip the step if any rank has NaN (device sync).
    # "stop": the step is always taken; check_storage() in do_train raises before it is saved.
    take_step = nonfinite.allows_step(losses, grad_norm)
    if take_step:
        amp.scaler.step(optimizer)
    amp.scaler.update()  # also after a skipped step, because unscale_() has checked the gradients
    return {**losses, "grad_norm": grad_norm} if take_step else {}


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_ITER iterations; return the results of the last test.

    Lines marked "all ranks" communicate, so all ranks must reach them; "device sync" waits for the GPU.
    """
    # Build everything that the loop needs.
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

    # A checkpoint contains the model, these states by name, and the random state of each rank.
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": amp.scaler, "ema": ema}
    states |= {"data_loader": data_loader, "nonfinite": nonfinite, "early_stopping": early_stopping}
    checkpointer = build_checkpointer(cfg, model, storage=storage, **states)
    # Fine-tuning starts at iteration 0; only --resume restores the iteration.
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    logger.info(f"starting training from iteration {start_iter} of {cfg.SOLVER.MAX_ITER}")

    with StopSignal(cfg.SOLVER.MAX_TIME) as stop, storage, closing_all(writers), checkpointer:
        results = {}
        if start_iter > 0:
            # A checkpoint is saved before the evaluation and log of its iteration, so these may be missing.
            actions = due(cfg, start_iter - 1)
            if actions.validate or actions.test:
                results = evaluate(cfg, ema.eval_model, start_iter - 1, actions, early_stopping, checkpointer)
            if actions.log:
                write_all(writers)
        # A run that early stopping has ended does not train when it is resumed.
        end_iter = start_iter if early_stopping.triggered else cfg.SOLVER.MAX_ITER

        start = perf_counter()
        for iteration, samples in data_loader.iterations(start_iter, end_iter):
            data_time = perf_counter() - start
            storage.iter = iteration
            actions = due(cfg, iteration, stopping=stop.requested_on_any_rank())  # all ranks

            # Train on one batch.
            micro_batches = split_batch(samples, cfg.SOLVER.ACCUMULATE_STEPS)
            losses = train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite)  # all ranks
            # The average and the schedule also count skipped steps.
            ema.update(model)
            storage.put_scalars(**scheduler.scalars(), smoothing_hint=False)
            scheduler.step()

            # Losses stay on the device until the storage is read; reduce_dict() averages them over all ranks.
            storage.put_scalars(**comm.reduce_dict(losses), time=perf_counter() - start, data_time=data_time)
            if actions.save or actions.log:
                # Raise on all ranks if a loss or norm since the last save or log is NaN on any rank.
                nonfinite.check_storage(storage)  # device sync
                storage.put_scalars(**amp.scalars(), **get_peak_memory(), smoothing_hint=False)

            # Save before the evaluation, which may fail; log after it, with its metrics.
            if actions.save:
                checkpointer.save_iteration(iteration)  # all ranks
            if actions.validate or actions.test:
                results |= evaluate(cfg, ema.eval_model, iteration, actions, early_stopping, checkpointer)
            if actions.log:
                write_all(writers)
            if actions.stop or early_stopping.triggered:
                break
            start = perf_counter()

        # An interrupted run has no final checkpoint.
        if not actions.stop:
            checkpointer.save_final()  # all ranks
    return results


def setup(args):
    """Load the config of the command line and set up the run."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if not args.eval_only:
        require_default(cfg, "WORKFLOW", "set TEST.VAL_LOSS_PERIOD, or run epoch_train_net.py")
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """Train or evaluate on one rank."""
    cfg = setup(args)
    model = build_model(cfg)
    logger.debug(f"model:\n{model}")
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
