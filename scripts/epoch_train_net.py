#!/usr/bin/env python
"""Train and evaluate a detector epoch by epoch, with validation epochs between as WORKFLOW says.

python scripts/epoch_train_net.py --config-file configs/BCCD/faster_rcnn_tiny_epochs.yaml
python scripts/epoch_train_net.py --config-file configs/quickstart.yaml SOLVER.MAX_EPOCHS 3 \\
    SOLVER.BY_EPOCH True SOLVER.CHECKPOINT_PERIOD 1 WORKFLOW "[['train', 1], ['val', 1]]"

The steps are those of plain_train_net.py, and so are the results. The file is made to be copied.
"""

import itertools
import logging
import os
from collections import namedtuple
from time import perf_counter

from plaintrain.arguments import default_argument_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    args = default_argument_parser(epilog=__doc__).parse_args()

from plaintrain.accumulation import add_scaled, scaled, split_batch, sum_losses
from plaintrain.best import BestMetric
from plaintrain.checkpoint import DetectionCheckpointer, build_periodic_checkpointer
from plaintrain.config import get_cfg
from plaintrain.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    build_detection_val_loader,
)
from plaintrain.ema import build_ema
from plaintrain.engine import (
    build_writers,
    create_ddp_model,
    default_setup,
    launch,
    require_default,
)
from plaintrain.evaluation import (
    build_evaluator,
    flatten_results,
    inference_on_dataset,
    report_results,
    validation_losses,
    verify_results,
)
from plaintrain.modeling import build_model, build_tta
from plaintrain.nonfinite import build_step_guard
from plaintrain.precision import build_amp, build_autocast, check_finite
from plaintrain.report.after_training import make_report_if_wanted
from plaintrain.solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from plaintrain.trial import finish_dry_run
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import EventStorage, closing_all, every, get_event_storage, write_all
from plaintrain.utils.logger import progress_range
from plaintrain.utils.memory import peak_memory
from plaintrain.utils.stop import StopRequest
from plaintrain.workflow import workflow_epochs

logger = logging.getLogger("plaintrain")


# What the steps of an epoch work with: made in do_train, by name there and in train_one_epoch.
Training = namedtuple(
    "Training", "model optimizer scheduler clip autocast scaler ema guard batches saver writers stop"
)


def dataset_classes(dataset_names):
    """The class names by which published weights are taken over, or None."""
    return MetadataCatalog.get(dataset_names[0]).get("thing_classes") if dataset_names else None


def run_facts(cfg):
    """What a checkpoint says about its run."""
    return {"config": cfg.dump(), "class_names": dataset_classes(cfg.DATASETS.TRAIN)}


def do_test(cfg, model):
    """Evaluate on every dataset of DATASETS.TEST; {dataset: {task: {metric: number}}} on every rank."""
    results, device = {}, next(model.parameters()).device.type
    for dataset_name in cfg.DATASETS.TEST:
        data_loader = build_detection_test_loader(cfg, dataset_name)
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator = build_evaluator(cfg, dataset_name, output_folder)
        with build_autocast(cfg.TEST.AMP, cfg.SOLVER.AMP.PRECISION, device):
            found = inference_on_dataset(build_tta(cfg, model), data_loader, evaluator)
        results[dataset_name] = comm.broadcast(found)
        report_results(dataset_name, results[dataset_name], output_folder)
    return results


def test_is_due(cfg, iterations):
    """Whether an evaluation falls due in the iterations of an epoch; it takes place at their end."""
    period, start = cfg.TEST.EVAL_PERIOD, cfg.TEST.EVAL_START
    return cfg.SOLVER.MAX_ITER - 1 in iterations or any(every(period, i, start=start) for i in iterations)


def store_results(metrics, iteration, model, best, saver):
    """Store {name: number} of a model after an iteration, and keep the model if it is the best."""
    storage = get_event_storage()
    # What is known before the first step (-1) stands in the log with that.
    storage.iter = max(iteration, 0)
    storage.put_scalars(**metrics, smoothing_hint=False)
    if best.update(iteration, metrics):
        saver.checkpointer.save_weights("model_best", model, iteration=iteration)
    if best.is_stale():
        saver.finish(iteration)
    comm.synchronize()


def val_one_epoch(cfg, model):
    """The losses on DATASETS.TEST together, {"val/NAME": mean over images}, on every rank."""
    loaders = [build_detection_val_loader(cfg, name) for name in cfg.DATASETS.TEST]
    with build_autocast(cfg.TEST.AMP, cfg.SOLVER.AMP.PRECISION, next(model.parameters()).device.type):
        return validation_losses(model, loaders, cfg.SEED)


