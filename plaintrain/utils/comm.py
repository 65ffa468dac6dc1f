"""Ranks and the few collectives a training loop needs; everything works without a process group.

Names follow Detectron2's `utils.comm`.
"""

import contextlib
import os
import zlib

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from plaintrain.utils.errors import UserError


def get_world_size():
    """Return the number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank():
    """Return this process' number in the job, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_local_rank():
    """Return this process' number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def get_local_size():
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def is_main_process():
    """Return whether this is rank 0, the one that writes files."""
    return get_rank() == 0


def synchronize():
    """Wait until every rank is here."""
    if get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_on_machine():
    """Let the first rank of a machine run the block before the others, which find what it has cached."""
    if get_local_rank() != 0:
        synchronize()
    yield
    if get_local_rank() == 0:
        synchronize()


def all_gather(data):
    """Return a list of every rank's `data` (any picklable object), on every rank."""
    output = [data] * get_world_size()
    if len(output) > 1:
        dist.all_gather_object(output, data)
    return output


def gather(data, dst=0):
    """Return a list of every rank's `data` (any picklable object) on rank `dst`, else an empty list."""
    if get_world_size() == 1:
        return [data]
    output = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, output, dst=dst)
    return output or []


def broadcast(data, src=0):
    """Return rank `src`'s `data` (any picklable object), on every rank."""
    objects = [data]
    if get_world_size() > 1:
        dist.broadcast_object_list(objects, src=src)
    return objects[0]


def shared_random_seed():
    """Return a random non-negative 31-bit integer, the same on every rank."""
    return broadcast(int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF)


def unwrap_model(model):
    """Return the module inside DistributedDataParallel or DataParallel, or the model itself."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    return model


def all_reduce_max(number):
    """Return the highest integer of all ranks: an all-reduce on the hosts, no device sync."""
    if get_world_size() == 1:
        return int(number)
    tensor = torch.tensor(int(number))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def any_rank(flag):
    """Return whether `flag` is true on any rank: an all-reduce on the hosts, no device sync."""
    return bool(all_reduce_max(bool(flag)))


def check_loss_names(loss_dict):
    """Raise on all ranks if their losses differ, before a backward pass in which they would wait forever.

    The hosts compare a checksum in one small all-reduce; no device sync.
    """
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
    extra = [
        f"{', '.join(sorted(names - common)) or 'none of these'} on rank {rank}"
        for rank, names in enumerate(names_of_ranks)
    ]
    raise UserError(
        f"the model returned different losses on different ranks: {'; '.join(extra)}; return every loss in "
        "every step, as zero where it does not apply"
    )


def reduce_dict(input_dict, average=True):
    """Sum or average a dict of 0-d tensors over all ranks in one all-reduce.

    Args:
        input_dict: name -> 0-d tensor; the same names on every rank.
        average: divide by the number of ranks.

    Returns:
        name -> 0-d tensor, on every rank, in the order of `input_dict`; for a single process
        `input_dict` itself.
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
def average_tensors(tensors):
    """Return the averages over ranks of tensors on one device, in one all-reduce; all ranks call it."""
    tensors = list(tensors)
    if get_world_size() == 1 or not tensors:
        return tensors
    # In float64 the average of equal numbers is that number.
    flat = torch.cat([t.flatten().double() for t in tensors])
    dist.all_reduce(flat)
    flat /= get_world_size()
    averages = flat.split([t.numel() for t in tensors])
    return [average.view_as(t).to(t.dtype) for average, t in zip(averages, tensors, strict=True)]


def get_batch_norms(model):
    """Return the batch norm layers of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def copy_tensors(sources, targets):
    """Copy the values of tensors, a list, into others of the same shapes."""
    if targets:
        torch._foreach_copy_(targets, sources)


@contextlib.contextmanager
def averaged_norm_buffers(model):
    """Average the running statistics of batch norm over ranks within the block; all ranks enter it.

    Ranks see different images and DDP runs with `broadcast_buffers=False`, so the statistics drift apart.
    """
    if get_world_size() == 1:
        yield
        return
    buffers = [b for norm in get_batch_norms(model) for b in (norm.running_mean, norm.running_var)]
    own = [b.clone() for b in buffers]
    copy_tensors(average_tensors(buffers), buffers)
    try:
        yield
    finally:
        copy_tensors(own, buffers)
