"""Gradient accumulation: one optimizer step for a batch that is processed in micro-batches."""

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plaintrain.utils.errors import UserError


def split_batch(samples: list[dict[str, Any]], steps: int) -> list[tuple[list[dict[str, Any]], float, bool]]:
    """Split a batch into at most `steps` micro-batches, as tuples (micro_batch, weight, is_last).

    `weight` is the micro-batch's fraction of the images: for losses that are means over images, the summed
    gradients are those of the whole batch. Losses that a model normalizes over the batch (RPN and R-CNN over
    sampled boxes, FCOS and SSD over objects) are normalized per micro-batch instead.
    """
    steps = min(steps, len(samples))
    ends = [len(samples) * step // steps for step in range(steps + 1)]
    return [
        (samples[start:end], (end - start) / len(samples), end == len(samples))
        for start, end in itertools.pairwise(ends)
    ]


def sync_gradients(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Return a context for forward and backward in which DDP averages gradients only if enabled."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def sum_losses(loss_dict: dict[str, Any]) -> Any:
    """Return the sum of the values whose key contains "loss": 0-d tensors, or other summable values."""
    losses = [value for name, value in loss_dict.items() if "loss" in name]
    if not losses:
        raise UserError(f"the model must return a key that contains 'loss', got {sorted(loss_dict)}")
    if not all(isinstance(value, Tensor) and value.dim() == 0 for value in losses):
        return sum(losses)
    # This needs two kernels, and its backward only views, for any number of losses.
    return torch.stack(losses).sum()


def add_losses(total: dict[str, Tensor], scalars: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return `total` plus the detached scalars times `weight`, by name, in a new dict."""
    summed = dict(total)
    for name, value in scalars.items():
        # A batch without accumulation launches no kernel here.
        weighted = value.detach() if weight == 1 else value.detach() * weight
        summed[name] = summed[name] + weighted if name in summed else weighted
    return summed
