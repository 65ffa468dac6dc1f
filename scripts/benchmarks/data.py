"""Images per second of the training loader, its memory, and what of a batch is padding.

`images` is wall time per image of the training loader with two workers on two cores, processes and threads,
and of a loader written after torchvision's detection references: Pillow decodes, resizes and flips, tensors
are floats, PyTorch's DataLoader has two processes. Wall time, for workers beside this process do the work.
JPEG files of 640x480, shorter side 640 to 800, seven boxes; in turns, after a start that is not counted.
`padding` is computed, not timed: the share of padding in batches of images of COCO's sizes, shortest side 800
and longest 1333, as coco_sizes.json describes them.
`memory` is the peak of two threads and of two processes, as much waiting as ever does, for the training is
slower: the proportional set size of the process and its workers (Linux only), which counts once what they
share, over what the process had before; each in a fresh process. It is measured if --parts names it.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from shared.images import write_images
from shared.measure import (
    fresh,
    in_turns,
    make_rows,
    parse_args,
    positive,
    read_memory,
    read_sizes,
    run,
    run_parts,
    target,
)
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader
from plaintrain.data.samplers import TrainingSampler

REFERENCES = "as torchvision's references, 2 processes"


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


def make_reference(cfg, records):
    """The loader of torchvision's references."""
    dataset = PillowDataset(records, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
    return DataLoader(dataset, cfg.SOLVER.IMS_PER_BATCH, num_workers=2, collate_fn=list)


def make_loader(cfg, records):
    """plaintrain's."""
    return build_detection_train_loader(cfg, dataset=records)


def make_cfg(batch, options=()):
    """Two workers, and images of several sizes."""
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", batch, "DATALOADER.NUM_WORKERS", 2])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", tuple(range(640, 801, 32)), "INPUT.MAX_SIZE_TRAIN", 1333])
    cfg.merge_from_list(list(options))
    return cfg


def ms_per_image(make, options, records, args):
    """Wall time per image of a loader, after its first batches."""
    stream = itertools.islice(make(make_cfg(args.batch, options), records), args.skipped + args.batches)
    for _ in range(args.skipped):
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
    kinds = {"process": "2 processes", "thread": "2 threads"}
    makers = {REFERENCES: (make_reference, ())}
    makers |= {name: (make_loader, ("DATALOADER.WORKER_TYPE", kind)) for kind, name in kinds.items()}
    keeping = ("DATALOADER.WORKER_TYPE", "thread", "DATALOADER.CACHE_BYTES", 1 << 30)
    makers["2 threads, decoded images kept"] = (make_loader, keeping)
    with tempfile.TemporaryDirectory() as files, two_cores():
        records = write_images(files, args.files)
        functions = {
            name: functools.partial(ms_per_image, *maker, records, args) for name, maker in makers.items()
        }
        rows = make_rows(in_turns(functions, args.repeats, warm_up=False))
    for row in rows.values():
        row["images/s"] = 1000 / row["median"]
    default = get_cfg().DATALOADER.WORKER_TYPE
    chosen = kinds["thread" if default == "auto" else default]
    wanted = target(f"loader, the default ({chosen}): times the images/s", 3, rows[chosen]["times less"])
    return {"wall time of an image, ms": rows}, [wanted]


def padding(sampler, widths, heights):
    """The share of padding in two passes of batches, images resized to 800 x 1333 at most."""
    scale = np.minimum(800 / np.minimum(heights, widths), 1333 / np.maximum(heights, widths))
    heights, widths = (heights * scale).round(), (widths * scale).round()
    used = whole = 0
    for iteration in range(2 * sampler.size // sampler.batch_size):
        batch = [image for image, _ in sampler.get_batch(iteration)]
        used += (heights[batch] * widths[batch]).sum()
        whole += heights[batch].max() * widths[batch].max() * len(batch)
    return 1 - used / whole


def measure_padding(args):
    """({title: rows}, targets) of the padding of batches in several orders."""
    widths, heights = read_sizes(8000)
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


def measure_memory(args):
    """({title: rows}, no targets) of the peak memory of threads and processes."""
    rows = {}
    for kind in ("thread", "process"):
        peak, largest = fresh(find_peak, kind, args.batch, args.batches, args.files)
        rows[kind] = {"MB": peak, "times the largest batch": peak / largest}
    return {f"memory of two workers, batch {args.batch}": rows}, []


def find_peak(kind, batch, batches, files):
    """(MB over what the process had before, MB of the largest batch) of a loader."""
    torch.set_num_threads(1)
    # As default_setup does.
    gc.freeze()
    used, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        records = write_images(folder, files)
        before = read_memory(os.getpid(), "Pss:")
        loader = make_loader(make_cfg(batch, ["DATALOADER.WORKER_TYPE", kind]), records)
        for samples in itertools.islice(loader, batches):
            # A step, until no worker has room for more.
            time.sleep(1.5)
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            used.append(sum(read_memory(pid, "Pss:") for pid in pids))
            sizes.append(sum(sample["image"].nbytes for sample in samples) / 2**20)
    return max(used) - before, max(sizes)


MEASUREMENTS = {"images": measure_images, "padding": measure_padding, "memory": measure_memory}


def main():
    """Measure and report."""
    parser = argparse.ArgumentParser("data", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(MEASUREMENTS), default=["images", "padding"])
    parser.add_argument("--batch", type=positive, default=16, help="images")
    parser.add_argument("--batches", type=positive, default=20, help="per turn, of images")
    parser.add_argument("--skipped", type=positive, default=6, help="batches before those of a turn")
    parser.add_argument("--files", type=positive, default=64, help="different images")
    quick = {"batch": 4, "batches": 1, "skipped": 1, "files": 4}
    args = parse_args(parser, repeats=5, quick=quick)
    torch.set_num_threads(1)
    run_parts(args, MEASUREMENTS)


if __name__ == "__main__":
    run(main)
