"""Training step of Faster R-CNN R50-FPN: forward, backward and optimizer step on batches in memory.

The baseline is torchvision's model with the same weights in a loop modelled on torchvision's detection
references: float images, `.item()` on every loss, SGD. CPU time of one thread; on a GPU (--device cuda) the
time between two CUDA events, the peak memory, and more precisions. Detectron2 and MMDetection are measured if
they are installed.

On a CPU images are smaller, and so is the number of RoIs per image, in proportion to the area (512 at
800x1333), to keep the relative cost of the parts of a step (--size, --rois).

The second table is an epoch over images of COCO's sizes, fp32: batches in random order with torchvision's
loop, batches of similar aspect ratio with plaintrain's. It runs a few batches only: those in the middle of
equal parts of an epoch sorted by padded area. The third counts, on the CPU, the device syncs of a step.
"""

import argparse
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from baselines import references
from shared.measure import (
    Results,
    Table,
    cpu_has_bfloat16,
    in_turns,
    installed,
    make_rows,
    parse_args,
    positive,
    read_sizes,
    report,
    run,
    target,
    timed,
)
from shared.steps import make_training_steps
from shared.syncs import count_syncs, training_step
from torch import nn

from plaintrain.config import CfgNode, get_cfg
from plaintrain.data.samplers import TrainingSampler
from plaintrain.modeling import build_model

# One image with its target.
Sample = dict[str, Any]
# (function that trains a step on each batch, model).
Steps = tuple[Callable[[], None], nn.Module]
_CLASSES = 80
_DIVISOR = 32
REFERENCES = "torchvision's loop, fp32"
_BF16: list[Any] = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]
# {variant of plaintrain: config overrides}, on any device and on GPUs only.
ROWS: dict[str, list[Any]] = {
    "plaintrain, fp32": ["FLOAT32_PRECISION", "highest"],
    "plaintrain, bf16, channels_last": [*_BF16, "MODEL.CHANNELS_LAST", True],
}
GPU_ROWS: dict[str, list[Any]] = {
    "plaintrain, tf32": ["FLOAT32_PRECISION", "high"],
    "plaintrain, bf16": _BF16,
    "plaintrain, bf16, channels_last, compiled": [*_BF16, "MODEL.CHANNELS_LAST", True, "MODEL.COMPILE", True],
}


def make_sample(height: int, width: int, seed: int) -> Sample:
    """Return a noise image with 7 boxes, whose relative sides are log-uniform from 1/16 to 1/2."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(1 / 16), np.log(1 / 2), (7, 2)))
    corners = rng.uniform(0, 1 - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1) * (width, height, width, height)
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(rng.integers(_CLASSES, size=7))}
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return {"image": image, "target": target, "image_id": seed, "height": height, "width": width}


def make_cfg(args: argparse.Namespace, options: Sequence[Any] = ()) -> CfgNode:
    """Return the config; with learning rate 0, so that every step has the same weights."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", args.device, "MODEL.RESNETS.DEPTH", args.depth])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", args.classes, "SOLVER.BASE_LR", 0.0])
    cfg.merge_from_list(["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", args.rois, *options])
    return cfg


def scale_norms(model: nn.Module, ending: str) -> nn.Module:
    """Scale the last norm of each block, so that activations of untrained weights do not explode."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith(ending):
            tensor.data.fill_(0.2)
    return model.train()


def plaintrain_steps(
    args: argparse.Namespace, batches: list[list[Sample]], options: Sequence[Any] = ()
) -> Steps:
    """Return (function that trains a step on each batch, model)."""
    cfg = make_cfg(args, options)
    if args.device != "cpu":
        batches = [[{**s, "image": s["image"].pin_memory()} for s in batch] for batch in batches]

    train, model = make_training_steps(cfg, batches)

    def steps():
        use_float32(cfg.FLOAT32_PRECISION or "highest")
        train()
        use_float32("highest")

    return steps, scale_norms(model, "bn3.weight")


def use_float32(precision: str) -> None:
    """Set the precision as FLOAT32_PRECISION does."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def device_seconds(steps: Callable[[], object]) -> float:
    """Return the seconds between two CUDA events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    steps()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(steps: Callable[[], object], model: nn.Module) -> float:
    """Return the peak MB of a call, including the model's weights, gradients and momentum."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps()
    allocated = torch.cuda.max_memory_allocated() - before
    weights = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return (allocated + weights + 2 * trained) / 2**20


def measure_rows(
    args: argparse.Namespace, variants: dict[str, Steps], images: int, repeats: int, warm_up: bool = True
) -> Table:
    """Return the ms per image of each variant; a call processes `images` images."""
    clock = timed if args.device == "cpu" else lambda steps: functools.partial(device_seconds, steps)
    times = in_turns({name: clock(steps) for name, (steps, _) in variants.items()}, repeats, warm_up)
    table = make_rows(times, 1e3 / images)
    for name, row in table.items():
        row["images/s"] = 1e3 / row["median"]
        if args.device != "cpu":
            row["peak MB"] = peak_memory(*variants[name])
    return table


