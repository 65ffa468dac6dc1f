"""Optimizers, gradient clipping, learning rate schedules and periods."""

from plaintrain.solver.build import build_gradient_clipper, build_optimizer
from plaintrain.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler, build_lr_scheduler
from plaintrain.solver.schedule import Due, every

__all__ = [
    "Due", "LRMultiplier", "WarmupParamScheduler", "build_gradient_clipper", "build_lr_scheduler",
    "build_optimizer", "every",
]  # fmt: skip
