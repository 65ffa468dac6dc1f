#!/usr/bin/env python
"""Measure plaintrain against named baselines, in one run, interleaved, in CPU time.

python scripts/benchmark.py loop --iterations 2000 --repeats 9 --output loop.json
python scripts/benchmark.py step --config-file configs/quickstart.yaml
python scripts/benchmark.py eval --images 5000 --boxes 100 --classes 80

`loop` is what a training loop costs beside forward, backward and optimizer step: the loop of
plain_train_net.py, and one in the style of Detectron2's (`.item()` on every loss, the same three
writers every 20 iterations, one TensorBoard event per scalar), each over a trivial model and minus
a bare loop over the same model.

`step` is what forward, backward and optimizer step of a config's model cost, in float32 and in
bfloat16, on batches in memory.

`eval` is what COCOEvaluator.evaluate() costs for boxes: by pycocotools, and by each faster
implementation that is installed. From boxes in memory to the metrics, without a results file.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import logging
import os
import platform
import runpy
import statistics
import tempfile
import time

import numpy as np
import torch
from tensorboardX import SummaryWriter
from torch import nn

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader, declare_datasets
from plaintrain.evaluation import COCOEvaluator
from plaintrain.evaluation.coco_backend import BACKENDS
from plaintrain.modeling import build_model
from plaintrain.precision import build_autocast
from plaintrain.preflight import settle_num_classes
from plaintrain.solver import build_optimizer
from plaintrain.structures import BoxMode

_PERIOD = 20


class TrivialModel(nn.Module):
    """Four losses from one small layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, data):
        names = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
        return dict(zip(names, self.layer(data).square().mean(0).unbind(), strict=True))


def _make():
    torch.manual_seed(0)
    model = TrivialModel()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