def measure_same(args: argparse.Namespace, batch: int) -> Results:
    """Measure all variants on the same batch."""
    height, width = args.size
    samples = [make_sample(height, width, seed) for seed in range(batch)]
    cpu = args.device == "cpu"
    batches = [samples] * (1 if cpu else 10)
    options = ROWS if cpu else ROWS | GPU_ROWS
    if cpu and not cpu_has_bfloat16():
        options = {name: keys for name, keys in ROWS.items() if "bf16" not in name}
    own = {name: plaintrain_steps(args, batches, keys) for name, keys in options.items()}
    state = own["plaintrain, fp32"][1].state_dict()
    variants = {REFERENCES: references.make_steps(args, batches, state), **own}
    # Their configs are of R50.
    others = installed("detectron2", "mmdet") if args.depth == 50 else []
    for name in others:
        module = importlib.import_module(f"baselines.run_{name}")
        variants[f"{name}, fp32"] = module.make_steps(args, batches)
        scale_norms(variants[f"{name}, fp32"][1], module.LAST_NORM)
    table = measure_rows(args, variants, batch * len(batches), args.repeats, warm_up=not args.quick)
    wanted = [
        target(f"step, batch {batch}, {name}: times less than {REFERENCES}", least, table[name]["times less"])
        for name, least in zip(ROWS, (1.1, 1.9), strict=True)
        if name in table
    ]
    problem = f"batch {batch}, {height}x{width}, {args.rois} RoIs an image, R{args.depth}-FPN, {args.device}"
    return {f"a step, {problem}: ms per image": table}, wanted


def make_coco_batches(
    args: argparse.Namespace, num_batches: int, batch: int, grouped: bool
) -> tuple[list[list[Sample]], float]:
    """Return (representative batches of an epoch, fraction of padding of the epoch)."""
    widths, heights = read_sizes(8000)
    keys = {"groups": widths / heights, "window": get_cfg().DATALOADER.GROUP_WINDOW} if grouped else {}
    sampler = TrainingSampler(widths.size, batch, seed=0, **keys)
    short = min(args.size)
    scale = short / np.maximum(np.minimum(heights, widths), np.maximum(heights, widths) * 800 / 1333)
    sizes = (np.stack([heights, widths], axis=1) * scale[:, None]).round().astype(int)
    images = [[i for i, _ in sampler.get_batch(n)] for n in range(widths.size // batch)]
    areas = [math.prod(-(-side // _DIVISOR) * _DIVISOR for side in sizes[b].max(0)) * batch for b in images]
    order = np.argsort(areas)
    chosen = [order[int((i + 0.5) / num_batches * len(order))] for i in range(num_batches)]
    padding = 1 - sum(sizes[b].prod(1).sum() for b in images) / sum(areas)
    return [[make_sample(int(sizes[i, 0]), int(sizes[i, 1]), i) for i in images[n]] for n in chosen], padding


def measure_coco(args: argparse.Namespace, batch: int) -> Results:
    """Measure an epoch over images of COCO's sizes, fp32."""
    names = (f"{REFERENCES}, random batches", "plaintrain, fp32, batches of like shape")
    theirs, more = make_coco_batches(args, args.batches, batch, grouped=False)
    ours, less = make_coco_batches(args, args.batches, batch, grouped=True)
    own = plaintrain_steps(args, ours, ROWS["plaintrain, fp32"])
    variants = dict(zip(names, (references.make_steps(args, theirs, own[1].state_dict()), own), strict=True))
    table = measure_rows(args, variants, batch * len(ours), args.repeats, warm_up=args.device != "cpu")
    for name, padding in zip(names, (more, less), strict=True):
        table[name]["padding, %"] = 100 * padding
    wanted = target(f"step, COCO's sizes, batch {batch}: times less", 1.5, table[names[1]]["times less"])
    title = f"steps of {args.batches} batches of {batch}, shortest side {min(args.size)}: ms per image"
    return {title: table}, [wanted]


def count_all_syncs(args: argparse.Namespace) -> Results:
    """Count the device syncs in forward and backward."""
    args = argparse.Namespace(**{**vars(args), "device": "cpu"})
    own = build_model(make_cfg(args)).train()
    theirs = references.build_model(args, own.state_dict())
    batch_sizes = [2] if args.quick else [2, 8]
    table = {}
    targets = []
    for batch in batch_sizes:
        samples = [make_sample(64, 96, seed) for seed in range(batch)]
        calls = {"torchvision": (theirs, references.make_inputs(samples)), "plaintrain": (own, (samples,))}
        for name, (model, inputs) in calls.items():
            step = training_step(model, *inputs)
            # The first call computes the strides once.
            step()
            counts = count_syncs(step)
            table[f"{name}, batch {batch}"] = {key: counts[key] for key in ("syncs", "uploads", "nms")}
        name = f"device syncs of a step without NMS, batch {batch}"
        targets.append(target(name, 8, counts["syncs"], at_most=True))
    return {"syncs in forward and backward": table}, targets


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("step", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=positive, nargs="+", help="batch sizes, measured one after the other")
    parser.add_argument("--rois", type=positive, help="sampled per image for the box head")
    parser.add_argument("--batches", type=positive, help="batches of COCO's sizes")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50, help="ResNet depth")
    quick = {"size": (64, 96), "batch": [2], "batches": 1, "depth": 18}
    args = parse_args(parser, repeats=3, quick=quick)
    args.classes = _CLASSES
    cpu = args.device == "cpu"
    args.size = args.size or ((256, 320) if cpu else (800, 1333))
    args.batch = args.batch or ([8] if cpu else [2, 16])
    args.batches = args.batches or (4 if cpu else 20)
    args.rois = args.rois or max(16, min(512, round(512 * math.prod(args.size) / (800 * 1333))))
    torch.set_num_threads(1)
    results = [measure_same(args, batch) for batch in args.batch]
    results += [measure_coco(args, args.batch[-1]), count_all_syncs(args)]
    tables = {title: table for tables, _ in results for title, table in tables.items()}
    report(args, tables, [target for _, targets in results for target in targets])


if __name__ == "__main__":
    run(main)
