"""Periods, epochs, and scaling of the schedule to batch size and world size."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from plaintrain.config import CfgNode, get_value, set_value
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Keys in epochs if SOLVER.BY_EPOCH is True.
_PERIODS = (
    "SOLVER.STEPS",
    "SOLVER.MOMENTUM_SCHEDULE",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.EVAL_START",
    "TEST.VAL_LOSS_PERIOD",
)
_ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS")


def every(period: int, iteration: int, start: int = 0) -> bool:
    """Return whether `iteration` (from 0) is the last of `period`, `2 * period`, ... iterations.

    With `start` > 0 it is the last of `start`, `start + period`, ... A period of 0 never ends.
    """
    finished = iteration + 1 - start
    return period > 0 and finished >= (0 if start else 1) and finished % period == 0


class Due(NamedTuple):
    """Actions that are due after an iteration."""

    save: bool = False
    validate: bool = False
    test: bool = False
    log: bool = False
    stop: bool = False


def validates_after(cfg: CfgNode, epoch: int) -> bool:
    """Return whether WORKFLOW validates after a training epoch (from 0), or with -1 before the first.

    As in MMDetection, its flows [["train" or "val", number of epochs], ...] repeat until SOLVER.MAX_EPOCHS
    training epochs are done. The last round skips training epochs beyond that, but no validation epochs.
    """
    last_epoch = -1
    while last_epoch < cfg.SOLVER.MAX_EPOCHS - 1:
        for mode, num_epochs in cfg.WORKFLOW:
            if mode == "train":
                last_epoch = min(last_epoch + num_epochs, cfg.SOLVER.MAX_EPOCHS - 1)
            elif last_epoch == epoch:
                return True
    return False


def resolve_schedule(cfg: CfgNode, num_workers: int, iters_per_epoch: Callable[[CfgNode], int]) -> None:
    """Apply REFERENCE_WORLD_SIZE, REFERENCE_IMS_PER_BATCH, MAX_EPOCHS and BY_EPOCH in place; log changes.

    Afterwards all counts are in iterations, and a second call changes nothing. `num_workers` is the world
    size, `iters_per_epoch` returns the length of an epoch and is called only if SOLVER.MAX_EPOCHS is set.
    """
    before = cfg.clone()
    solver = cfg.SOLVER
    if solver.BY_EPOCH and not solver.MAX_EPOCHS:
        raise UserError("SOLVER.MAX_EPOCHS must be set if SOLVER.BY_EPOCH is True, got 0")
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
    lines = [f"  {key}: {old} -> {new}" for key, old, new in changes if old != new]
    if lines:
        logger.info("\n".join(["the schedule of this run:", *lines]))


def _scale(cfg: CfgNode, num_workers: int) -> None:
    """Apply the linear scaling rule (https://arxiv.org/abs/1706.02677)."""
    solver = cfg.SOLVER
    world_size = solver.REFERENCE_WORLD_SIZE
    batch_size = solver.REFERENCE_IMS_PER_BATCH
    if world_size not in (0, num_workers):
        if batch_size:
            raise UserError(
                "SOLVER.REFERENCE_WORLD_SIZE and SOLVER.REFERENCE_IMS_PER_BATCH must not both scale the "
                f"schedule, got {world_size} and {batch_size}; set one of them to 0"
            )
        if solver.IMS_PER_BATCH % world_size:
            expected = f"a multiple of SOLVER.REFERENCE_WORLD_SIZE {world_size}"
            raise UserError(f"SOLVER.IMS_PER_BATCH must be {expected}, got {solver.IMS_PER_BATCH}")
        factor = num_workers / world_size
        set_value(cfg, "SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH // world_size * num_workers)
        set_value(cfg, "SOLVER.REFERENCE_WORLD_SIZE", num_workers)
    elif batch_size not in (0, solver.IMS_PER_BATCH):
        factor = solver.IMS_PER_BATCH / batch_size
        set_value(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", solver.IMS_PER_BATCH)
    else:
        return
    for key in ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END"):
        set_value(cfg, key, get_value(cfg, key) * factor)
    # Counts in epochs do not scale.
    _multiply(cfg, _ITERATIONS if solver.BY_EPOCH else (*_ITERATIONS, *_PERIODS), 1 / factor)


def _multiply(cfg: CfgNode, keys: Iterable[str], factor: float) -> None:
    def scaled(count: int) -> int:
        # A period stays above 0, because 0 means never.
        return max(round(count * factor), 1) if count > 0 else count

    for key in keys:
        value = get_value(cfg, key)
        if key == "SOLVER.MOMENTUM_SCHEDULE":
            value = [[scaled(start), momentum] for start, momentum in value]
        else:
            value = [scaled(v) for v in value] if isinstance(value, tuple | list) else scaled(value)
        set_value(cfg, key, value)
