"""How long a save blocks the training loop, and the time of a resume over that of reading the file.

The state is that of Faster R-CNN R50-FPN with SGD, 330 MB; the baseline is `torch.save` and fsync. An
asynchronous save (SOLVER.ASYNC_CHECKPOINT) blocks the loop while it copies to host memory, and slows down the
next steps. Both count: the time of a save and the steps after it, minus that of as many steps alone. The
first save, which creates the files and the host buffers, is not measured. Times are wall times, since the
disk dominates: run it on an idle machine, on the disk of the runs (--folder).
"""

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from shared.measure import (
    Results,
    Table,
    in_turns,
    make_rows,
    parse_args,
    positive,
    report,
    run,
    target,
    timed,
)
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.files import read_checkpoint
from plaintrain.config import get_cfg
from plaintrain.data.loader import TrainLoader
from plaintrain.data.samplers import TrainingSampler
from plaintrain.modeling import build_model
from plaintrain.solver import build_lr_scheduler, build_optimizer

ALONE = "steps alone"
PLAIN = "torch.save, fsync"
OURS = "plaintrain"
ASYNC = "plaintrain, ASYNC_CHECKPOINT"


def make_state(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], Callable[[], None]]:
    """Return (model, {name: other state}, function that imitates a step)."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.DEVICE", args.device])
    if args.quick:
        cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.BACKBONE.FREEZE_AT", 0])
        cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.ROI_BOX_HEAD.FC_DIM", 16])
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    others = {"optimizer": optimizer, "scheduler": build_lr_scheduler(cfg, optimizer)}
    matrix = torch.randn(512, 512)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        """Imitate a step on the host: arithmetic, and a change of all parameters."""
        for _ in range(20):
            matrix @ matrix
        with torch.no_grad():
            torch._foreach_add_(parameters, 1e-6)
        if args.device != "cpu":
            torch.cuda.synchronize()

    step()
    return model, others, step


def save_plainly(path: str, model: nn.Module, others: dict[str, Any]) -> None:
    """Call torch.save and fsync."""
    states = {"model": model.state_dict(), **{name: item.state_dict() for name, item in others.items()}}
    with open(path, "wb") as f:
        torch.save(states, f)
        f.flush()
        os.fsync(f.fileno())


def measure_saves(
    folder: str,
    args: argparse.Namespace,
    model: nn.Module,
    others: dict[str, Any],
    step: Callable[[], object],
) -> Results:
    """Measure the time that saves block the loop; each save overwrites the last."""
    savers = {
        name: DetectionCheckpointer(model, os.path.join(folder, name), asynchronous=name == ASYNC, **others)
        for name in (OURS, ASYNC)
    }
    saves = {
        ALONE: lambda: None,
        PLAIN: lambda: save_plainly(os.path.join(folder, "plain.pth"), model, others),
        **{name: functools.partial(saver.save, "model", iteration=0) for name, saver in savers.items()},
    }

    def seconds(name):
        def run():
            saves[name]()
            for _ in range(args.steps):
                step()

        taken = timed(run, perf_counter)()
        for saver in savers.values():
            saver.wait()
        return taken

    times = in_turns({name: functools.partial(seconds, name) for name in saves}, args.repeats)
    table = make_rows(times, 1e3)
    blocked = {}
    for name in (PLAIN, OURS, ASYNC):
        difference = statistics.median(v - alone for v, alone in zip(times[name], times[ALONE], strict=True))
        # Noise can make the difference 0 or negative.
        blocked[name] = max(difference, 1e-6)
        ratio = blocked[PLAIN] / blocked[name]
        table[name] |= {"held up": blocked[name] * 1e3, "held up, times less": ratio}
    size = os.path.getsize(os.path.join(folder, "plain.pth")) / 1e6
    least = 2.5 if args.device == "cpu" else 8
    wanted = target(f"a save holds the loop up: times less, {ASYNC}", least, blocked[PLAIN] / blocked[ASYNC])
    return {f"a save of {size:.0f} MB and {args.steps} steps, wall ms": table}, [wanted]


def measure_resume(
    folder: str, args: argparse.Namespace, model: nn.Module, others: dict[str, Any]
) -> dict[str, Table]:
    """Measure reading the file, a resume, and starting the loader at iteration 1,000,000."""
    checkpointer = DetectionCheckpointer(model, os.path.join(folder, "resume"), **others)
    checkpointer.save("model_0999999", iteration=999_999)
    path = checkpointer.get_checkpoint_file()
    groups = torch.rand(118_000).numpy()

    def enter():
        # A new sampler has no order of an epoch in its cache.
        sampler = TrainingSampler(118_000, 16, seed=0, groups=groups, window=100)
        next(iter(TrainLoader(range(118_000), lambda record, rng: record, sampler, start_iter=1_000_000)))

    calls = {
        "reading the file": lambda: read_checkpoint(path),
        "resume_or_load": lambda: checkpointer.resume_or_load(""),
        "entering a stream of 118,000 images": enter,
    }
    times = in_turns({name: timed(f, perf_counter) for name, f in calls.items()}, args.repeats)
    return {"a resume, wall ms": make_rows(times, 1e3)}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("checkpoint", description=__doc__)
    parser.add_argument("--folder", help="disk to measure (default: a temporary folder)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=positive, default=10, help="after each save")
    args = parse_args(parser, repeats=7, quick={"steps": 1})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, others, step = make_state(args)
        tables, wanted = measure_saves(folder, args, model, others, step)
        tables |= measure_resume(folder, args, model, others)
    report(args, tables, wanted)


if __name__ == "__main__":
    run(main)
