"""Optimizers, learning rate schedules, gradient clipping and weight averages."""

from plaintrain.solver.optimizer import (
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
    lr_factor,
    momentum_at,
)

__all__ = ["build_gradient_clipper", "build_lr_scheduler", "build_optimizer", "lr_factor", "momentum_at"]
