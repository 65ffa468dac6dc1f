"""Periods and schedules: what is due after an iteration, order of epochs, scaling to batch and processes."""

import logging
from typing import NamedTuple

from plaintrain.config import get_value, set_value
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Counts that SOLVER.BY_EPOCH counts in epochs.
_PERIODS = (
    "SOLVER.STEPS",
    "SOLVER.MOMENTUM_SCHEDULE",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.EVAL_START",
    "TEST.VAL_LOSS_PERIOD",
)
_ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS")


def every(period, iteration, start=0):
    """True after `period`, `2 * period`, ... finished iterations; never when period is 0.

    Args:
        period: number of iterations, >= 0.
        iteration: the one being finished, counted from 0.
        start: above 0, True after `start`, `start + period`, ... instead.
    """
    finished = iteration + 1 - start
    return period > 0 and finished >= (0 if start else 1) and finished % period == 0


class Due(NamedTuple):
    """What follows an iteration."""

    save: bool = False
    validate: bool = False
    test: bool = False
    log: bool = False
    stop: bool = False


def validates_after(cfg, epoch):
    """Return whether WORKFLOW validates after a training epoch (from 0), or with -1 before the first.

    As in MMDetection's runner, the flows, [["train" or "val", number], ...], are repeated until
    SOLVER.MAX_EPOCHS training epochs are done. The last round leaves out training epochs beyond that, and
    its validation epochs take place.
    """
    last_epoch = -1
    while last_epoch < cfg.SOLVER.MAX_EPOCHS - 1:
        for mode, number in cfg.WORKFLOW:
            if mode == "train":
                last_epoch = min(last_epoch + number, cfg.SOLVER.MAX_EPOCHS - 1)
            elif last_epoch == epoch:
                return True
    return False


def resolve_schedule(cfg, num_workers, iters_per_epoch):
    """Apply REFERENCE_WORLD_SIZE, REFERENCE_IMS_PER_BATCH, MAX_EPOCHS and BY_EPOCH, in place.

    Afterwards all counts are iterations, and applying it again changes nothing. What has changed is
    logged, before and after.

    Args:
        cfg: the config, frozen or not.
        num_workers: processes of this job.
        iters_per_epoch: function from the config to the iterations of a pass over the training images;
            called only with SOLVER.MAX_EPOCHS.
    """
    before, solver = cfg.clone(), cfg.SOLVER
    if solver.BY_EPOCH and not solver.MAX_EPOCHS:
        raise UserError("SOLVER.BY_EPOCH counts in epochs, but SOLVER.MAX_EPOCHS is 0: set their number")
    _scale(cfg, num_workers)
    if solver.MAX_EPOCHS > 0:
        per_epoch = iters_per_epoch(cfg)
        set_value(cfg, "SOLVER.MAX_ITER", solver.MAX_EPOCHS * per_epoch)
        logger.info(f"an epoch has {per_epoch} iterations of {solver.IMS_PER_BATCH} images")
        if solver.BY_EPOCH:
            _multiply(cfg, _PERIODS, per_epoch)
            set_value(cfg, "SOLVER.BY_EPOCH", False)
    keys = ("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", *_ITERATIONS, *_PERIODS)
    changes = [(key, get_value(before, key), get_value(cfg, key)) for key in keys]
    rows = [f"  {key}: {old} -> {new}" for key, old, new in changes if old != new]
    if rows:
        logger.info("the schedule for this run:\n" + "\n".join(rows))


def _scale(cfg, num_workers):
    """The linear rule (https://arxiv.org/abs/1706.02677): a larger batch, fewer and larger steps."""
    solver = cfg.SOLVER
    world, batch = solver.REFERENCE_WORLD_SIZE, solver.REFERENCE_IMS_PER_BATCH
    if world not in (0, num_workers):
        if batch:
            raise UserError(
                "SOLVER.REFERENCE_WORLD_SIZE and SOLVER.REFERENCE_IMS_PER_BATCH would both scale the "
                "schedule: set one of them to 0"
            )
        if solver.IMS_PER_BATCH % world:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, which SOLVER.REFERENCE_WORLD_SIZE {world} "
                "does not divide"
            )
        factor = num_workers / world
        set_value(cfg, "SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH // world * num_workers)
        set_value(cfg, "SOLVER.REFERENCE_WORLD_SIZE", num_workers)
    elif batch not in (0, solver.IMS_PER_BATCH):
        factor = solver.IMS_PER_BATCH / batch
        set_value(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", solver.IMS_PER_BATCH)
    else:
        return
    for key in ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END"):
        set_value(cfg, key, get_value(cfg, key) * factor)
    # Epochs stay epochs.
    _multiply(cfg, _ITERATIONS if solver.BY_EPOCH else (*_ITERATIONS, *_PERIODS), 1 / factor)


def _multiply(cfg, keys, factor):
    def scaled(count):
        # What is on stays on; a period of 0 means never.
        return max(round(count * factor), 1) if count > 0 else count

    for key in keys:
        value = get_value(cfg, key)
        if key == "SOLVER.MOMENTUM_SCHEDULE":
            value = [[scaled(start), momentum] for start, momentum in value]
        else:
            value = [scaled(v) for v in value] if isinstance(value, tuple | list) else scaled(value)
        set_value(cfg, key, value)
