"""Images per second of the training loader, its memory, and the padding of its batches.

`images` is wall time per image of the training loader with two workers on two cores, processes and threads,
and of a loader modelled on torchvision's detection references: Pillow decodes, resizes and flips, tensors are
floats, PyTorch's DataLoader has two processes. JPEG files of 640x480, shorter side 640 to 800, seven boxes;
interleaved, after a warm-up. `padding` is computed, not timed: the fraction of padding in batches of images
with COCO's sizes (coco_sizes.json), shorter side 800, longer side at most 1333. `memory` is the peak of two
threads and of two processes with full queues, as in a slower training: the proportional set size of the
process and its workers (Linux only) minus that of the process before; each in a fresh process. It needs
--parts memory.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared.images import write_images
from shared.measure import (
    Results,
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

from plaintrain.config import CfgNode, get_cfg
from plaintrain.data import build_detection_train_loader
from plaintrain.data.loader import TrainLoader
from plaintrain.data.samplers import TrainingSampler

REFERENCES = "as torchvision's references, 2 processes"


class PillowDataset(Dataset):
    """Endless samples, made with Pillow as in torchvision's detection references."""

    def __init__(self, records: list[dict[str, Any]], short_sides: Sequence[int], max_size: int) -> None:
        self._records = records
        self._short_sides = short_sides
        self._max_size = max_size

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


def make_reference(cfg: CfgNode, records: list[dict[str, Any]]) -> DataLoader:
    """Build the loader of torchvision's references."""
    dataset = PillowDataset(records, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
    return DataLoader(dataset, cfg.SOLVER.IMS_PER_BATCH, num_workers=2, collate_fn=list)


def make_loader(cfg: CfgNode, records: list[dict[str, Any]]) -> TrainLoader:
    """Build plaintrain's loader."""
    return build_detection_train_loader(cfg, dataset=records)


def make_cfg(batch: int, options: Sequence[Any] = ()) -> CfgNode:
    """Return a config with two workers and several image sizes."""
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", batch, "DATALOADER.NUM_WORKERS", 2])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", tuple(range(640, 801, 32)), "INPUT.MAX_SIZE_TRAIN", 1333])
    cfg.merge_from_list(list(options))
    return cfg


def ms_per_image(
    make: Callable[[CfgNode, list[dict[str, Any]]], Iterable[Any]],
    options: Sequence[Any],
    records: list[dict[str, Any]],
    args: argparse.Namespace,
) -> float:
    """Return the wall time per image of a loader after its first batches."""
    stream = itertools.islice(make(make_cfg(args.batch, options), records), args.skipped + args.batches)
    for _ in range(args.skipped):
        next(stream)
    start = time.perf_counter()
    num_images = sum(len(batch) for batch in stream)
    return (time.perf_counter() - start) / num_images * 1000


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """Limit this process and its children to two cores within the context."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def measure_images(args: argparse.Namespace) -> Results:
    """Measure the wall time per image of each loader."""
    workers = {"process": "2 processes", "thread": "2 threads"}
    makers: dict[str, tuple[Callable[..., Iterable[Any]], tuple[Any, ...]]] = {
        REFERENCES: (make_reference, ())
    }
    makers |= {name: (make_loader, ("DATALOADER.WORKER_TYPE", type_)) for type_, name in workers.items()}
    caching = ("DATALOADER.WORKER_TYPE", "thread", "DATALOADER.CACHE_BYTES", 1 << 30)
    makers["2 threads, decoded images kept"] = (make_loader, caching)
    with tempfile.TemporaryDirectory() as files, two_cores():
        records = write_images(files, args.files)
        functions = {
            name: functools.partial(ms_per_image, *maker, records, args) for name, maker in makers.items()
        }
        table = make_rows(in_turns(functions, args.repeats, warm_up=False))
    for row in table.values():
        row["images/s"] = 1000 / row["median"]
    default = get_cfg().DATALOADER.WORKER_TYPE
    chosen = workers["thread" if default == "auto" else default]
    wanted = target(f"loader, the default ({chosen}): times the images/s", 3, table[chosen]["times less"])
    return {"wall time of an image, ms": table}, [wanted]


def compute_padding(sampler: TrainingSampler, widths: np.ndarray, heights: np.ndarray) -> float:
    """Return the fraction of padding in two epochs of batches, images resized to at most 800 x 1333."""
    scale = np.minimum(800 / np.minimum(heights, widths), 1333 / np.maximum(heights, widths))
    heights = (heights * scale).round()
    widths = (widths * scale).round()
    image_area = batch_area = 0
    for iteration in range(2 * sampler.size // sampler.batch_size):
        batch = [image for image, _ in sampler.get_batch(iteration)]
        image_area += (heights[batch] * widths[batch]).sum()
        batch_area += heights[batch].max() * widths[batch].max() * len(batch)
    return 1 - image_area / batch_area


def measure_padding(args: argparse.Namespace) -> Results:
    """Compute the padding of batches in several orders."""
    widths, heights = read_sizes(8000)
    window = get_cfg().DATALOADER.GROUP_WINDOW
    groupings = {
        "random order": {},
        "two groups (GROUP_WINDOW 0)": {"groups": widths >= heights},
        "window of 20 batches": {"groups": widths / heights, "window": 20},
        f"window of {window} batches (default)": {"groups": widths / heights, "window": window},
    }
    table = {}
    for name, keys in groupings.items():
        sampler = TrainingSampler(widths.size, args.batch, seed=1, **keys)
        table[name] = {"%": 100 * compute_padding(sampler, widths, heights)}
    wanted = target(f"padding at batch {args.batch}, {name}, %", 3, table[name]["%"], at_most=True)
    return {f"padding at batch {args.batch}": table}, [wanted]


def measure_memory(args: argparse.Namespace) -> Results:
    """Measure the peak memory of threads and processes."""
    table = {}
    for worker_type in ("thread", "process"):
        peak, largest = fresh(measure_peak, worker_type, args.batch, args.batches, args.files)
        table[worker_type] = {"MB": peak, "times the largest batch": peak / largest}
    return {f"memory of two workers, batch {args.batch}": table}, []


def measure_peak(worker_type: str, batch: int, batches: int, files: int) -> tuple[float, float]:
    """Return (peak MB of a loader, MB of the largest batch)."""
    torch.set_num_threads(1)
    # As in default_setup.
    gc.freeze()
    used = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        records = write_images(folder, files)
        before = read_memory(os.getpid(), "Pss:")
        loader = make_loader(make_cfg(batch, ["DATALOADER.WORKER_TYPE", worker_type]), records)
        for samples in itertools.islice(loader, batches):
            # A slow step, so that all queues fill up.
            time.sleep(1.5)
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            used.append(sum(read_memory(pid, "Pss:") for pid in pids))
            sizes.append(sum(sample["image"].nbytes for sample in samples) / 2**20)
    return max(used) - before, max(sizes)


MEASUREMENTS = {"images": measure_images, "padding": measure_padding, "memory": measure_memory}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("data", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(MEASUREMENTS), default=["images", "padding"])
    parser.add_argument("--batch", type=positive, default=16, help="batch size")
    parser.add_argument("--batches", type=positive, default=20, help="measured batches per round of images")
    parser.add_argument("--skipped", type=positive, default=6, help="warm-up batches per round")
    parser.add_argument("--files", type=positive, default=64, help="number of different images")
    quick = {"batch": 4, "batches": 1, "skipped": 1, "files": 4}
    args = parse_args(parser, repeats=5, quick=quick)
    torch.set_num_threads(1)
    run_parts(args, MEASUREMENTS)


if __name__ == "__main__":
    run(main)
