"""What the ranks of a `launch_helpers.Job` run where a training step is tested, and the step itself."""

from pathlib import Path

import torch
import torch.distributed as dist
from launch_helpers import save
from model_helpers import RETINA, TINY, build, make_sample
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from plaintrain.accumulation import add_scaled, split_batch, sum_losses
from plaintrain.data import cache
from plaintrain.data.cache import cached_records
from plaintrain.data.coco import load_coco_json
from plaintrain.ema import ModelEMA
from plaintrain.engine import create_ddp_model
from plaintrain.evaluation import validation_losses
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


def make_batch(number, size=64):
    """Samples of one size with 0, 1, 2, 0, ... objects."""
    boxes = [[3, 4, 40, 50], [30, 10, 60, 60]]
    return [make_sample(size, size, boxes[: i % 3], [0, 2][: i % 3], seed=i) for i in range(number)]


def make_retinanet():
    """A RetinaNet; its losses are means over images."""
    return build(*TINY, *RETINA)


def backward_in_parts(model, batch, steps):
    """The losses of a batch, after backward, as the training loop computes them."""
    totals = {}
    for samples, share, context in split_batch(model, batch, steps):
        with context:
            loss_dict = model(samples)
        losses = sum_losses(loss_dict)
        (losses * share).backward()
        totals = add_scaled(totals, {"total_loss": losses, **loss_dict}, share)
    return totals


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def accumulate(args):
    """Gradients, losses and gradient all-reduces of this rank's half of a batch, whole and in parts."""
    sent = []

    def count(state, bucket):
        sent.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    model = create_ddp_model(make_retinanet())
    model.register_comm_hook(None, count)
    batch = make_batch(8)[comm.get_rank() :: 2]
    facts = {}
    for steps in (1, 1, 3):
        # The first backward settles DDP's buckets.
        sent.clear()
        model.zero_grad()
        losses = comm.reduce_dict(backward_in_parts(model, batch, steps))
        facts[steps] = {name: value.item() for name, value in losses.items()}
        torch.save(gradients(model), Path(args.folder, f"{steps}-{comm.get_rank()}.pt"))
        facts[f"sent {steps}"] = len(sent)
    save(args, facts)


def other_losses_on_rank_1(args):
    """Rank 1 lacks a loss, and has one that rank 0 lacks."""
    layer = nn.Linear(2, 1)
    losses = {name: layer(torch.ones(1, 2)).sum() for name in ("loss_cls", "loss_box")}
    if comm.get_rank() == 1:
        losses["loss_mask"] = losses.pop("loss_box")
    _step(args, losses)


def a_loss_too_few_on_rank_1(args):
    """As a mask head would do that returns nothing for a batch without objects."""
    layer = nn.Linear(2, 1)
    names = ("loss_cls", "accuracy", "loss_mask")[: 3 - comm.get_rank()]
    _step(args, {name: layer(torch.ones(1, 2)).sum() for name in sorted(names)})


def no_loss_on_rank_1(args):
    layer = nn.Linear(2, 1)
    _step(args, {("accuracy" if comm.get_rank() else "loss"): layer(torch.ones(1, 2)).sum()})


def no_loss_at_all(args):
    _step(args, {"accuracy": nn.Linear(2, 1)(torch.ones(1, 2)).sum()})


def _step(args, losses):
    try:
        total = sum_losses(losses)
    except UserError as e:
        save(args, str(e))
        raise
    total.backward()
    Path(args.folder, f"backward-{comm.get_rank()}").touch()


def agree(args):
    """Save what the smaller collectives of `comm` give on this rank."""
    rank = comm.get_rank()
    flags = [comm.any_rank(flag) for flag in (False, rank == 0, rank == 1, True)]
    names = ("loss_a", "accuracy", "loss_b")
    comm.check_loss_names(dict.fromkeys(names if rank else reversed(names)))
    one, other = nn.BatchNorm1d(1), nn.Sequential(nn.BatchNorm1d(1))
    one.running_mean.fill_(rank)
    other[0].running_mean.fill_(10 + 4 * rank)
    collectives, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args: (collectives.append(args[0].numel()), all_reduce(*args))
    comm.average_buffers(one, other, one)
    means = [one.running_mean.item(), other[0].running_mean.item()]
    save(args, {"flags": flags, "means": means, "averaged": collectives})


def average_a_wrapped_model(args):
    """The averaged weights of a model in DistributedDataParallel, whose ranks begin unlike."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0 + comm.get_rank())
    model = create_ddp_model(layer)
    ema = ModelEMA(model, decay=0.5, warmup=False)
    for _ in range(2):
        ema.update()
        layer.weight.data += 1
    own = type(ema.module).__name__, ema.module.weight.item()
    save(args, {"names": sorted(ema.state_dict()), "own": own, "wrapped": isinstance(model, type(layer))})


def validate(args):
    """The validation losses over both ranks' images, of which rank 0 has more."""
    batch = make_batch(7)
    own = batch[5:] if comm.get_rank() else batch[:5]
    loader = [own[:2], own[2:4], own[4:]] if len(own) > 2 else [own]
    save(args, validation_losses(create_ddp_model(make_retinanet()), [loader]))


def validate_on_rank_0_only(args):
    """As when there are fewer images than ranks."""
    loader = [make_batch(2)] if comm.is_main_process() else []
    save(args, validation_losses(make_retinanet(), [loader]))


def read_through_cache(args):
    """Which ranks parse `args.folder`/instances.json, and what each reads of it."""
    parsed = []

    def load(*arguments):
        parsed.append(arguments)
        return load_coco_json(*arguments)

    cache._LEAST_BYTES = 0
    with comm.first_on_machine():
        records, _ = cached_records(load, str(Path(args.folder, "instances.json")), "images")
    save(args, {"parsed": len(parsed), "boxes": [a["bbox"] for r in records for a in r["annotations"]]})
