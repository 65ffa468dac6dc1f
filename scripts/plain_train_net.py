#!/usr/bin/env python
"""Train and evaluate a detector in one plain loop.

python scripts/plain_train_net.py --config-file configs/quickstart.yaml
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --resume
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --eval-only \\
    MODEL.WEIGHTS output/quickstart/model_final.pth

The file is made to be copied: change the data, the evaluator or the loss where they are called.
"""

import logging
import os
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

logger = logging.getLogger("plaintrain")


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


def do_validate(cfg, model):
    """The losses on DATASETS.TEST together, {"val/NAME": mean over images}, on every rank."""
    loaders = [build_detection_val_loader(cfg, name) for name in cfg.DATASETS.TEST]
    with build_autocast(cfg.TEST.AMP, cfg.SOLVER.AMP.PRECISION, next(model.parameters()).device.type):
        return validation_losses(model, loaders, cfg.SEED)


def tests_due(cfg, iteration):
    """Whether (validation losses, an evaluation) are due after an iteration."""
    test, last = cfg.TEST, iteration == cfg.SOLVER.MAX_ITER - 1
    evaluation = last or every(test.EVAL_PERIOD, iteration, start=test.EVAL_START)
    return every(test.VAL_LOSS_PERIOD, iteration), evaluation


def test_after(cfg, model, iteration, best, saver, due):
    """Compute and store what is due after an iteration, and keep the best model; the results, if any."""
    validation, evaluation = due or (False, False)
    with saver.saving_if_stopped(iteration, due=due):
        losses = do_validate(cfg, model) if validation else {}
        results = do_test(cfg, model) if evaluation else {}
    if best.update(iteration, {**losses, **flatten_results(results)}):
        saver.checkpointer.save_weights("model_best", model, iteration=iteration)
    if best.is_stale():
        # The run ends here: with its final checkpoint and evaluation.
        saver.finish(iteration, due=due)
        results = results or do_test(cfg, model)
    metrics, storage = {**losses, **flatten_results(results)}, get_event_storage()
    # A new run begins at 0.
    storage.iter = max(iteration, 0)
    storage.put_scalars(**metrics, smoothing_hint=False)
    comm.synchronize()
    return results


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_ITER iterations; returns the results of the last evaluation."""
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler, clip = build_lr_scheduler(cfg, optimizer), build_gradient_clipper(cfg, model)
    autocast, scaler = build_amp(cfg, model)
    ema, best = build_ema(cfg, model), BestMetric(cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema, "best": best}
    parts["data_loader"] = data_loader = build_detection_train_loader(cfg)
    saver = build_periodic_checkpointer(cfg, model, parts, run_facts(cfg))
    state = saver.checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start_iter, max_iter = state.get("iteration", -1) + 1, cfg.SOLVER.MAX_ITER  # 0 unless resuming
    guard = build_step_guard(cfg, model, data_loader, state.get("skipped_steps", (0, 0)))
    writers, stop = build_writers(cfg), StopRequest(cfg.SOLVER.MAX_TIME)
    logger.info(f"starting training from iteration {start_iter} of {max_iter}")
    with stop, EventStorage(start_iter, state.get("log_window")) as storage, closing_all(writers), saver:
        # A checkpoint precedes the tests and the log row of its iteration: a resumed run does these first.
        results = test_after(cfg, ema.evaluated, start_iter - 1, best, saver, state.get("due"))
        if every(cfg.LOG_PERIOD, start_iter - 1) or any(state.get("due", ())):
            write_all(writers)
        late, start = False, perf_counter()
        for iteration, data in zip(progress_range(start_iter, max_iter), data_loader, strict=False):
            if late or best.is_stale():
                break
            storage.iter, data_time = iteration, perf_counter() - start
            late, due = iteration < max_iter - 1 and stop.is_made(), tests_due(cfg, iteration)
            write = every(cfg.LOG_PERIOD, iteration) or any(due)
            read = write or saver.is_due(iteration)  # the losses, else they stay on the device
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
            storage.put_scalars(**scheduler.scalars(), smoothing_hint=False)
            scheduler.step()
            ema.update()
            reduced = comm.reduce_dict(totals)
            storage.put_scalars(**reduced, **norm, time=perf_counter() - start, data_time=data_time)
            if read or late:
                check_finite(storage, scaler, guard.images_of)  # sync point
            if read:
                comm.average_buffers(model, ema.module)
                storage.put_scalars(**peak_memory(), smoothing_hint=False)
            # The checkpoint comes first: a failing evaluation loses nothing.
            saver.step(iteration, now=late, due=due, skipped_steps=guard.counts)
            if any(due) and not late:
                results = test_after(cfg, ema.evaluated, iteration, best, saver, due) or results
            if write or late:
                write_all(writers)
            start = perf_counter()
    return results


def setup(args):
    """The config of the command line, after the checks that can be made before training."""
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
