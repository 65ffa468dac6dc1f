#!/usr/bin/env python
"""How long saving holds up a training, and what a resume costs beside reading the file.

python scripts/benchmark_checkpoint.py
python scripts/benchmark_checkpoint.py --folder /somewhere/on/the/disk/of/the/runs --repeats 9

The state is that of Faster R-CNN R50-FPN with SGD and averaged weights. A save in the background holds the
loop up for the copy to the host's memory, and the steps beside it are slower; both are counted: the time of a
save and the 10 steps after it, less that of 10 steps without one.
"""

import argparse
import statistics
import tempfile
from time import perf_counter

import torch

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.data.samplers import TrainingSampler
from plaintrain.data.train_loader import TrainLoader
from plaintrain.ema import build_ema
from plaintrain.evaluation.loop import format_table
from plaintrain.modeling import build_model
from plaintrain.solver import build_lr_scheduler, build_optimizer
from plaintrain.utils.checkpoint_files import read_checkpoint

_STEPS = 10


def make_state(folder, asynchronous):
    """(checkpointer, a function that takes a step) of a model of the usual size."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.EMA.ENABLED", True])
    model = build_model(cfg)
    optimizer, ema = build_optimizer(cfg, model), build_ema(cfg, model)
    parts = {"optimizer": optimizer, "scheduler": build_lr_scheduler(cfg, optimizer), "ema": ema}
    work = torch.randn(512, 512)

    def step():
        """What a step does on the host, roughly: arithmetic, and a change of all that is saved."""
        for _ in range(20):
            work @ work
        with torch.no_grad():
            torch._foreach_add_([p for p in model.parameters() if p.requires_grad], 1e-6)
        ema.update()

    step()
    return DetectionCheckpointer(model, folder, asynchronous=asynchronous, **parts), step


def seconds(function):
    """How long a call takes."""
    start = perf_counter()
    function()
    return perf_counter() - start


def measure_saves(folder, repeats):
    """{variant: [seconds, one a repeat]}: of 10 steps alone, and after a save; variants interleaved."""
    variants = {name: make_state(folder, name == "background") for name in ("no save", "plain", "background")}
    times = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, (checkpointer, step) in variants.items():

            def run(checkpointer=checkpointer, step=step, name=name, repeat=repeat):
                if name != "no save":
                    checkpointer.save(f"{name}_{repeat % 2}", iteration=repeat)
                for _ in range(_STEPS):
                    step()

            times[name].append(seconds(run))
            checkpointer.wait()
    # The first has to make the files and the memory of the copy.
    return {name: values[1:] for name, values in times.items()}


def measure_resume(folder, repeats):
    """{what: [seconds]}: reading the file, all of a resume, entering the stream at iteration 1,000,000."""
    checkpointer, _ = make_state(folder, False)
    checkpointer.save("model_0999999", iteration=999_999)
    path = checkpointer.get_checkpoint_file()
    sampler = TrainingSampler(118_000, 16, seed=0, groups=torch.rand(118_000).numpy(), window=100)
    times = {"reading the file": [], "resume_or_load": [], "entering a stream of 118,000 images": []}
    for _ in range(repeats):
        times["reading the file"].append(seconds(lambda: read_checkpoint(path)))
        times["resume_or_load"].append(seconds(lambda: checkpointer.resume_or_load("")))
        stream = TrainLoader(range(118_000), lambda record, rng: record, sampler, start_iter=1_000_000)
        times["entering a stream of 118,000 images"].append(seconds(lambda s=stream: next(iter(s))))
        sampler._order.cache_clear()
    return times


def main():
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saves = measure_saves(folder, args.repeats)
        resume = measure_resume(folder, args.repeats)
    base = statistics.median(saves["no save"])
    held_up = {name: statistics.median(values) - base for name, values in saves.items() if name != "no save"}
    rows = [(name, t * 1e3, t / held_up["plain"]) for name, t in held_up.items()]
    print(format_table(rows, ("a save", "ms the loop is held up", "ratio")))
    rows = [(name, statistics.median(values) * 1e3) for name, values in resume.items()]
    print(format_table(rows, ("a resume", "ms")))


if __name__ == "__main__":
    main()
