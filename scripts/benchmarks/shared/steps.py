"""plaintrain's training step on batches in memory."""

import torch

from plaintrain.modeling import build_model
from plaintrain.solver import build_optimizer
from plaintrain.solver.accumulation import sum_losses
from plaintrain.solver.amp import build_amp


def make_training_steps(cfg, batches):
    """(function that takes a step on each batch, its model), always with the same weights."""
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer, (autocast, scaler) = build_optimizer(cfg, model), build_amp(cfg, model)

    def steps():
        for samples in batches:
            optimizer.zero_grad()
            with autocast:
                losses = sum_losses(model(samples))
            scaler.scale(losses).backward()
            scaler.step(optimizer)
            scaler.update()

    return steps, model
