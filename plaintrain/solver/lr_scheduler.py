"""Learning rate and momentum as functions of the iteration."""

import bisect
import logging
import math

logger = logging.getLogger(__name__)


class LRScheduler:
    """Sets each group's learning rate to its base times a pure function of the iteration; momentum too.

    The base is what the groups were built with, so a changed SOLVER.BASE_LR or SOLVER.MOMENTUM takes
    effect when a run is resumed.
    """

    def __init__(self, optimizer, factor, momentum=None):
        """`factor` and `momentum` are functions of the iteration, from 0; None leaves the momentum alone."""
        self.optimizer, self.factor, self.momentum = optimizer, factor, momentum
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        group = optimizer.param_groups[0]
        self.base_momentum = group["betas"][0] if "betas" in group else group.get("momentum")
        self.last_epoch = 0
        self._apply()

    def _apply(self):
        factor = self.factor(self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        if self.momentum is not None:
            self._set_momentum(self.momentum(self.last_epoch))

    def _set_momentum(self, momentum):
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum

    def step(self):
        """Go to the next iteration."""
        self.last_epoch += 1
        self._apply()

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def scalars(self):
        """What the next step uses, to be logged: `lr` of the first group, and `momentum` if it changes."""
        lr = {"lr": self.optimizer.param_groups[0]["lr"]}
        return lr if self.momentum is None else lr | {"momentum": self.momentum(self.last_epoch)}

    def state_dict(self):
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict):
        self.last_epoch = state_dict["last_epoch"]
        # The optimizer's own state has brought that of the saved run.
        self._set_momentum(self.base_momentum)
        self._apply()


def build_lr_factor(cfg):
    """Return the function from the iteration to the multiplier of the learning rate.

    Values are those of Detectron2's schedulers for the same keys; valid beyond the last iteration.
    """
    solver = cfg.SOLVER
    schedule = _SCHEDULES[solver.LR_SCHEDULER_NAME](solver)
    warmup = min(solver.WARMUP_ITERS, solver.MAX_ITER) / solver.MAX_ITER
    max_iter, method, rescale = solver.MAX_ITER, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
    start, end = solver.WARMUP_FACTOR * schedule(0.0), schedule(0.0 if rescale else warmup)

    def factor(iteration):
        where = min(iteration / max_iter, 1.0)
        if where < warmup:
            return start + (end - start) * (where / warmup if method == "linear" else 0.0)
        if rescale and warmup < 1:
            where = (where - warmup) / (1 - warmup)
        return schedule(where)

    return factor


def _multi_step(solver):
    max_iter, gamma = solver.MAX_ITER, solver.GAMMA
    steps = sorted(step for step in solver.STEPS if step <= max_iter)
    # The share is of MAX_ITER iterations; the nearest whole iteration undoes the division.
    return lambda where: gamma ** bisect.bisect_right(steps, round(where * max_iter, 6))


def _cosine(solver):
    end = solver.BASE_LR_END / solver.BASE_LR
    return lambda where: end + (1 - end) * 0.5 * (1 + math.cos(math.pi * where))


def _fixed_gamma(solver):
    parts = solver.NUM_DECAYS + 1
    return lambda where: solver.GAMMA ** min(int(where * parts + 1e-9), parts - 1)


_SCHEDULES = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": _cosine,
    "WarmupStepWithFixedGammaLR": _fixed_gamma,
}


def build_momentum_factor(points, interpolation):
    """Return the function from the iteration to the momentum that SOLVER.MOMENTUM_SCHEDULE describes.

    Args:
        points: [[iteration, momentum], ...], iterations rising, momentum in 0..1; not empty.
        interpolation: "linear", "cosine" or "step".
    """
    starts = [start for start, _ in points]
    shapes = {"linear": lambda x: x, "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2, "step": lambda x: 0}
    shape = shapes[interpolation]

    def momentum(iteration):
        after = bisect.bisect_right(starts, iteration)
        if after in (0, len(points)):
            return float(points[max(after - 1, 0)][1])
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * shape((iteration - x0) / (x1 - x0))

    return momentum


def build_lr_scheduler(cfg, optimizer):
    """SOLVER.LR_SCHEDULER_NAME and MOMENTUM_SCHEDULE; call its `step()` after each iteration."""
    solver, points = cfg.SOLVER, cfg.SOLVER.MOMENTUM_SCHEDULE
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and max(solver.STEPS, default=0) > solver.MAX_ITER:
        logger.warning(
            f"SOLVER.STEPS {solver.STEPS} has entries beyond MAX_ITER {solver.MAX_ITER}; they do nothing"
        )
    momentum = build_momentum_factor(points, cfg.SOLVER.MOMENTUM_INTERPOLATION) if points else None
    return LRScheduler(optimizer, build_lr_factor(cfg), momentum)
