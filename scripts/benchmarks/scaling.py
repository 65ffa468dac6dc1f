#!/usr/bin/env python
"""What several processes cost, part by part of an iteration.

python scripts/benchmarks/scaling.py --ranks 1 2 4

It runs iterations of a config's model, on images in memory, in 1, 2, ... gloo processes of this machine. Of
each part it prints the CPU time of a process (all its threads) and its wall time, medians over iterations,
means over processes, and what it sends: calls and bytes of one process. Where processes share cores, wall
times hold the waiting for each other; CPU times do not.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader, declare_datasets
from plaintrain.engine import create_ddp_model
from plaintrain.engine.launch import launch
from plaintrain.engine.preflight import settle_num_classes
from plaintrain.modeling import build_model
from plaintrain.solver import build_optimizer
from plaintrain.solver.accumulation import sum_losses
from plaintrain.utils import comm
from plaintrain.utils.stop import StopSignal

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("stop agreement", "forward", "loss names", "backward", "optimizer", "reduce_dict", "barrier")


def make_cfg(config_file):
    """A config for this measurement: one thread loads, and there are two images a process."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    more = ["SEED", 1, "SOLVER.IMS_PER_BATCH", 2 * comm.get_world_size(), "DATALOADER.NUM_WORKERS", 0]
    cfg.merge_from_list([*more, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    declare_datasets(cfg)
    settle_num_classes(cfg, eval_only=False)
    return cfg


class Clock:
    """CPU and wall time of the parts of an iteration."""

    def __init__(self):
        self.times = defaultdict(list)

    @contextlib.contextmanager
    def part(self, name):
        before = time.process_time(), time.perf_counter()
        yield
        after = time.process_time(), time.perf_counter()
        self.times[name].append([1000 * (b - a) for a, b in zip(before, after, strict=True)])

    def medians(self):
        """{part: [CPU ms, wall ms]}."""
        return {
            n: [statistics.median(column) for column in zip(*t, strict=True)] for n, t in self.times.items()
        }


class Sent:
    """Calls and bytes that a process hands to collectives, by part."""

    def __init__(self):
        self.part, self.calls, self.bytes = "", defaultdict(int), defaultdict(int)

    def add(self, tensor):
        self.calls[self.part] += 1
        self.bytes[self.part] += tensor.numel() * tensor.element_size()

    @contextlib.contextmanager
    def counting(self, model):
        """Count within the block: DDP's buckets by a hook, the others where they are called."""
        if comm.get_world_size() > 1:
            model.register_comm_hook(None, self._bucket)
        before = dist.all_reduce
        dist.all_reduce = lambda tensor, *args, **kwargs: (self.add(tensor), before(tensor, *args, **kwargs))[
            1
        ]
        try:
            yield
        finally:
            dist.all_reduce = before

    def _bucket(self, state, bucket):
        self.add(bucket.buffer())
        return allreduce_hook(dist.group.WORLD, bucket)


def iterate(model, optimizer, samples, stop, part):
    """One iteration as in plain_train_net.py, each part within `part(name)`."""
    with part("stop agreement"):
        stop.requested_on_any_rank()
    optimizer.zero_grad()
    with part("forward"):
        loss_dict = model(samples)
    with part("loss names"):
        comm.check_loss_names(loss_dict)
        losses = sum_losses(loss_dict)
    with part("backward"):
        losses.backward()
    with part("optimizer"):
        optimizer.step()
    with part("reduce_dict"):
        comm.reduce_dict({"total_loss": losses, **loss_dict})
    with part("barrier"):
        comm.synchronize()


def work(args):
    """What each process does: its numbers go to a file of its own."""
    torch.set_num_threads(1)
    cfg = make_cfg(args.config_file)
    torch.manual_seed(comm.get_rank())
    model = create_ddp_model(build_model(cfg).train())
    optimizer = build_optimizer(cfg, model)
    batches = [samples for samples, _ in zip(build_detection_train_loader(cfg), range(4), strict=False)]
    stop, sent = StopSignal(), Sent()
    clock = Clock()
    for i in range(args.iterations + 5):
        if i == 5:
            clock = Clock()
        iterate(model, optimizer, batches[i % 4], stop, clock.part)

    @contextlib.contextmanager
    def named(name):
        sent.part = name
        yield

    with sent.counting(model):
        iterate(model, optimizer, batches[0], stop, named)
    facts = {"times": clock.medians(), "calls": sent.calls, "bytes": sent.bytes}
    Path(args.folder, f"{comm.get_rank()}.json").write_text(json.dumps(facts))


def measure(args):
    """Print a table for each number of processes."""
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {Path(args.config_file).name}, "
        "2 images a process"
    )
    results = {}
    for number in args.ranks:
        with tempfile.TemporaryDirectory() as args.folder:
            launch(work, number, args=(args,))
            ranks = [json.loads(path.read_text()) for path in sorted(Path(args.folder).iterdir())]
        results[number] = ranks
        print(f"\n{number} process{'es' * (number > 1)}    CPU ms   wall ms   calls       bytes")
        for part in PARTS:
            cpu, wall = (statistics.mean(r["times"][part][i] for r in ranks) for i in (0, 1))
            sent = ranks[0]["calls"].get(part, 0), ranks[0]["bytes"].get(part, 0)
            print(f"{part:15} {cpu:9.2f} {wall:9.2f} {sent[0]:7} {sent[1]:11}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--output", help="also write the numbers as JSON to this file")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
