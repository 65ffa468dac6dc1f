"""How long saving holds up a training, and what a resume costs beside reading the file.

The state is that of Faster R-CNN R50-FPN with SGD, 330 MB. The baseline is `torch.save` and fsync. A save in
the background (SOLVER.ASYNC_CHECKPOINT) holds the loop up for the copy to the host's memory, and the steps
beside it are slower; both are counted: the time of a save and the steps after it, less that of as many steps
without one. A first save, which makes the files and the memory of the copy, does not count. Wall time, for
what is waited for is the disk: measure where nothing else runs, on the disk of the runs (--folder).
"""

import argparse
import os
import statistics
import tempfile
from time import perf_counter

import torch
from shared.measure import in_turns, make_rows, parse_args, positive, report, run, target, timed

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.files import read_checkpoint
from plaintrain.config import get_cfg
from plaintrain.data.loader import TrainLoader
from plaintrain.data.samplers import TrainingSampler
from plaintrain.modeling import build_model
from plaintrain.solver import build_lr_scheduler, build_optimizer

ALONE, PLAIN = "steps alone", "torch.save, fsync"
OURS, ASYNC = "plaintrain", "plaintrain, ASYNC_CHECKPOINT"


def make_state(args):
    """(model, {name: what else is saved}, a function that takes a step) of a training."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.DEVICE", args.device])
    if args.quick:
        cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.BACKBONE.FREEZE_AT", 0])
        cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.ROI_BOX_HEAD.FC_DIM", 16])
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    parts = {"optimizer": optimizer, "scheduler": build_lr_scheduler(cfg, optimizer)}
    work, parameters = torch.randn(512, 512), [p for p in model.parameters() if p.requires_grad]

    def step():
        """What a step does on the host, roughly: arithmetic, and a change of all that is saved."""
        for _ in range(20):
            work @ work
        with torch.no_grad():
            torch._foreach_add_(parameters, 1e-6)
        if args.device != "cpu":
            torch.cuda.synchronize()

    step()
    return model, parts, step


def save_plainly(path, model, parts):
    """torch.save, and what makes sure that the file is on the disk."""
    states = {"model": model.state_dict(), **{name: part.state_dict() for name, part in parts.items()}}
    with open(path, "wb") as f:
        torch.save(states, f)
        f.flush()
        os.fsync(f.fileno())


def measure_saves(folder, args, model, parts, step):
    """({title: rows}, targets) of what saves hold up; files are written in turns, one over the other."""
    savers = {
        name: DetectionCheckpointer(model, os.path.join(folder, name), asynchronous=name == ASYNC, **parts)
        for name in (OURS, ASYNC)
    }
    saves = {
        ALONE: lambda: None,
        PLAIN: lambda: save_plainly(os.path.join(folder, "plain.pth"), model, parts),
        **{name: lambda s=saver: s.save("model", iteration=0) for name, saver in savers.items()},
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

    times = in_turns({name: lambda n=name: seconds(n) for name in saves}, args.repeats)
    rows, held = make_rows(times, 1e3), {}
    for name in (PLAIN, OURS, ASYNC):
        over = statistics.median(v - alone for v, alone in zip(times[name], times[ALONE], strict=True))
        # Noise may make a difference of nothing.
        held[name] = max(over, 1e-6)
        rows[name] |= {"held up": held[name] * 1e3, "held up, times less": held[PLAIN] / held[name]}
    size = os.path.getsize(os.path.join(folder, "plain.pth")) / 1e6
    least = 2.5 if args.device == "cpu" else 8
    wanted = target(f"a save holds the loop up: times less, {ASYNC}", least, held[PLAIN] / held[ASYNC])
    return {f"a save of {size:.0f} MB and {args.steps} steps, wall ms": rows}, [wanted]


def measure_resume(folder, args, model, parts):
    """{title: rows} of reading the file, all of a resume, and entering the stream at iteration 1,000,000."""
    checkpointer = DetectionCheckpointer(model, os.path.join(folder, "resume"), **parts)
    checkpointer.save("model_0999999", iteration=999_999)
    path = checkpointer.get_checkpoint_file()
    sampler = TrainingSampler(118_000, 16, seed=0, groups=torch.rand(118_000).numpy(), window=100)

    def enter():
        sampler._order.cache_clear()
        next(iter(TrainLoader(range(118_000), lambda record, rng: record, sampler, start_iter=1_000_000)))

    calls = {
        "reading the file": lambda: read_checkpoint(path),
        "resume_or_load": lambda: checkpointer.resume_or_load(""),
        "entering a stream of 118,000 images": enter,
    }
    rows = make_rows(in_turns({name: timed(f, perf_counter) for name, f in calls.items()}, args.repeats), 1e3)
    return {"a resume, wall ms": rows}


def main():
    """Measure and report."""
    parser = argparse.ArgumentParser("checkpoint", description=__doc__)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=positive, default=10, help="after each save")
    args = parse_args(parser, repeats=7, quick={"steps": 1})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, parts, step = make_state(args)
        tables, wanted = measure_saves(folder, args, model, parts, step)
        tables |= measure_resume(folder, args, model, parts)
    report(args, tables, wanted)


if __name__ == "__main__":
    run(main)
