#!/usr/bin/env python
"""What several processes cost, part by part of an iteration, and a model of what many GPUs would give.

python scripts/benchmarks/scaling.py measure --ranks 1 2 4
python scripts/benchmarks/scaling.py model
python scripts/benchmarks/scaling.py model --step 0.06 --host-ms 30

`measure` runs iterations of a config's model, on images in memory, in 1, 2, ... gloo processes of this
machine. Of each part it prints the CPU time of a process (all its threads) and its wall time, medians over
iterations, means over processes, and what it sends: calls and bytes of one process. Where processes share
cores, wall times hold the waiting for each other; CPU times do not.
`model` computes images per second on 8 to 512 GPUs from its arguments; docs/SCALING.md says how.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
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
from plaintrain.engine.preflight import build_meta_model, settle_num_classes
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


def gradient_bytes(config_file):
    """Bytes of the gradients that each step sends, and those of DDP's last bucket, which nothing hides."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 80])
    sizes = [4 * p.numel() for p in build_meta_model(cfg).parameters() if p.requires_grad]
    # Buckets are filled from the last parameter on: of 1 MiB the first, of 25 MiB the others.
    bucket, limit = 0, 2**20
    for size in reversed(sizes):
        if bucket >= limit:
            bucket, limit = 0, 25 * 2**20
        bucket += size
    return sum(sizes), bucket


def ring_seconds(size, gpus, link):
    """A ring all-reduce of `size` bytes: 2 (n - 1) / n of them over the slowest link, and 2 (n - 1) hops."""
    bandwidth, hop = link
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * hop


def step_seconds(args, gpus, nic, sizes):
    """(seconds of a step, what bounds it)."""
    hosts = math.ceil(gpus / args.gpus_per_host)
    inside = (args.nvlink * 1e9, 2e-6)
    # The ring leaves each host once; all of its network cards together carry it.
    link = inside if hosts == 1 else (args.efficiency * nic * 1e9 / 8, 1e-6 * args.hop_us)
    total, last = (ring_seconds(size, gpus, link) for size in sizes)
    hidden = args.overlap * args.step * 2 / 3
    exposed = max(total - hidden, last)
    slowest = 1 + args.spread * math.sqrt(2 * math.log(gpus))
    device = args.step * slowest + exposed
    # Two agreements of the hosts, by gloo's ring over TCP.
    host = args.host_ms / 1000 + 2 * 2 * (gpus - 1) * args.tcp_us * 1e-6
    # A host's images for a step, at what its cores load.
    loader = min(gpus, args.gpus_per_host) * args.images / (args.loader * args.cores)
    times = {"device": device, "hosts": host, "loader": loader}
    if exposed > 0.2 * args.step:
        times["network"] = times.pop("device")
    bound = max(times, key=times.get)
    return times[bound], bound


def model(args):
    """Print the table of the model."""
    sizes = gradient_bytes(args.config_file)
    print(f"gradients {sizes[0] / 1e6:.1f} MB a step, {sizes[1] / 1e6:.1f} MB in the last bucket")
    one = args.images / args.step
    print(f"one GPU {one:.1f} images/s; images/s, share of linear, bound by:")
    print("GPUs   batch  " + "".join(f"{f'{nic} Gbit/s a host':>24}" for nic in args.nic))
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        row = f"{gpus:4}   {gpus * args.images:5}  "
        for nic in args.nic:
            seconds, bound = step_seconds(args, gpus, nic, sizes)
            rate = gpus * args.images / seconds
            row += f"{rate:10.0f} {rate / one / gpus:4.0%} {bound:>8}"
        print(row)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--config-file", default=str(ROOT / "configs" / "quickstart.yaml"))
    one.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    one.add_argument("--iterations", type=int, default=30)
    one.add_argument("--output", help="also write the numbers as JSON to this file")
    two = commands.add_parser("model")
    two.add_argument(
        "--config-file", default=str(ROOT / "configs" / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml")
    )
    two.add_argument("--nic", type=float, nargs="+", default=[25, 50, 100, 400], help="Gbit/s of a host")
    for name, value, what in (
        ("step", 0.2, "seconds of a step on one GPU alone"),
        ("images", 2, "images a GPU"),
        ("gpus-per-host", 8, "GPUs of a host"),
        ("nvlink", 150.0, "GB/s of a ring inside a host"),
        ("efficiency", 0.8, "share of the network's rate that a ring reaches"),
        ("hop-us", 8.0, "microseconds of a hop of the ring between GPUs"),
        ("tcp-us", 30.0, "microseconds of a hop of gloo's ring between hosts' processes"),
        ("overlap", 0.7, "share of backward, two thirds of a step, in which gradients are sent"),
        ("spread", 0.03, "standard deviation of a rank's step, as a share of it"),
        ("host-ms", 50.0, "ms that Python needs to launch a step"),
        ("loader", 55.0, "images/s that a core loads"),
        ("cores", 64, "cores of a host"),
    ):
        two.add_argument(f"--{name}", type=type(value), default=value, help=f"{what} (default {value})")
    args = parser.parse_args()
    {"measure": measure, "model": model}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
