#!/usr/bin/env python
"""Cost of several processes, per phase of an iteration.

python scripts/benchmarks/scaling.py --ranks 1 2 4

Runs iterations of a config's model, on images in memory, in 1, 2, ... gloo processes of this machine. Prints
the CPU time of a process (all threads) and the wall time of each phase, medians over iterations, means over
processes, and the calls and bytes of its collectives in one process. Where processes share cores, wall times
include waiting for each other; CPU times do not.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from shared.measure import parse_args, positive, report, run
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from plaintrain.config import CfgNode, get_cfg
from plaintrain.data import build_detection_train_loader, declare_datasets
from plaintrain.engine import create_ddp_model
from plaintrain.engine.launch import launch
from plaintrain.engine.preflight import resolve_num_classes
from plaintrain.modeling import build_model
from plaintrain.solver import build_optimizer
from plaintrain.solver.accumulation import sum_losses
from plaintrain.utils import comm
from plaintrain.utils.stop import StopSignal

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
_WARM_UP = 5


def make_cfg(config_file: str) -> CfgNode:
    """Return the config, with two images per process and without loader workers."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    opts = ["SEED", 1, "SOLVER.IMS_PER_BATCH", 2 * comm.get_world_size(), "DATALOADER.NUM_WORKERS", 0]
    cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    declare_datasets(cfg)
    resolve_num_classes(cfg, eval_only=False)
    return cfg


class PhaseTimer:
    """CPU and wall times of the phases of an iteration, and the bytes that they pass to collectives."""

    def __init__(self) -> None:
        self.name = ""
        self.times: dict[str, list[list[float]]] = defaultdict(list)
        self.sent: dict[str, list[int]] = defaultdict(list)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.name = name
        before = (time.process_time(), time.perf_counter())
        yield
        after = (time.process_time(), time.perf_counter())
        self.times[name].append([1000 * (b - a) for a, b in zip(before, after, strict=True)])

    def count_bucket(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Count the bytes of a DDP bucket, as a communication hook."""
        self.sent[self.name].append(bucket.buffer().nbytes)
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def count_all_reduce(
        self, tensor: Tensor, *args: Any, all_reduce: Callable[..., Any] = dist.all_reduce, **kwargs: Any
    ) -> Any:
        self.sent[self.name].append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    def summarize(self) -> dict[str, list[float]]:
        """Return {phase: [CPU ms, wall ms, calls, bytes]}; times are medians, without the last iteration."""
        summary = {}
        for name, times in self.times.items():
            medians = map(statistics.median, zip(*times[_WARM_UP:-1], strict=True))
            summary[name] = [*medians, len(self.sent[name]), sum(self.sent[name])]
        return summary


def iterate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: list[dict[str, Any]],
    stop: StopSignal,
    phase: Callable[[str], contextlib.AbstractContextManager],
) -> None:
    """Run an iteration as in plain_train_net.py, each phase within `phase(name)`."""
    with phase("stop agreement"):
        stop.requested_on_any_rank()
    optimizer.zero_grad()
    with phase("forward"):
        loss_dict = model(samples)
    with phase("loss names"):
        comm.check_loss_names(loss_dict)
        losses = sum_losses(loss_dict)
    with phase("backward"):
        losses.backward()
    with phase("optimizer"):
        optimizer.step()
    with phase("reduce_dict"):
        comm.reduce_dict({"total_loss": losses, **loss_dict})
    with phase("barrier"):
        comm.synchronize()


def work(args: argparse.Namespace) -> None:
    """Measure in one process, and write the numbers to its own file."""
    torch.set_num_threads(1)
    cfg = make_cfg(args.config_file)
    torch.manual_seed(comm.get_rank())
    model = create_ddp_model(build_model(cfg).train())
    optimizer = build_optimizer(cfg, model)
    batches = list(itertools.islice(build_detection_train_loader(cfg), 4))
    stop = StopSignal()
    timer = PhaseTimer()
    for i in range(_WARM_UP + args.iterations):
        iterate(model, optimizer, batches[i % 4], stop, timer.measure)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, timer.count_bucket)
    with mock.patch.object(dist, "all_reduce", timer.count_all_reduce):
        iterate(model, optimizer, batches[0], stop, timer.measure)
    Path(args.folder, f"{comm.get_rank()}.json").write_text(json.dumps(timer.summarize()))


def main() -> None:
    """Measure each number of processes and report."""
    parser = argparse.ArgumentParser("scaling", description=__doc__)
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--iterations", type=positive, default=30)
    args = parse_args(parser, repeats=None, quick={"iterations": 2, "ranks": [1, 2]})
    tables = {}
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as args.folder:
            launch(work, num_ranks, args=(args,))
            ranks = [json.loads(path.read_text()) for path in sorted(Path(args.folder).iterdir())]
        table = {}
        for name, (_, _, calls, num_bytes) in ranks[0].items():
            cpu, wall = (statistics.mean(rank[name][i] for rank in ranks) for i in (0, 1))
            table[name] = {"CPU ms": cpu, "wall ms": wall, "calls": calls, "bytes": num_bytes}
        tables[f"{num_ranks} process{'es' if num_ranks > 1 else ''}, 2 images each"] = table
    report(args, tables, [])


if __name__ == "__main__":
    run(main)
