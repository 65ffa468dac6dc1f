"""Optimizer, learning rate and gradient clipping."""

import bisect
import logging
import math

import torch
from torch import nn

from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NORM_LAYERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


def get_param_groups(model, *, base_lr, weight_decay, weight_decay_norm, weight_decay_bias, lr_factors):
    """Group the trainable parameters by learning rate and weight decay.

    A parameter of a normalisation layer takes `weight_decay_norm`; one named `bias`, of whatever
    layer, takes `weight_decay_bias` if that is given, as in Detectron2.

    Args:
        model: the module.
        base_lr: learning rate before factors.
        weight_decay, weight_decay_norm, weight_decay_bias: numbers; the last may be None, which
            leaves biases to the other two.
        lr_factors: {"bias": factor, "backbone": factor}; they multiply.

    Returns:
        list of {params, lr, weight_decay}, as few as there are different settings.
    """
    groups, seen = {}, set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A parameter that two modules share is listed once, with the settings of the first.
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = base_lr, weight_decay
            if isinstance(module, _NORM_LAYERS):
                decay = weight_decay_norm
            if name == "bias":
                lr *= lr_factors["bias"]
                decay = decay if weight_decay_bias is None else weight_decay_bias
            if "backbone" in module_name.split("."):
                lr *= lr_factors["backbone"]
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _as_parameters(optimizer):
    """Give loaded state the memory format of its parameter; fused steps go through both side by side."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_optimizer(cfg, model):
    """SGD or AdamW over the trainable parameters of `model`, as SOLVER.* says.

    Raises:
        UserError: an unknown optimizer, or a model with nothing to train.
    """
    solver = cfg.SOLVER
    groups = get_param_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factors={"bias": solver.BIAS_LR_FACTOR, "backbone": solver.BACKBONE_MULTIPLIER},
    )
    if not groups:
        raise UserError("the model has no parameter to train; lower MODEL.BACKBONE.FREEZE_AT")
    optimizer = _optimizer(solver, groups)
    optimizer.register_load_state_dict_post_hook(_as_parameters)
    return optimizer


def _optimizer(solver, groups):
    lr, momentum = solver.BASE_LR, solver.MOMENTUM
    try:
        if solver.OPTIMIZER == "SGD":
            optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=solver.NESTEROV, fused=True)
            # Otherwise a first step that the gradient scaler leaves out makes them of uninitialised memory.
            if momentum or solver.MOMENTUM_SCHEDULE:
                for parameter in (p for group in groups for p in group["params"]):
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        if solver.OPTIMIZER == "AdamW":
            return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), fused=True)
    except ValueError as e:
        raise UserError(f"SOLVER.* does not fit {solver.OPTIMIZER}: {e}") from e
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, but must be SGD or AdamW")


class LRScheduler:
    """Sets each group's learning rate to its base times a pure function of the iteration; momentum too.

    The base is what the groups were built with, so a changed SOLVER.BASE_LR or SOLVER.MOMENTUM takes
    effect when a run is resumed.
    """

    def __init__(self, optimizer, factor, momentum=None):
        """
        Args:
            optimizer: its groups' `lr` are the bases.
            factor: function from the iteration (from 0) to the multiplier.
            momentum: function from the iteration to the momentum, or None for what the groups have.
        """
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


def lr_factor(cfg):
    """The function from the iteration to the multiplier of the learning rate.

    Values are those of Detectron2's schedulers for the same keys; valid beyond the last iteration.

    Raises:
        UserError: an unknown scheduler or impossible settings.
    """
    solver = cfg.SOLVER
    if solver.MAX_ITER < 1 or not solver.WARMUP_ITERS >= 0:
        raise UserError(
            f"SOLVER.MAX_ITER must be >= 1 and SOLVER.WARMUP_ITERS >= 0, not {solver.MAX_ITER} and "
            f"{solver.WARMUP_ITERS}"
        )
    if solver.LR_SCHEDULER_NAME not in _SCHEDULES:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}, but must be one of "
            + ", ".join(_SCHEDULES)
        )
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
    if solver.BASE_LR == 0:
        raise UserError("SOLVER.BASE_LR is 0, so WarmupCosineLR has nothing to scale")
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


def momentum_at(points, interpolation):
    """The function from the iteration to the momentum that SOLVER.MOMENTUM_SCHEDULE describes.

    Args:
        points: [[iteration, momentum], ...], iterations rising, momentum in 0..1; not empty.
        interpolation: "linear", "cosine" or "step".

    Raises:
        UserError: names the point that is wrong.
    """
    for i, point in enumerate(points):
        well = isinstance(point, list | tuple) and len(point) == 2
        if not well or any(isinstance(v, bool) or not isinstance(v, int | float) for v in point):
            raise UserError(f"SOLVER.MOMENTUM_SCHEDULE has {point!r}, not [iteration, momentum]")
        if not 0 <= point[1] < 1:
            raise UserError(f"SOLVER.MOMENTUM_SCHEDULE has the momentum {point[1]}, which is not in [0, 1)")
        if i and point[0] <= points[i - 1][0]:
            raise UserError(f"SOLVER.MOMENTUM_SCHEDULE must have rising iterations, not {points}")
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
    momentum = momentum_at(points, cfg.SOLVER.MOMENTUM_INTERPOLATION) if points else None
    return LRScheduler(optimizer, lr_factor(cfg), momentum)


def build_gradient_clipper(cfg, model):
    """A function that clips the gradients in place, as SOLVER.CLIP_GRADIENTS says.

    Returns:
        Function `() -> norm`: that of all gradients before clipping, a 0-d tensor.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = clip.CLIP_TYPE if clip.ENABLED else None
    limit, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE if clip.ENABLED else 2.0

    def clip_gradients():
        """Clip now; see `build_gradient_clipper`."""
        if kind == "full_model":
            return torch.nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type)
        if kind == "value":
            torch.nn.utils.clip_grad_value_(parameters, limit)
        elif kind == "norm":
            for parameter in parameters:
                torch.nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return norm

    return clip_gradients
