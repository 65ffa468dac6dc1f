"""Ranks and collectives, as in Detectron2's `utils.comm`; without a process group they are no-ops."""

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from plaintrain.utils.errors import UserError


def get_world_size() -> int:
    """Return the number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def get_local_size() -> int:
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes the files."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait for all ranks."""
    if get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Run the block on local rank 0 before the other ranks, which then use the files that it has cached."""
    if get_local_rank() != 0:
        synchronize()
    yield
    if get_local_rank() == 0:
        synchronize()


def all_gather(data: Any) -> list[Any]:
    """Return the `data` (any picklable object) of all ranks, on every rank."""
    output = [data] * get_world_size()
    if len(output) > 1:
        dist.all_gather_object(output, data)
    return output


def gather(data: Any, dst: int = 0) -> list[Any]:
    """Return the `data` (any picklable object) of all ranks on rank `dst`, and [] on the others."""
    if get_world_size() == 1:
        return [data]
    output: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, output, dst=dst)
    return output or []


def broadcast(data: Any, src: int = 0) -> Any:
    """Return the `data` (any picklable object) of rank `src`, on every rank."""
    objects = [data]
    if get_world_size() > 1:
        dist.broadcast_object_list(objects, src=src)
    return objects[0]


def shared_random_seed() -> int:
    """Return a random non-negative 31-bit integer, the same on every rank."""
    return broadcast(int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel or DataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel | DataParallel) else model


def all_reduce_max(value: int) -> int:
    """Return the maximum over ranks; an all-reduce over gloo, no device sync."""
    if get_world_size() == 1:
        return int(value)
    tensor = torch.tensor(int(value))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def any_rank(flag: bool | Tensor) -> bool:
    """Return whether `flag` is true on any rank; an all-reduce over gloo."""
    return bool(all_reduce_max(bool(flag)))


def check_loss_names(loss_dict: dict[str, Tensor]) -> None:
    """Raise on all ranks if their loss names differ (backward() would deadlock); an all-reduce over gloo."""
    if get_world_size() == 1:
        return
    names = sorted(loss_dict)
    checksum = zlib.crc32("\n".join(names).encode())
    extremes = torch.tensor([checksum, -checksum])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum() == 0:
        return
    names_of_ranks = [set(names) for names in all_gather(names)]
    common = set.intersection(*names_of_ranks)
    extra = (", ".join(sorted(names - common)) or "none of these" for names in names_of_ranks)
    differences = "; ".join(f"{names} on rank {rank}" for rank, names in enumerate(extra))
    raise UserError(
        f"the model returned different losses on different ranks: {differences}; return every loss in every "
        "step, as zero where it does not apply"
    )


def reduce_dict(input_dict: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Return the means (or sums) over ranks of 0-d tensors, on every rank, in one all-reduce.

    The names must be the same on every rank. A single process gets `input_dict` itself.
    """
    if get_world_size() == 1 or not input_dict:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name].detach().float() for name in names])
    dist.all_reduce(values)
    if average:
        values /= get_world_size()
    reduced = dict(zip(names, values.unbind(), strict=True))
    return {name: reduced[name] for name in input_dict}


@torch.no_grad()
def average_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the means over ranks of tensors on one device, in one all-reduce."""
    tensors = list(tensors)
    if get_world_size() == 1 or not tensors:
        return tensors
    # In float64, the mean of equal numbers is exactly that number.
    flat = torch.cat([t.flatten().double() for t in tensors])
    dist.all_reduce(flat)
    flat /= get_world_size()
    averages = flat.split([t.numel() for t in tensors])
    return [average.view_as(t).to(t.dtype) for average, t in zip(averages, tensors, strict=True)]


def get_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norm layers that track running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def copy_tensors(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors in place into targets of the same shapes."""
    if targets:
        torch._foreach_copy_(targets, sources)


@contextlib.contextmanager
def averaged_norm_buffers(model: nn.Module) -> Iterator[None]:
    """Average the statistics of batch norm over ranks within the block, since DDP does not broadcast them."""
    if get_world_size() == 1:
        yield
        return
    names = ("running_mean", "running_var")
    buffers = [norm.get_buffer(name) for norm in get_batch_norms(model) for name in names]
    own = [buffer.clone() for buffer in buffers]
    copy_tensors(average_tensors(buffers), buffers)
    try:
        yield
    finally:
        copy_tensors(own, buffers)
