"""Images per second of the training loader, and what of a batch is padding.

`images` is wall time per image of the training loader with two workers on two cores, processes and threads,
and of a loader written after torchvision's detection references: Pillow decodes, resizes and flips, tensors
are floats, PyTorch's DataLoader has two processes. Wall time, for workers beside this process do the work.
JPEG files of 640x480, shorter side 640 to 800, seven boxes; in turns, after a start that is not counted.
`padding` is computed, not timed: the share of padding in batches of images of COCO's sizes, shortest side 800
and longest 1333, as coco_sizes.json describes them.
"""

import argparse
import contextlib
import functools
import itertools
import os
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from shared.measure import in_turns, make_rows, parse_args, positive, read_sizes, report, run, target
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader
from plaintrain.data.samplers import TrainingSampler
from plaintrain.structures import BoxMode

REFERENCES = "as torchvision's references, 2 processes"


def write_images(folder, number=64):
    """JPEG files of 640x480, about as large as COCO's; returns their records."""
    records, rng = [], np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, size=(30, 40, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + rng.normal(0, 9, size=(480, 640, 1))
        path = os.path.join(folder, f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
        corners = np.sort(rng.uniform(0, 1, size=(7, 2, 2)), axis=1) * (640, 480)
        boxes = [
            {"bbox": row, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for row in corners.reshape(7, 4).tolist()
        ]
        records.append({"file_name": path, "image_id": i, "height": 480, "width": 640, "annotations": boxes})
    return records


class PillowDataset(Dataset):
    """Samples without end, made as torchvision's detection references make them with Pillow."""

    def __init__(self, records, short_sides, max_size):
        self._records, self._short_sides, self._max_size = records, short_sides, max_size

    def __len__(self):
        return 1 << 30

    def __getitem__(self, index):
        record = self._records[index % len(self._records)]
        image = Image.open(record["file_name"]).convert("RGB")
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        short_side = self._short_sides[int(torch.randint(len(self._short_sides), ()))]
        image = functional.resize(image, [short_side], max_size=self._max_size)
        boxes *= image.width / record["width"]
        if torch.rand(1) < 0.5:
            image = functional.horizontal_flip(image)
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        labels = torch.tensor([a["category_id"] for a in record["annotations"]])
        return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True), {
            "boxes": boxes,
            "labels": labels,
        }


def _reference_loader(cfg, records):
    dataset = PillowDataset(records, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
    return DataLoader(dataset, cfg.SOLVER.IMS_PER_BATCH, num_workers=2, collate_fn=list)


def _own_loader(kind, cfg, records, cached=0):
    cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.CACHE_BYTES = kind, cached
    return build_detection_train_loader(cfg, dataset=records)


def ms_per_image(make, records, batch, batches, skipped):
    """Wall time per image of a loader, after its first batches."""
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", batch, "DATALOADER.NUM_WORKERS", 2])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", tuple(range(640, 801, 32)), "INPUT.MAX_SIZE_TRAIN", 1333])
    stream = itertools.islice(make(cfg, records), skipped + batches)
    for _ in range(skipped):
        next(stream)
    start = time.perf_counter()
    number = sum(len(batch) for batch in stream)
    return (time.perf_counter() - start) / number * 1000


@contextlib.contextmanager
def two_cores():
    """Within the block this process and those it starts have two cores."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def measure_images(args):
    """({title: rows}, targets) of the wall time per image of each loader."""
    default = get_cfg().DATALOADER.WORKER_TYPE
    makers, kinds = {REFERENCES: _reference_loader}, {"process": "2 processes", "thread": "2 threads"}
    makers |= {name: functools.partial(_own_loader, kind) for kind, name in kinds.items()}
    makers["2 threads, decoded images kept"] = functools.partial(_own_loader, "thread", cached=1 << 30)
    with tempfile.TemporaryDirectory() as files, two_cores():
        records = write_images(files, args.files)
        functions = {
            name: functools.partial(ms_per_image, make, records, args.batch, args.batches, args.skipped)
            for name, make in makers.items()
        }
        rows = make_rows(in_turns(functions, args.repeats, warm_up=False))
    for row in rows.values():
        row["images/s"] = 1000 / row["median"]
    chosen = kinds["thread" if default == "auto" else default]
    wanted = target(f"loader, the default ({chosen}): times the images/s", 3, rows[chosen]["times less"])
    return {"wall time of an image, ms": rows}, [wanted]


def padding(sampler, widths, heights):
    """The share of padding in two passes of batches, images resized to 800 x 1333 at most."""
    scale = np.minimum(800 / np.minimum(heights, widths), 1333 / np.maximum(heights, widths))
    heights, widths = (heights * scale).round(), (widths * scale).round()
    used = whole = 0
    for iteration in range(2 * sampler.size // sampler.batch_size):
        batch = [image for image, _ in sampler.batch(iteration)]
        used += (heights[batch] * widths[batch]).sum()
        whole += heights[batch].max() * widths[batch].max() * len(batch)
    return 1 - used / whole


def measure_padding(args):
    """({title: rows}, targets) of the padding of batches in several orders."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "coco_sizes.json")
    widths, heights = read_sizes(path, 8000)
    window = get_cfg().DATALOADER.GROUP_WINDOW
    groupings = {
        "random order": {},
        "two groups (GROUP_WINDOW 0)": {"groups": widths >= heights},
        "window of 20 batches": {"groups": widths / heights, "window": 20},
        f"window of {window} batches (default)": {"groups": widths / heights, "window": window},
    }
    rows = {}
    for name, keys in groupings.items():
        sampler = TrainingSampler(widths.size, args.batch, seed=1, **keys)
        rows[name] = {"%": 100 * padding(sampler, widths, heights)}
    wanted = target(f"padding at batch {args.batch}, {name}, %", 3, rows[name]["%"], at_most=True)
    return {f"padding at batch {args.batch}": rows}, [wanted]


MEASUREMENTS = {"images": measure_images, "padding": measure_padding}


def main(argv=None):
    """Measure and report."""
    parser = argparse.ArgumentParser("data", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--batch", type=positive, default=16, help="images")
    parser.add_argument("--batches", type=positive, default=20, help="per turn, of images")
    parser.add_argument("--skipped", type=positive, default=6, help="batches before those of a turn")
    parser.add_argument("--files", type=positive, default=64, help="different images")
    quick = {"batch": 4, "batches": 1, "skipped": 1, "files": 4}
    args = parse_args(parser, argv, repeats=5, quick=quick)
    torch.set_num_threads(1)
    tables, targets = {}, []
    for part in args.parts:
        more, wanted = MEASUREMENTS[part](args)
        tables, targets = tables | more, targets + wanted
    report(args, tables, targets)


if __name__ == "__main__":
    run(main)
