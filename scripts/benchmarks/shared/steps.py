"""Training step of plaintrain on batches in memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from plaintrain.config import CfgNode
from plaintrain.modeling import build_model
from plaintrain.solver import build_optimizer
from plaintrain.solver.accumulation import sum_losses
from plaintrain.solver.amp import build_amp


def make_training_steps(
    cfg: CfgNode, batches: Iterable[list[dict[str, Any]]]
) -> tuple[Callable[[], None], nn.Module]:
    """Return (function that trains a step on each batch, model), with the same weights in each call."""
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    autocast, scaler = build_amp(cfg, model)

    def steps():
        for samples in batches:
            optimizer.zero_grad()
            with autocast:
                losses = sum_losses(model(samples))
            scaler.scale(losses).backward()
            scaler.step(optimizer)
            scaler.update()

    return steps, model
