"""What the ranks of a `processes.Job` run."""

import argparse
import os
import signal
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from model_helpers import RETINA, TINY, build, make_sample
from processes import save
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from plaintrain.config import get_cfg
from plaintrain.data import cache
from plaintrain.data.cache import load_cached_records
from plaintrain.data.catalog import DatasetCatalog
from plaintrain.data.datasets.coco import read_coco_json
from plaintrain.engine import create_ddp_model, default_setup
from plaintrain.evaluation import compute_validation_losses
from plaintrain.solver.accumulation import add_losses, split_batch, sum_losses, sync_gradients
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

TINY_CONFIG = {
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_tiny_backbone", "FREEZE_AT": 0},
        "TINY": {"CHANNELS": [8], "OUT_CHANNELS": 8},
        "ANCHOR_GENERATOR": {"SIZES": [[16]]},
        "ROI_BOX_HEAD": {"FC_DIM": 8, "POOLER_RESOLUTION": 2},
    },
    "DATASETS": {
        "DECLARE": {
            "engine_tiny_train": {"FORMAT": "shapes", "SPLIT": "train", "NUM": 4},
            "engine_tiny_val": {"FORMAT": "shapes", "SPLIT": "val", "NUM": 2},
        },
        "TRAIN": ("engine_tiny_train",),
        "TEST": ("engine_tiny_val",),
    },
}


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def report(args):
    """Save what this rank knows of itself and of the others."""
    ranks = {"rank": torch.tensor(float(comm.get_rank()))}
    facts = {"rank": comm.get_rank(), "world_size": comm.get_world_size(), "main": comm.is_main_process()}
    facts |= {"local_rank": comm.get_local_rank(), "local_size": comm.get_local_size()}
    save(args, {**facts, "sum": comm.reduce_dict(ranks, average=False)["rank"].item()})


def check_collectives(args):
    """Check what every collective of `comm` returns on this rank of two."""
    rank = comm.get_rank()
    # Other orders on other ranks: the names decide what is added to what.
    losses = {"b": torch.tensor(1.0 + rank), "a": torch.tensor(10.0 * (rank + 1), dtype=torch.float64)}
    losses = losses if rank == 0 else dict(reversed(losses.items()))
    losses["c"] = torch.tensor(3.0 * rank, requires_grad=True)
    mean, total = comm.reduce_dict(losses), comm.reduce_dict(losses, average=False)
    order = ["a", "b", "c"] if rank else ["b", "a", "c"]
    assert list(mean) == list(total) == order
    assert (mean, total) == ({"a": 15.0, "b": 1.5, "c": 1.5}, {"a": 30.0, "b": 3.0, "c": 3.0})
    assert not any(value.requires_grad for value in mean.values())
    assert losses["b"] == 1 + rank and losses["c"].requires_grad
    comm.check_loss_names(losses)

    both = [{"rank": 0, "data": [None, ""]}, {"rank": 1, "data": [None, "x"]}]
    assert comm.all_gather(both[rank]) == both
    assert comm.gather(("rank", rank)) == ([] if rank else [("rank", 0), ("rank", 1)])
    assert comm.gather(rank, dst=1) == ([0, 1] if rank else [])
    assert comm.broadcast({"from": rank}) == {"from": 0} and comm.broadcast(rank, src=1) == 1
    seed = comm.shared_random_seed()
    assert comm.all_gather(seed) == [seed, seed] and seed >= 0
    assert [comm.any_rank(flag) for flag in (False, rank == 0, rank == 1, True)] == [False, True, True, True]


def check_averaged_norms(args):
    """Check that `averaged_norm_buffers` averages the running statistics, and nothing else, in its block."""
    rank = comm.get_rank()
    norms = nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), *norms, nn.Sequential(nn.BatchNorm1d(1)))
    for tensor in model.state_dict().values():
        tensor.fill_(rank + 1)
    norms[0].running_var[1] = 5 * rank
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {"1.running_mean": [1.5, 1.5], "1.running_var": [1.5, 2.5]}
    averages |= {"4.0.running_mean": [1.5], "4.0.running_var": [1.5]}
    averages = {name: torch.tensor(values) for name, values in averages.items()}
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args: (sent.append(args[0].numel()), all_reduce(*args))
    with comm.averaged_norm_buffers(model):
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dist.all_reduce = all_reduce
    torch.testing.assert_close(inside, own | averages)
    # Those of all modules are sent together, and are a rank's own again afterwards.
    assert sent == [6]
    torch.testing.assert_close(dict(model.state_dict()), own)
    with comm.averaged_norm_buffers(nn.Linear(1, 1)):
        comm.synchronize()