def bare_loop(iterations, data, folder):
    """Forward, backward, step."""
    model, optimizer = _make()
    for _ in range(iterations):
        losses = sum(model(data).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()


def item_loop(iterations, data, folder):
    """The bookkeeping of Detectron2's plain loop, written with plain torch."""
    model, optimizer = _make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    board = SummaryWriter(folder)
    logger, history = logging.getLogger("plaintrain"), {}
    with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as f:
        for iteration in range(iterations):
            loss_dict = model(data)
            losses = sum(loss_dict.values())
            assert torch.isfinite(losses).all()
            values = {name: loss.item() for name, loss in loss_dict.items()}
            values |= {"total_loss": sum(values.values()), "lr": optimizer.param_groups[0]["lr"]}
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            scheduler.step()
            for name, value in values.items():
                history.setdefault(name, []).append(value)
            if (iteration + 1) % _PERIOD == 0 or iteration == iterations - 1:
                shown = {name: statistics.median(v[-_PERIOD:]) for name, v in history.items()}
                logger.info("  ".join(f"{name}: {value:.4g}" for name, value in shown.items()))
                f.write(json.dumps({"iteration": iteration, **shown}) + "\n")
                f.flush()
                for name, value in shown.items():
                    board.add_scalar(name, value, iteration)
    board.close()


def plaintrain_loop(iterations, data, folder):
    """`do_train` of plain_train_net.py, with a data loader that costs nothing."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plain_train_net.py")
    do_train = runpy.run_path(script)["do_train"]
    methods = {"__iter__": lambda self: iter([data] * iterations), "state_dict": lambda self: {}}
    loader = type("Batches", (), methods)
    do_train.__globals__["build_detection_train_loader"] = lambda cfg: loader()
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 0, "OUTPUT_DIR", folder])
    torch.manual_seed(0)
    do_train(cfg, TrivialModel())


VARIANTS = {
    "bare step": bare_loop,
    "loop with .item(), as Detectron2's": item_loop,
    "plain_train_net.py": plaintrain_loop,
}


def measure_loop(iterations, repeats):
    """{variant: [microseconds of CPU per iteration, one a repeat]}, variants interleaved."""
    logger = logging.getLogger("plaintrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    data = torch.ones(8, 4)
    times = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as root:
        logger.addHandler(logging.FileHandler(os.path.join(root, "log.txt")))
        for repeat in range(repeats + 1):
            for i, (name, run) in enumerate(VARIANTS.items()):
                folder = os.path.join(root, f"{repeat}-{i}")
                os.mkdir(folder)
                gc.collect()
                start = time.process_time()
                run(iterations, data, folder)
                # The first round warms up.
                if repeat:
                    times[name].append((time.process_time() - start) / iterations * 1e6)
    return times


def print_times(what, times, unit):
    """Print median and spread of {name: numbers}; returns {name: median}."""
    print(f"{what:<36} {'median':>11} {'lowest':>11} {'highest':>11}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        cells = (f"{value:>8.1f} {unit}" for value in (medians[name], min(values), max(values)))
        print(f"{name:<36} {' '.join(cells)}")
    return medians


def report_loop(times):
    """Print the table; returns the numbers that stand in it."""
    medians = print_times("CPU per iteration", times, "us")
    over = {name: median - medians["bare step"] for name, median in medians.items()}
    _, item, plain = over
    print(f"over the bare step: {over[item]:.1f} us with .item(), {over[plain]:.1f} us in {plain}: ", end="")
    print(f"{over[item] / over[plain]:.2f} times less CPU")
    return {"median_us": medians, "over_bare_us": over, "all_us": times, "ratio": over[item] / over[plain]}


def made_up_dataset(images, boxes, classes, seed=0):
    """Records with some 7 objects an image, and as many detections as asked for: moved, mislabelled."""
    rng = np.random.default_rng(seed)
    records, outputs = [], []
    for i in range(images):
        objects = np.concatenate([rng.uniform(0, 400, (7, 2)), np.exp(rng.uniform(2, 5.5, (7, 2)))], axis=1)
        labels = rng.integers(classes, size=7)
        size = rng.integers(1, 8)
        annotations = [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(label), "iscrowd": 0}
            for box, label in zip(objects[:size], labels[:size], strict=True)
        ]
        records.append({"image_id": i, "height": 640, "width": 640, "annotations": annotations})
        chosen = rng.integers(size, size=boxes)
        moved = objects[chosen] * np.exp(rng.normal(0, 0.1, (boxes, 4)))
        moved[:, 2:] += moved[:, :2]
        wrong = rng.random(boxes) < 0.5
        found = np.where(wrong, rng.integers(classes, size=boxes), labels[chosen])
        columns = {"boxes": moved, "scores": rng.random(boxes), "labels": found}
        outputs.append({name: torch.from_numpy(values) for name, values in columns.items()})
    return records, outputs


def measure_eval(images, boxes, classes):
    """{backend: (seconds of CPU, results)}; the first is pycocotools."""
    records, outputs = made_up_dataset(images, boxes, classes)
    DatasetCatalog.register("benchmark_eval", lambda: records)
    MetadataCatalog.get("benchmark_eval").set(thing_classes=[f"class {i}" for i in range(classes)])
    measured = {}
    for backend in reversed(BACKENDS):
        if not importlib.util.find_spec(backend):
            continue
        # Its import is not measured.
        importlib.import_module(backend)
        evaluator = COCOEvaluator("benchmark_eval")
        evaluator.backend = backend
        evaluator.process(records, outputs)
        gc.collect()
        start = time.process_time()
        results = evaluator.evaluate()
        measured[backend] = time.process_time() - start, results
    return measured


def report_eval(measured):
    """Print the table; returns the numbers that stand in it."""
    baseline, expected = measured["pycocotools"]
    rows = {}
    print(f"{'CPU of evaluate()':<20} {'seconds':>9} {'times less':>11} {'AP':>12}  same results")
    for backend, (seconds, results) in measured.items():
        # As text: NaN, where there are no objects of a size, is not equal to itself.
        same = repr(results) == repr(expected)
        rows[backend] = {"cpu_s": seconds, "ratio": baseline / seconds, "same_results": same}
        ap = results["bbox"]["AP"]
        print(f"{backend:<20} {seconds:>9.2f} {baseline / seconds:>11.1f} {ap:>12.8f}  {same}")
    return rows


def measure_step(config_file, batches, repeats):
    """{precision: [milliseconds of CPU per training step, one a repeat]}, precisions interleaved."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SEED", max(cfg.SEED, 0)])
    declare_datasets(cfg)
    settle_num_classes(cfg, eval_only=False)
    data = list(itertools.islice(build_detection_train_loader(cfg), batches))
    runs, times = {}, {}
    for precision, enabled in (("float32", False), ("bfloat16", True)):
        torch.manual_seed(cfg.SEED)
        model = build_model(cfg)
        runs[precision] = model, build_optimizer(cfg, model), build_autocast(enabled, "bfloat16", "cpu")
    for repeat in range(repeats + 1):
        for precision, (model, optimizer, autocast) in runs.items():
            gc.collect()
            start = time.process_time()
            for samples in data:
                with autocast:
                    losses = sum(model(samples).values())
                optimizer.zero_grad()
                losses.backward()
                optimizer.step()
            if repeat:
                times.setdefault(precision, []).append((time.process_time() - start) / batches * 1e3)
    return times


def report_step(times):
    """Print the table; returns the numbers that stand in it."""
    medians = print_times("CPU per training step", times, "ms")
    ratio = medians["bfloat16"] / medians["float32"]
    print(f"bfloat16 takes {ratio:.3f} of the CPU of float32")
    return {"median_ms": medians, "ratio": ratio, "all_ms": times}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, help="what to measure")
    loop = commands.add_parser("loop")
    loop.add_argument("--iterations", type=int, default=1000, help="per repeat")
    loop.add_argument("--repeats", type=int, default=7, help="rounds over all variants")
    step = commands.add_parser("step")
    step.add_argument("--config-file", default="configs/quickstart.yaml")
    step.add_argument("--batches", type=int, default=8, help="different batches, each a step a repeat")
    step.add_argument("--repeats", type=int, default=7, help="rounds over both precisions")
    evaluation = commands.add_parser("eval")
    evaluation.add_argument("--images", type=int, default=500)
    evaluation.add_argument("--boxes", type=int, default=100, help="detections per image")
    evaluation.add_argument("--classes", type=int, default=80)
    for command in (loop, step, evaluation):
        command.add_argument("--output", help="also write the numbers as JSON to this file")
    args = parser.parse_args()
    if min(value for value in vars(args).values() if isinstance(value, int)) < 1:
        parser.error("every number must be at least 1")
    torch.set_num_threads(1)
    machine = f"python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {machine}")
    if args.what == "loop":
        result = report_loop(measure_loop(args.iterations, args.repeats))
    elif args.what == "step":
        result = report_step(measure_step(args.config_file, args.batches, args.repeats))
    else:
        result = report_eval(measure_eval(args.images, args.boxes, args.classes))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
