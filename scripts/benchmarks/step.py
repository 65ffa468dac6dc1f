"""The training step of Faster R-CNN R50-FPN: forward, backward and optimizer step of batches in memory.

The baseline is torchvision's own model with the same weights in a loop written after torchvision's detection
references: float images, `.item()` on every loss, SGD. CPU time of one thread; on a GPU (--device cuda) the
time between two events on the device, the peak of its memory, and more precisions. Detectron2 and MMDetection
are measured where they are installed.

On a CPU images are small, and the RoIs of an image as many fewer than 512 as its area is smaller than
800x1333, so that the parts of a step keep their shares (--size, --rois).

The second table is a pass over images of COCO's sizes, fp32: batches in random order with torchvision's loop,
and batches of like shape with plaintrain's. A few batches stand for all: those in the middle of as many equal
parts of a pass, sorted by padded area. The third counts, on the CPU, what makes a GPU's host wait.
"""

import argparse
import functools
import importlib
import itertools
import math

import numpy as np
import torch
from baselines import references
from shared.measure import (
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

from plaintrain.config import get_cfg
from plaintrain.data.samplers import TrainingSampler
from plaintrain.modeling import build_model

_CLASSES, _DIVISOR = 80, 32
REFERENCES = "torchvision's loop, fp32"
_BF16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]
# What of the config makes the rows of plaintrain, on any device and on a GPU only.
ROWS = {
    "plaintrain, fp32": ["FLOAT32_PRECISION", "highest"],
    "plaintrain, bf16, channels_last": [*_BF16, "MODEL.CHANNELS_LAST", True],
}
GPU_ROWS = {
    "plaintrain, tf32": ["FLOAT32_PRECISION", "high"],
    "plaintrain, bf16": _BF16,
    "plaintrain, bf16, channels_last, compiled": [*_BF16, "MODEL.CHANNELS_LAST", True, "MODEL.COMPILE", True],
}


def make_sample(height, width, seed):
    """An image of noise with 7 boxes, whose sides are log-uniform from a 16th of the image's to the half."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(1 / 16), np.log(1 / 2), (7, 2)))
    corners = rng.uniform(0, 1 - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1) * (width, height, width, height)
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(rng.integers(_CLASSES, size=7))}
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return {"image": image, "target": target, "image_id": seed, "height": height, "width": width}


def make_cfg(args, options=()):
    """Faster R-CNN of `args`; the learning rate is 0, so that every step has the same weights."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", args.device, "MODEL.RESNETS.DEPTH", args.depth])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", args.classes, "SOLVER.BASE_LR", 0.0])
    cfg.merge_from_list(["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", args.rois, *options])
    return cfg


