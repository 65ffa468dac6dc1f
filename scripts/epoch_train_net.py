#!/usr/bin/env python
"""Train and evaluate a detector epoch by epoch, with the validation epochs of WORKFLOW.

python scripts/epoch_train_net.py --config-file configs/BCCD/faster_rcnn_tiny_epochs.yaml
python scripts/epoch_train_net.py --config-file configs/quickstart.yaml SOLVER.MAX_EPOCHS 3 \\
    SOLVER.BY_EPOCH True SOLVER.CHECKPOINT_PERIOD 1 WORKFLOW "[['train', 1], ['val', 1]]"

plain_train_net.py has the same step, and both scripts can resume the checkpoints of the other.
"""

import logging
from time import perf_counter

from plaintrain.utils.arguments import default_argument_parser

if __name__ == "__main__":
    # --help should not wait for the imports below.
    args = default_argument_parser(epilog=__doc__).parse_args()

from plaintrain import checkpoint, data, engine, evaluation, modeling, solver
from plaintrain.engine.dry_run import finish_dry_run
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.engine.nonfinite import build_nonfinite_guard
from plaintrain.engine.run_facts import write_report
from plaintrain.engine.testing import do_test, evaluate
from plaintrain.solver.accumulation import add_losses, split_batch, sum_losses, sync_gradients
from plaintrain.solver.amp import build_amp
from plaintrain.solver.ema import build_ema
from plaintrain.solver.schedule import Due, every, validates_after
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import EventStorage, closing_all, write_all
from plaintrain.utils.memory import get_peak_memory
from plaintrain.utils.stop import StopSignal

logger = logging.getLogger("plaintrain")


def due(cfg, iteration, iters_per_epoch, stopping=False):
    """Return the actions that are due after an iteration (from 0); evaluations follow whole epochs."""
    is_last_iter = iteration == cfg.SOLVER.MAX_ITER - 1
    if stopping and not is_last_iter:
        return Due(save=True, stop=True)
    epoch = iteration // iters_per_epoch
    is_end = is_last_iter or (iteration + 1) % iters_per_epoch == 0
    validate = is_end and validates_after(cfg, epoch)
    # An evaluation that is due within an epoch follows its last iteration.
    iterations = range(epoch * iters_per_epoch, iteration + 1) if is_end else ()
    test = is_last_iter or any(every(cfg.TEST.EVAL_PERIOD, i, start=cfg.TEST.EVAL_START) for i in iterations)
    save = validate or test or every(cfg.SOLVER.CHECKPOINT_PERIOD, iteration)
    log = validate or test or every(cfg.LOG_PERIOD, iteration) or (is_end and epoch >= 0)
    return Due(save=save, validate=validate, test=test, log=log)