def fail(args, ranks, error, waits=False):
    """Raise an error on some ranks, while the others work or wait for them in a collective."""
    if comm.get_rank() in ranks:
        time.sleep(0.3 if waits else 0)
        raise error
    if waits:
        comm.synchronize()
    time.sleep(100)


def rank_0_exits(args):
    if comm.get_rank() == 0:
        os._exit(0)
    comm.synchronize()


def rank_1_is_killed(args):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def wait_for_the_end(args):
    """Touch `ready-N`, then work; rank 0 is the last to feel an interrupt."""
    Path(args.folder, f"ready-{comm.get_rank()}").touch()
    try:
        time.sleep(100)
    finally:
        if comm.is_main_process():
            time.sleep(0.3)


def setup_frozen(args):
    """`default_setup` of a frozen config in the folder of an earlier run; rank 1 reads slowly."""
    if not comm.is_main_process():
        get = DatasetCatalog.get
        DatasetCatalog.get = lambda name: (time.sleep(0.2), get(name))[1]
    output = os.path.join(args.folder, "output")
    cfg = get_cfg()
    cfg.merge_from_other_cfg(TINY_CONFIG)
    cfg.merge_from_list(["OUTPUT_DIR", output, "MODEL.WEIGHTS", os.path.join(output, "model_final.pth")])
    cfg.freeze()
    default_setup(cfg, argparse.Namespace())
    facts = {"seed": cfg.SEED, "classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES, "frozen": cfg.is_frozen()}
    save(args, {**facts, "weights": cfg.MODEL.WEIGHTS})
    Path(args.folder, f"draw-{comm.get_rank()}.txt").write_text(str(torch.rand(()).item()))


def evaluate_a_part(args):
    """Score every other image of `outputs.pt`, beside the folder; save results and what masks take."""
    from plaintrain.data import register_coco_instances
    from plaintrain.evaluation import COCOEvaluator

    folder = Path(args.folder).parent
    register_coco_instances("part", {}, str(folder / "a.json"), "nowhere")
    outputs = torch.load(folder / "outputs.pt")
    evaluator = COCOEvaluator("part")
    sent, gather = [], comm.gather
    comm.gather = lambda data: sent.append(data) or gather(data)
    for image_id in sorted(outputs)[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([{"image_id": image_id}], [outputs[image_id]])
    results = evaluator.evaluate()
    kinds = sorted({type(value).__name__ for value in sent[0].values()})
    save(args, {"results": results, "mask_bytes": sum(map(len, sent[0]["masks"])), "kinds": kinds})


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
    for samples, weight, is_last in split_batch(batch, steps):
        with sync_gradients(model, is_last):
            loss_dict = model(samples)
            losses = sum_losses(loss_dict)
            (losses * weight).backward()
        totals = add_losses(totals, {"total_loss": losses, **loss_dict}, weight)
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


def step_with_losses(args, names):
    """Take a step for which the model returns losses of these names on each rank."""
    layer = nn.Linear(2, 1)
    try:
        loss_dict = {name: layer(torch.ones(1, 2)).sum() for name in names[comm.get_rank()]}
        comm.check_loss_names(loss_dict)
        total = sum_losses(loss_dict)
    except UserError as e:
        save(args, str(e))
        raise
    total.backward()
    Path(args.folder, f"backward-{comm.get_rank()}").touch()


def validate(args):
    """The validation losses over both ranks' images, of which rank 0 has more."""
    batch = make_batch(7)
    own = batch[5:] if comm.get_rank() else batch[:5]
    loader = [own[:2], own[2:4], own[4:]] if len(own) > 2 else [own]
    save(args, compute_validation_losses(create_ddp_model(make_retinanet()), [loader]))


def validate_on_rank_0_only(args):
    """As when there are fewer images than ranks."""
    loader = [make_batch(2)] if comm.is_main_process() else []
    save(args, compute_validation_losses(make_retinanet(), [loader]))


def read_through_cache(args):
    """Which ranks parse `args.folder`/instances.json, and what each reads of it."""
    parsed = []

    def load(*arguments):
        parsed.append(arguments)
        return read_coco_json(*arguments)

    cache._MIN_BYTES = 0
    with comm.first_on_machine():
        records, _ = load_cached_records(load, str(Path(args.folder, "instances.json")), "images")
    save(args, {"parsed": len(parsed), "boxes": [a["bbox"] for r in records for a in r["annotations"]]})