def calm(model, ending):
    """Weights without a training: activations do not grow from block to block, where norms are frozen."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith(ending):
            tensor.data.fill_(0.2)
    return model.train()


def plaintrain_steps(args, batches, options=()):
    """(function that takes plaintrain's training step on each batch, its model)."""
    cfg = make_cfg(args, options)
    if args.device != "cpu":
        batches = [[{**s, "image": s["image"].pin_memory()} for s in batch] for batch in batches]

    train, model = make_training_steps(cfg, batches)

    def steps():
        use_float32(cfg.FLOAT32_PRECISION or "highest")
        train()
        use_float32("highest")

    return steps, calm(model, "bn3.weight")


def use_float32(precision):
    """As FLOAT32_PRECISION."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def device_seconds(steps):
    """Seconds between two events on the GPU, before and after a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    steps()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(steps, model):
    """MB at the peak of a call: what it takes, and this model's weights, gradients and momentum."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps()
    taken = torch.cuda.max_memory_allocated() - before
    own = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return (taken + own + 2 * trained) / 2**20


def measure_rows(args, variants, images, repeats, warm_up=True):
    """Rows of milliseconds per image of {name: (function, model)}, whose call takes so many images."""
    clock = timed if args.device == "cpu" else lambda steps: functools.partial(device_seconds, steps)
    times = in_turns({name: clock(steps) for name, (steps, _) in variants.items()}, repeats, warm_up)
    rows = make_rows(times, 1e3 / images)
    for name, row in rows.items():
        row["images/s"] = 1e3 / row["median"]
        if args.device != "cpu":
            row["peak MB"] = peak_memory(*variants[name])
    return rows


def measure_same(args, batch):
    """({title: rows}, targets) of all variants on the same batch."""
    samples = [make_sample(*args.size, seed) for seed in range(batch)]
    cpu = args.device == "cpu"
    batches = [samples] * (1 if cpu else 10)
    options = ROWS if cpu else ROWS | GPU_ROWS
    if cpu and not cpu_has_bfloat16():
        options = {name: keys for name, keys in ROWS.items() if "bf16" not in name}
    own = {name: plaintrain_steps(args, batches, keys) for name, keys in options.items()}
    state = own["plaintrain, fp32"][1].state_dict()
    variants = {REFERENCES: references.make_steps(args, batches, state), **own}
    for name in installed("detectron2", "mmdet") if args.depth == 50 else ():
        module = importlib.import_module(f"baselines.run_{name}")
        variants[f"{name}, fp32"] = module.make_steps(args, batches)
        calm(variants[f"{name}, fp32"][1], module.LAST_NORM)
    rows = measure_rows(args, variants, batch * len(batches), args.repeats, warm_up=not args.quick)
    wanted = [
        target(f"step, batch {batch}, {name}: times less than {REFERENCES}", least, rows[name]["times less"])
        for name, least in zip(ROWS, (1.1, 1.9), strict=True)
        if name in rows
    ]
    height, width = args.size
    problem = f"batch {batch}, {height}x{width}, {args.rois} RoIs an image, R{args.depth}-FPN, {args.device}"
    return {f"a step, {problem}: ms per image": rows}, wanted


def coco_batches(args, number, batch, grouped):
    """([[sample of a size]] of batches that stand for a pass, the share of padding in the pass)."""
    widths, heights = read_sizes(8000)
    keys = {"groups": widths / heights, "window": get_cfg().DATALOADER.GROUP_WINDOW} if grouped else {}
    sampler = TrainingSampler(widths.size, batch, seed=0, **keys)
    short = min(args.size)
    scale = short / np.maximum(np.minimum(heights, widths), np.maximum(heights, widths) * 800 / 1333)
    sizes = (np.stack([heights, widths], axis=1) * scale[:, None]).round().astype(int)
    images = [[i for i, _ in sampler.get_batch(n)] for n in range(widths.size // batch)]
    areas = [math.prod(-(-side // _DIVISOR) * _DIVISOR for side in sizes[b].max(0)) * batch for b in images]
    order = np.argsort(areas)
    chosen = [order[int((i + 0.5) / number * len(order))] for i in range(number)]
    padding = 1 - sum(sizes[b].prod(1).sum() for b in images) / sum(areas)
    return [[make_sample(*sizes[i].tolist(), seed=i) for i in images[n]] for n in chosen], padding


def measure_coco(args, batch):
    """({title: rows}, targets) of passes over images of COCO's sizes, fp32."""
    names = f"{REFERENCES}, random batches", "plaintrain, fp32, batches of like shape"
    (theirs, more), (ours, less) = (coco_batches(args, args.batches, batch, grouped) for grouped in (0, 1))
    own = plaintrain_steps(args, ours, ROWS["plaintrain, fp32"])
    variants = dict(zip(names, (references.make_steps(args, theirs, own[1].state_dict()), own), strict=True))
    rows = measure_rows(args, variants, batch * len(ours), args.repeats, warm_up=args.device != "cpu")
    for name, padding in zip(names, (more, less), strict=True):
        rows[name]["padding, %"] = 100 * padding
    wanted = target(f"step, COCO's sizes, batch {batch}: times less", 1.5, rows[names[1]]["times less"])
    title = f"steps of {args.batches} batches of {batch}, shortest side {min(args.size)}: ms per image"
    return {title: rows}, [wanted]


def count(args):
    """({title: rows}, targets) of what makes a host wait in a forward and a backward pass."""
    args = argparse.Namespace(**{**vars(args), "device": "cpu"})
    own, rows, wanted = build_model(make_cfg(args)).train(), {}, []
    theirs = references.build_model(args, own.state_dict())
    for batch in (2,) if args.quick else (2, 8):
        samples = [make_sample(64, 96, seed) for seed in range(batch)]
        calls = {"torchvision": (theirs, references.make_inputs(samples)), "plaintrain": (own, (samples,))}
        for name, (model, inputs) in calls.items():
            step = training_step(model, *inputs)
            # The first finds out the strides, once.
            step()
            counts = count_syncs(step)
            rows[f"{name}, batch {batch}"] = {key: counts[key] for key in ("syncs", "uploads", "nms")}
        what = f"host waits of a step beside NMS, batch {batch}"
        wanted.append(target(what, 8, counts["syncs"], at_most=True))
    return {"in a forward and a backward pass": rows}, wanted


def main():
    """Measure and report."""
    parser = argparse.ArgumentParser("step", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--batch", type=positive, nargs="+", help="images; several are measured after another"
    )
    parser.add_argument("--rois", type=positive, help="per image, of which the box head learns")
    parser.add_argument("--batches", type=positive, help="of COCO's sizes")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50, help="of the ResNet")
    quick = {"size": (64, 96), "batch": [2], "batches": 1, "depth": 18}
    args = parse_args(parser, repeats=3, quick=quick)
    args.classes, cpu = _CLASSES, args.device == "cpu"
    args.size = args.size or ((256, 320) if cpu else (800, 1333))
    args.batch = args.batch or ([8] if cpu else [2, 16])
    args.batches = args.batches or (4 if cpu else 20)
    args.rois = args.rois or max(16, min(512, round(512 * math.prod(args.size) / (800 * 1333))))
    torch.set_num_threads(1)
    parts = [measure_same(args, batch) for batch in args.batch]
    parts += [measure_coco(args, args.batch[-1]), count(args)]
    tables = {title: rows for part, _ in parts for title, rows in part.items()}
    report(args, tables, [wanted for _, targets in parts for wanted in targets])


if __name__ == "__main__":
    run(main)
