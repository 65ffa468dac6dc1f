"""Schedules of learning rate and momentum."""

import bisect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from plaintrain.config import CfgNode

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]


class LRScheduler:
    """Scheduler that sets learning rates and momentum as functions of the iteration, from 0.

    `factor` multiplies the learning rates of the new optimizer, not of a checkpoint, so that a changed
    SOLVER.BASE_LR or MOMENTUM takes effect when a run is resumed. Without `momentum` it is constant.
    """

    def __init__(self, optimizer: Optimizer, factor: Schedule, momentum: Schedule | None = None):
        self.optimizer = optimizer
        self.factor = factor
        self.momentum = momentum
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        group = optimizer.param_groups[0]
        self.base_momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        self.last_epoch = 0
        self._apply()

    def _apply(self) -> None:
        factor = self.factor(self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        if self.momentum is not None:
            self._set_momentum(self.momentum(self.last_epoch))

    def _set_momentum(self, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum

    def step(self) -> None:
        self.last_epoch += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def scalars(self) -> dict[str, float]:
        """Return the `lr` of the first group, and the `momentum` if it has a schedule, for logging."""
        lr = {"lr": self.optimizer.param_groups[0]["lr"]}
        return lr if self.momentum is None else lr | {"momentum": self.momentum(self.last_epoch)}

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        # The optimizer's state dict has restored the momentum of the saved run.
        self._set_momentum(self.base_momentum)
        self._apply()


class LRMultiplier(LRScheduler):
    """Scheduler that multiplies the learning rates by a function of the finished fraction of training."""

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[float], float], max_iter: int) -> None:
        super().__init__(optimizer, _count_iterations(multiplier, max_iter))


@dataclass(frozen=True)
class WarmupParamScheduler:
    """Function of the finished fraction of training: `scheduler`, after a warmup of `warmup_length`."""

    scheduler: Callable[[float], float]
    warmup_factor: float
    warmup_length: float
    warmup_method: str = "linear"
    rescale_interval: bool = False

    def __call__(self, where: float) -> float:
        if where < self.warmup_length:
            start = self.warmup_factor * self.scheduler(0.0)
            end = self.scheduler(0.0 if self.rescale_interval else self.warmup_length)
            progress = {"linear": where / self.warmup_length, "constant": 0.0}[self.warmup_method]
            return start + (end - start) * progress
        if self.rescale_interval and self.warmup_length < 1:
            where = (where - self.warmup_length) / (1 - self.warmup_length)
        return self.scheduler(where)


def build_lr_factor(cfg: CfgNode) -> Schedule:
    """Build the function from iteration to learning rate multiplier, with the values of Detectron2."""
    solver = cfg.SOLVER
    max_iter = solver.MAX_ITER
    warmup = min(solver.WARMUP_ITERS, max_iter) / max_iter
    options = solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
    return _count_iterations(WarmupParamScheduler(_build_schedule(solver), *options), max_iter)


def _count_iterations(multiplier: Callable[[float], float], max_iter: int) -> Schedule:
    return lambda iteration: multiplier(min(iteration / max_iter, 1.0))


def _build_schedule(solver: CfgNode) -> Callable[[float], float]:
    """Build the function from the finished fraction of training to the multiplier, without warmup."""
    max_iter = solver.MAX_ITER
    gamma = solver.GAMMA
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = sorted(step for step in solver.STEPS if step <= max_iter)
        # Rounding to the nearest iteration undoes the division by MAX_ITER.
        return lambda where: gamma ** bisect.bisect_right(steps, round(where * max_iter, 6))
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        return lambda where: end + (1 - end) * 0.5 * (1 + math.cos(math.pi * where))
    # `check_cfg` leaves only WarmupStepWithFixedGammaLR.
    num_intervals = solver.NUM_DECAYS + 1
    return lambda where: gamma ** min(int(where * num_intervals + 1e-9), num_intervals - 1)


def build_momentum_factor(points: Sequence[Sequence[float]], interpolation: str) -> Schedule:
    """Build the function from iteration to momentum through points [[iteration, momentum], ...].

    Iterations increase; `interpolation` is "linear", "cosine" or "step".
    """
    starts = [start for start, _ in points]
    shapes = {"linear": lambda x: x, "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2, "step": lambda x: 0}
    shape = shapes[interpolation]

    def momentum(iteration: int) -> float:
        after = bisect.bisect_right(starts, iteration)
        if after in (0, len(points)):
            return float(points[max(after - 1, 0)][1])
        (x0, y0), (x1, y1) = points[after - 1 : after + 1]
        return y0 + (y1 - y0) * shape((iteration - x0) / (x1 - x0))

    return momentum


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the scheduler of SOLVER.*; call its `step()` after each iteration."""
    solver = cfg.SOLVER
    points = solver.MOMENTUM_SCHEDULE
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and max(solver.STEPS, default=0) > solver.MAX_ITER:
        logger.warning(f"ignored SOLVER.STEPS beyond MAX_ITER {solver.MAX_ITER}, got {solver.STEPS}")
    momentum = build_momentum_factor(points, solver.MOMENTUM_INTERPOLATION) if points else None
    return LRScheduler(optimizer, build_lr_factor(cfg), momentum)
