"""Count on the CPU the device syncs that a training step would have on a GPU."""

import collections
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import boxes as box_ops

from plaintrain.modeling import poolers

# Operators whose output shape, or whose caller, needs a value from the device.
_SYNCS = {
    "_local_scalar_dense", "is_nonzero", "item", "nonzero", "nonzero_numpy", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "equal", "repeat_interleave", "histc",
}  # fmt: skip
# Methods that copy to the host; on the CPU they call no operator.
_COPIES = {"tolist", "numpy", "cpu", "__array__"}


def _is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class SyncCounter(TorchDispatchMode):
    """Counter of sync points, active within the context.

    Attributes:
        counts: calls by operator, backward included; `lift_fresh` counts uploads (tensors made of Python
            numbers) and `nms` torchvision's NMS.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in _SYNCS or name in ("lift_fresh", "nms"):
            self.counts[name] += 1
        elif name == "index" and any(map(_is_mask, args[1])):
            self.counts["index by mask"] += 1
        elif name in ("index_put", "index_put_", "_index_put_impl_") and any(map(_is_mask, args[1])):
            # A scalar is written with the mask as it is, without indices.
            self.counts["index_put by mask"] += args[2].numel() != 1
        return func(*args, **(kwargs or {}))


class _CopyCounter(TorchFunctionMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _COPIES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_syncs(step: Callable[[], object]) -> dict[str, Any]:
    """Call `step` and return its counts: `syncs`, `uploads`, `nms` and `by kind`, a Counter.

    NMS and RoIAlign take the code path of a GPU; a call of NMS counts once, without the syncs inside it.
    """
    counter = SyncCounter()
    trick = box_ops._batched_nms_coordinate_trick

    def batched_nms(*args):
        before = dict(counter.counts)
        keep = trick(*args)
        counter.counts.clear()
        counter.counts.update(before)
        counter.counts["nms"] += 1
        return keep

    paths: dict[str, Any] = {
        "_batched_nms_vanilla": batched_nms,
        "_batched_nms_coordinate_trick": batched_nms,
    }
    gpu = mock.patch.object(poolers, "_uses_embedding_bag", return_value=False)
    with mock.patch.multiple(box_ops, **paths), gpu, counter, _CopyCounter(counter.counts):
        step()
    counts = +counter.counts
    apart = counts["lift_fresh"] + counts["nms"]
    return {
        "syncs": sum(counts.values()) - apart,
        "uploads": counts["lift_fresh"],
        "nms": counts["nms"],
        "by kind": counts,
    }


def training_step(model: nn.Module, *inputs: Any) -> Callable[[], None]:
    """Return a function that runs forward and backward."""

    def step():
        sum(model(*inputs).values()).backward()

    return step
