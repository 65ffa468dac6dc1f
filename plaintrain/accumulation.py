"""One optimizer step from a batch that is computed in parts."""

import contextlib
import itertools

import torch
from torch.nn.parallel import DistributedDataParallel

from plaintrain.utils import comm


def split_batch(model, batch, steps):
    """The parts of a batch whose gradients are added up for one optimizer step.

    Each part's losses count by its share of the images, so that for losses that are means over images
    the sum of the gradients is that of the whole batch. Losses that a model normalises over the batch
    (RPN and R-CNN over sampled boxes, FCOS and SSD over objects) are normalised in each part instead.

    Args:
        model: DistributedDataParallel sends gradients only with the last part.
        batch: list of samples.
        steps: number of parts, nearly equal; at most as many as images.

    Yields:
        (part, share, context): the samples, their share of the batch, and what the forward pass is to
        run under.
    """
    steps, number = min(steps, len(batch)), len(batch)
    cuts = [number * i // steps for i in range(steps + 1)]
    for start, end in itertools.pairwise(cuts):
        waits = end < number and isinstance(model, DistributedDataParallel)
        context = model.no_sync() if waits else contextlib.nullcontext()
        yield batch[start:end], (end - start) / number, context


def sum_losses(loss_dict):
    """The sum of the values whose key contains "loss": 0-d tensors, or what can be added to them.

    Raises:
        UserError: there is none, or the ranks have different keys; see `comm.check_loss_names`.
    """
    comm.check_loss_names(loss_dict)
    losses = [value for name, value in loss_dict.items() if "loss" in name]
    if not all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in losses):
        return sum(losses)
    # Two operations, and in the backward pass only views, however many losses there are.
    return torch.stack(losses).sum()


def scaled(value, share):
    """`share` times a tensor; at 1 the tensor itself, which is an operation less, and one less backward."""
    return value if share == 1 else value * share


def add_scaled(total, scalars, share):
    """`total` plus `share` times the scalars, name by name; a new dict."""
    if share == 1:
        return {**total, **scalars}
    parts = {name: value.detach() * share for name, value in scalars.items()}
    return total | {name: total.get(name, 0) + value for name, value in parts.items()}
