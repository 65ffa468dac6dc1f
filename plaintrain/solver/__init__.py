"""Optimizers, gradient clipping, learning rate schedules and periods."""

from plaintrain.solver.lr_scheduler import build_lr_scheduler
from plaintrain.solver.optimizer import build_gradient_clipper, build_optimizer
from plaintrain.solver.schedule import Due, every

__all__ = ["Due", "build_gradient_clipper", "build_lr_scheduler", "build_optimizer", "every"]
