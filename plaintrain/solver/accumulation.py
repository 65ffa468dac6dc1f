"""Gradient accumulation: one optimizer step from a batch that is computed in micro-batches."""

import contextlib
import itertools

import torch
from torch.nn.parallel import DistributedDataParallel

from plaintrain.utils.errors import UserError


def split_batch(samples, steps):
    """Split a batch into micro-batches whose gradients are summed for one optimizer step.

    Each loss is weighted by its micro-batch's fraction of the images, so for losses that are means over
    images the gradient is that of the whole batch. Losses that a model normalizes over the batch (RPN and
    R-CNN over sampled boxes, FCOS and SSD over objects) are normalized in each micro-batch instead.

    Returns:
        List of at most `steps` tuples (micro_batch, weight, is_last): a list of samples, its fraction of the
        images, and whether it is the last one.
    """
    steps = min(steps, len(samples))
    ends = [len(samples) * step // steps for step in range(steps + 1)]
    return [
        (samples[start:end], (end - start) / len(samples), end == len(samples))
        for start, end in itertools.pairwise(ends)
    ]


def sync_gradients(model, enabled):
    """Return a context for forward and backward: whether DDP averages the gradients over ranks."""
    is_ddp = isinstance(model, DistributedDataParallel)
    return model.no_sync() if is_ddp and not enabled else contextlib.nullcontext()


def sum_losses(loss_dict):
    """Return the sum of the values whose key contains "loss": 0-d tensors, or what can be added to them."""
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