def train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite):
    """Run one step as in plain_train_net.py; return detached losses and gradient norm, {} if skipped."""
    optimizer.zero_grad()
    losses = {}
    for micro_batch, weight, is_last in micro_batches:
        with sync_gradients(model, is_last):
            with amp.autocast:
                loss_dict = model(micro_batch)
            if is_last:
                comm.check_loss_names(loss_dict)  # all ranks
            total_loss = sum_losses(loss_dict)
            amp.scaler.scale(total_loss * weight).backward()
        losses = add_losses(losses, {"total_loss": total_loss, **loss_dict}, weight)
    amp.scaler.unscale_(optimizer)
    grad_norm = clip_gradients()
    take_step = nonfinite.allows_step(losses, grad_norm)
    if take_step:
        amp.scaler.step(optimizer)
    amp.scaler.update()
    return {**losses, "grad_norm": grad_norm} if take_step else {}


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_EPOCHS epochs; return the results of the last test."""
    # Build everything that the loop needs.
    model.train()
    optimizer = solver.build_optimizer(cfg, model)
    scheduler = solver.build_lr_scheduler(cfg, optimizer)
    clip_gradients = solver.build_gradient_clipper(cfg, model)
    amp = build_amp(cfg, model)
    ema = build_ema(cfg, model)
    data_loader = data.build_detection_train_loader(cfg)
    nonfinite = build_nonfinite_guard(cfg, model, data_loader, amp.scaler)
    early_stopping = EarlyStopping(cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE)
    storage = EventStorage()
    writers = engine.build_writers(cfg)

    # A checkpoint contains the model, these states by name, and the random state of each rank.
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": amp.scaler, "ema": ema}
    states |= {"data_loader": data_loader, "nonfinite": nonfinite, "early_stopping": early_stopping}
    checkpointer = checkpoint.build_checkpointer(cfg, model, storage=storage, **states)
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    iters_per_epoch = data_loader.iters_per_epoch
    logger.info(f"starting training from iteration {start_iter}, {iters_per_epoch} per epoch")

    with StopSignal(cfg.SOLVER.MAX_TIME) as stop, storage, closing_all(writers), checkpointer:
        # WORKFLOW may start with a validation, and a resumed run repeats what follows its checkpoint.
        results = {}
        actions = due(cfg, start_iter - 1, iters_per_epoch)
        if actions.validate or actions.test:
            results |= evaluate(cfg, ema.eval_model, start_iter - 1, actions, early_stopping, checkpointer)
        if actions.log:
            write_all(writers)

        for epoch, batches in data_loader.epochs(start_iter, cfg.SOLVER.MAX_ITER):
            if early_stopping.triggered:
                break
            start_time = perf_counter()
            for iteration, samples in batches:
                data_time = perf_counter() - start_time
                storage.iter = iteration
                actions = due(cfg, iteration, iters_per_epoch, stop.requested_on_any_rank())  # all ranks

                # Train on one batch.
                micro_batches = split_batch(samples, cfg.SOLVER.ACCUMULATE_STEPS)
                losses = train_step(model, micro_batches, optimizer, amp, clip_gradients, nonfinite)
                ema.update(model)
                storage.put_scalars(**scheduler.scalars(), epoch=epoch, smoothing_hint=False)
                scheduler.step()
                reduced_losses = comm.reduce_dict(losses)  # all ranks
                storage.put_scalars(**reduced_losses, time=perf_counter() - start_time, data_time=data_time)
                if actions.save or actions.log:
                    nonfinite.check_storage(storage)  # device sync
                    storage.put_scalars(**amp.scalars(), **get_peak_memory(), smoothing_hint=False)

                # Save before the evaluation, which may fail; log after it, with its metrics.
                if actions.save:
                    checkpointer.save_iteration(iteration)  # all ranks
                if actions.validate or actions.test:
                    results |= evaluate(cfg, ema.eval_model, iteration, actions, early_stopping, checkpointer)
                if actions.log:
                    write_all(writers)
                if actions.stop:
                    return results
                start_time = perf_counter()
        checkpointer.save_final()
    return results


def main(args):
    """Train or evaluate on one rank."""
    cfg = engine.load_cfg(args)
    if not args.eval_only:
        engine.require_default(cfg, "TEST.VAL_LOSS_PERIOD", 'set ["val", n] in WORKFLOW')
        if not cfg.SOLVER.MAX_EPOCHS:
            raise UserError("SOLVER.MAX_EPOCHS must be the number of training epochs, got 0")
    engine.default_setup(cfg, args)
    model = modeling.build_model(cfg)
    logger.debug(f"model:\n{model}")
    if args.eval_only:
        checkpoint.load_for_evaluation(cfg, model, resume=args.resume)
        results = do_test(cfg, model)
    else:
        results = do_train(cfg, engine.create_ddp_model(model), resume=args.resume)
        finish_dry_run(args, cfg, results, do_train)
        write_report(cfg)
    if comm.is_main_process() and results:
        evaluation.verify_results(cfg.TEST.EXPECTED_RESULTS, next(iter(results.values())))
    return results


if __name__ == "__main__":
    engine.launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
