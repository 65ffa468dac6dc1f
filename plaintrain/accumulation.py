"""Gradient accumulation: one optimizer step from a batch that is computed in micro-batches."""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

from plaintrain.utils.errors import UserError


def micro_batches(model, samples, steps):
    """Split a batch into micro-batches whose gradients are summed for one optimizer step.

    Each loss is weighted by its micro-batch's fraction of the images, so for losses that are means over
    images the gradient is that of the whole batch. Losses that a model normalizes over the batch (RPN and
    R-CNN over sampled boxes, FCOS and SSD over objects) are normalized in each micro-batch instead.

    Args:
        model: DistributedDataParallel synchronizes gradients in the backward pass of the last one only.
        samples: list of samples.
        steps: number of micro-batches, of nearly equal size; at most one per image is made.

    Yields:
        (micro_batch, weight, is_last): a list of samples, its fraction of the images, and whether it is
        the last one.
    """
    steps = min(steps, len(samples))
    start = 0
    for step in range(1, steps + 1):
        end = len(samples) * step // steps
        is_last = step == steps
        no_sync = not is_last and isinstance(model, DistributedDataParallel)
        with model.no_sync() if no_sync else contextlib.nullcontext():
            yield samples[start:end], (end - start) / len(samples), is_last
        start = end


def sum_losses(loss_dict):
    """Return the sum of the values whose key contains "loss": 0-d tensors, or what can be added to them.

    Raises:
        UserError: no key contains "loss".
    """
    losses = [value for name, value in loss_dict.items() if "loss" in name]
    if not losses:
        raise UserError(
            f"the model returned nothing to minimise: no key of {sorted(loss_dict)} contains 'loss'"
        )
    if not all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in losses):
        return sum(losses)
    # Two operations, and in the backward pass only views, however many losses there are.
    return torch.stack(losses).sum()


def add_losses(total, scalars, weight):
    """Return `total` plus `weight` times the detached scalars, name by name, as a new dict."""
    summed = dict(total)
    for name, value in scalars.items():
        # An undivided batch costs no operation on the device.
        weighted = value.detach() if weight == 1 else value.detach() * weight
        summed[name] = summed[name] + weighted if name in summed else weighted
    return summed