def train_one_epoch(cfg, training, epoch, iterations, test_due):
    """Take the steps of an epoch; True if the run is to stop. Its last step is not written yet."""
    model, optimizer, scheduler, clip, autocast, scaler, ema, guard, batches, saver, writers, stop = training
    storage, start = get_event_storage(), perf_counter()
    bar = progress_range(iterations.start, iterations.stop, first=iterations.start, desc=f"epoch {epoch}")
    for iteration, data in zip(bar, batches, strict=False):
        storage.iter, data_time = iteration, perf_counter() - start
        late, last = iteration < cfg.SOLVER.MAX_ITER - 1 and stop.is_made(), iteration == iterations[-1]
        # The losses are read only for a write, a test or a save.
        write = every(cfg.LOG_PERIOD, iteration) and not last
        read, due = write or last or saver.is_due(iteration), last and test_due
        optimizer.zero_grad()
        totals = {}
        for samples, share, context in split_batch(model, data, cfg.SOLVER.ACCUMULATE_STEPS):
            with context, autocast:
                loss_dict = model(samples)  # a dict of losses, whatever the task
            losses = sum_losses(loss_dict)
            scaler.scale(scaled(losses, share)).backward()
            totals = add_scaled(totals, {"total_loss": losses, **loss_dict}, share)
        scaler.unscale_(optimizer)
        norm = clip()
        totals, norm = guard.only_finite(totals, norm, scaler)
        if totals:
            scaler.step(optimizer)
        scaler.update()
        storage.put_scalars(**scheduler.scalars(), epoch=epoch, smoothing_hint=False)
        scheduler.step()
        ema.update()
        reduced = comm.reduce_dict(totals)
        storage.put_scalars(**reduced, **norm, time=perf_counter() - start, data_time=data_time)
        if read or late:
            check_finite(storage, scaler, guard.images_of)  # sync point
        if read:
            comm.average_buffers(model, ema.module)
            storage.put_scalars(**peak_memory(), smoothing_hint=False)
        saver.step(iteration, now=late, due=due, skipped_steps=guard.counts)
        if write or late:
            write_all(writers)
        if late:
            return True
        start = perf_counter()
    return False


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_EPOCHS epochs; returns the results of the last evaluation."""
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler, clip = build_lr_scheduler(cfg, optimizer), build_gradient_clipper(cfg, model)
    autocast, scaler = build_amp(cfg, model)
    ema, best = build_ema(cfg, model), BestMetric(cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema, "best": best}
    parts["data_loader"] = data_loader = build_detection_train_loader(cfg)
    saver = build_periodic_checkpointer(cfg, model, parts, run_facts(cfg))
    # Only a resumed run goes on counting; weights of another run start at 0.
    state = saver.checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start_iter, max_iter = state.get("iteration", -1) + 1, cfg.SOLVER.MAX_ITER
    guard = build_step_guard(cfg, model, data_loader, state.get("skipped_steps", (0, 0)))
    writers, stop = build_writers(cfg), StopRequest(cfg.SOLVER.MAX_TIME)
    batches, per_epoch = iter(data_loader), data_loader.iters_per_epoch
    training = Training(
        model, optimizer, scheduler, clip, autocast, scaler, ema, guard, batches, saver, writers, stop
    )
    flows = workflow_epochs(cfg.WORKFLOW, cfg.SOLVER.MAX_EPOCHS, start_epoch=start_iter // per_epoch)
    # A run that was interrupted within an epoch has done the validation before it.
    within, results = start_iter % per_epoch != 0, {}
    flows = itertools.dropwhile(lambda flow: flow[0] == "val" and within, flows)
    logger.info(f"starting training from iteration {start_iter} of {max_iter}, {per_epoch} an epoch")
    with stop, EventStorage(start_iter, state.get("log_window")) as storage, closing_all(writers), saver:
        # A checkpoint precedes the tests and the log row of its iteration: a resumed run does these first.
        if best.is_stale() or state.get("due"):
            results = do_test(cfg, ema.evaluated)
            store_results(flatten_results(results), start_iter - 1, ema.evaluated, best, saver)
        if start_iter and (not within or every(cfg.LOG_PERIOD, start_iter - 1)):
            storage.iter = start_iter - 1
            write_all(writers)
        for (mode, epoch), (following, _) in itertools.pairwise([*flows, ("end", 0)]):
            if best.is_stale():
                break
            steps, metrics = range(epoch * per_epoch, min((epoch + 1) * per_epoch, max_iter)), {}
            due = mode == "train" and test_is_due(cfg, steps)
            left = range(max(steps.start, start_iter), steps.stop)
            if mode == "train" and train_one_epoch(cfg, training, epoch, left, due):
                break
            with saver.saving_if_stopped(steps.stop - 1, due=due):
                if mode == "val":
                    metrics = val_one_epoch(cfg, ema.evaluated)
                elif due:
                    results = do_test(cfg, ema.evaluated)
                    metrics = flatten_results(results)
            store_results(metrics, steps.stop - 1, ema.evaluated, best, saver)
            if best.is_stale() and not test_is_due(cfg, steps):
                # The run ends here: with its final evaluation.
                results = do_test(cfg, ema.evaluated)
                store_results(flatten_results(results), steps.stop - 1, ema.evaluated, best, saver)
            # One line an iteration: after all validation that follows the epoch.
            if epoch >= 0 and (following != "val" or best.is_stale()):
                write_all(writers)
    return results


def setup(args):
    """The config of the command line, after the checks that can be made before training."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if not args.eval_only:
        require_default(cfg, "TEST.VAL_LOSS_PERIOD", 'here a ["val", n] in WORKFLOW computes them')
        if not cfg.SOLVER.MAX_EPOCHS:
            raise UserError("SOLVER.MAX_EPOCHS is 0: set the number of training epochs")
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """One process' work."""
    cfg = setup(args)
    model = build_model(cfg)
    logger.info(f"model:\n{model}")
    if args.eval_only:
        averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged"
        names = {"class_names": dataset_classes(cfg.DATASETS.TEST), "averaged": averaged}
        checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
        if args.resume and not checkpointer.has_checkpoint():
            raise UserError(f"--eval-only --resume: there is no checkpoint in {cfg.OUTPUT_DIR}")
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, **names)
        results = do_test(cfg, model)
    else:
        results = do_train(cfg, create_ddp_model(model), resume=args.resume)
        make_report_if_wanted(cfg)
    if args.dry_run:
        resumed = do_train(cfg, create_ddp_model(build_model(cfg)), resume=True)
        finish_dry_run(cfg, results, resumed)
    if comm.is_main_process() and results:
        verify_results(cfg.TEST.EXPECTED_RESULTS, next(iter(results.values())))
    return results


if __name__ == "__main__":
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
