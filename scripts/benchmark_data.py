#!/usr/bin/env python
"""Measure what loading a training set of COCO's size costs, on synthetic records.

python scripts/benchmark_data.py time
python scripts/benchmark_data.py memory
python scripts/benchmark_data.py time memory --images 20000 --output data.json
python scripts/benchmark_data.py images --repeats 7

`time` is CPU time from reading the annotation file to the first batch, checks included, and that of a
plain `json.load` of the same file; each in a fresh process, in turns. `memory` is what a worker
process has for itself (unique set size, Linux only) after an epoch, beside a worker of 100 records,
with workers that are forked and with spawned ones. The files of both, some 470 MB at COCO's 117,000
images, are kept in --folder for the next time.
`images` is wall time per image of the training loader with two workers on two cores, processes and threads,
and of a loader written after torchvision's detection references: Pillow decodes, resizes and flips, tensors
are floats, PyTorch's DataLoader has two processes. JPEG files of 640x480, shorter side 640 to 800, seven
boxes; in turns, after a start that is not counted.
Numbers are medians.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader, register_coco_instances
from plaintrain.structures import BoxMode

_BATCH = 16
_CLASSES = 80
# As COCO's train2017: annotations per image, and points per polygon (a log-normal distribution).
_PER_IMAGE, _POINTS, _SPREAD = 7.3, 20, 0.6


def write_dataset(folder, images):
    """A COCO file with `images` images of 640x480 and empty image files; returns (json, root)."""
    path, root = os.path.join(folder, "instances.json"), os.path.join(folder, "images")
    if os.path.exists(path):
        return path, root
    os.makedirs(root, exist_ok=True)
    rng = np.random.default_rng(0)
    sizes = np.maximum(3, rng.lognormal(np.log(_POINTS), _SPREAD, size=2000).astype(int))
    polygons = [json.dumps([rng.uniform(1, 480, size=2 * n).round(2).tolist()]) for n in sizes]
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write('{"images": [')
        for i in range(images):
            name = f"{i:012d}.jpg"
            open(os.path.join(root, name), "w").close()
            f.write(", " * (i > 0))
            json.dump(_image(i, name), f)
        f.write('], "annotations": [')
        for i, number in enumerate(np.repeat(np.arange(images), rng.geometric(1 / _PER_IMAGE, size=images))):
            f.write(", " * (i > 0) + _annotation(i, number, polygons, rng))
        f.write('], "categories": ')
        json.dump([{"id": i + 1, "name": f"class {i}"} for i in range(_CLASSES)], f)
        f.write("}")
    os.replace(path + ".part", path)
    return path, root


def _image(number, name):
    """An entry of `images` with all that COCO's have."""
    url = f"http://images.cocodataset.org/train2017/{name}"
    size = {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45"}
    return {"license": 3, "file_name": name, "coco_url": url, **size, "flickr_url": url, "id": number}


def _annotation(number, image, polygons, rng):
    """An entry of `annotations`, as text: `json.dumps` of a million polygons takes minutes."""
    x, y, w, h = rng.integers(1, 24000, size=4) / 100
    return (
        f'{{"segmentation": {polygons[rng.integers(len(polygons))]}, "area": {w * h / 2}, "iscrowd": 0, '
        f'"image_id": {image}, "bbox": [{x}, {y}, {w}, {h}], "category_id": {rng.integers(_CLASSES) + 1}, '
        f'"id": {number}}}'
    )


def _touch(record):
    """A mapper that looks at the record alone."""
    return record["image_id"], len(record["annotations"])


def _make_loader(path, root, num_workers):
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", _BATCH, "DATALOADER.NUM_WORKERS", num_workers])
    register_coco_instances("synthetic", {}, path, root)
    cfg.DATASETS.TRAIN = ("synthetic",)
    return build_detection_train_loader(cfg, mapper=_touch)


def parse(path, root):
    """CPU seconds of `json.load`."""
    start = time.process_time()
    with open(path, encoding="utf-8") as f:
        json.load(f)
    return time.process_time() - start


def first_batch(path, root):
    """CPU seconds from the annotation file to the first batch, without the cache of parsed files."""
    os.environ["PLAINTRAIN_CACHE"] = ""
    start = time.process_time()
    next(iter(_make_loader(path, root, num_workers=0)))
    return time.process_time() - start


def worker_memory(path, root, images, start_method):
    """The largest unique set size of two workers after an epoch over `images` images, in MB."""
    multiprocessing.set_start_method(start_method, force=True)
    batches = iter(_make_loader(path, root, num_workers=2))
    for _ in range(-(-images // _BATCH)):
        next(batches)
    return max(_unique_set_size(child.pid) for child in multiprocessing.active_children())


def _unique_set_size(pid):
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
        rows = [line.split() for line in f if line.startswith("Private_")]
    return sum(int(row[1]) for row in rows) / 1024


def fresh(function, *args):
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure_time(folder, images, repeats):
    """Print and return the times."""
    files = write_dataset(os.path.join(folder, str(images)), images)
    rows = [(fresh(parse, *files), fresh(first_batch, *files)) for _ in range(repeats)]
    ratio = statistics.median(ours / plain for plain, ours in rows)
    for plain, ours in rows:
        print(f"json.load {plain:6.2f} s   to the first batch {ours:6.2f} s   {ours / plain:.2f} times")
    print(f"to the first batch: {ratio:.2f} times json.load (median)")
    return {
        "json_load_s": [row[0] for row in rows],
        "first_batch_s": [row[1] for row in rows],
        "ratio": ratio,
    }


def measure_memory(folder, images, repeats):
    """Print and return the private memory of a worker; both loaders load as many samples."""
    result = {}
    for start in ("fork", "spawn"):
        sizes = {}
        for size in (100, images):
            files = write_dataset(os.path.join(folder, str(size)), size)
            sizes[size] = statistics.median(
                fresh(worker_memory, *files, images, start) for _ in range(repeats)
            )
        result[start] = {**sizes, "over": sizes[images] - sizes[100]}
        print(
            f"{start}: a worker has {sizes[images]:.1f} MB for itself, {sizes[100]:.1f} MB of 100 records: "
            f"{result[start]['over']:.1f} MB more"
        )
    return result


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


def ms_per_image(make, records, batches, skipped=6):
    """Wall time per image of a loader, after its first batches."""
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", _BATCH, "DATALOADER.NUM_WORKERS", 2])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", tuple(range(640, 801, 32)), "INPUT.MAX_SIZE_TRAIN", 1333])
    stream = itertools.islice(make(cfg, records), skipped + batches)
    for _ in range(skipped):
        next(stream)
    start = time.perf_counter()
    number = sum(len(batch) for batch in stream)
    return (time.perf_counter() - start) / number * 1000


def time_images(repeats, batches=20):
    """{loader: wall time per image of each turn, ms}."""
    torch.set_num_threads(1)
    makers = {"as torchvision's references, 2 processes": _reference_loader}
    for kind, name in (("process", "2 processes"), ("thread", "2 threads")):
        makers[name] = functools.partial(_own_loader, kind)
    makers["2 threads, decoded images kept"] = functools.partial(_own_loader, "thread", cached=1 << 30)
    times = {name: [] for name in makers}
    with tempfile.TemporaryDirectory() as files:
        records = write_images(files)
        for _ in range(repeats):
            for name, make in makers.items():
                times[name].append(ms_per_image(make, records, batches))
    return times


def measure_images(folder, images, repeats):
    """Print and return the wall time per image of each loader."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:2])
    times = time_images(repeats)
    if cores:
        os.sched_setaffinity(0, cores)
    base = next(iter(times.values()))
    for name, values in times.items():
        middle = statistics.median(values)
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        print(
            f"{name}: {middle:.2f} ms per image ({min(values):.2f} to {max(values):.2f}), "
            f"{1000 / middle:.0f} images/s, {ratio:.2f} times as many as the first (median of the turns)"
        )
    return times


MEASUREMENTS = {"time": measure_time, "memory": measure_memory, "images": measure_images}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=list(MEASUREMENTS), help="what to measure")
    parser.add_argument("--images", type=int, default=117000, help="size of the set for time and memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "plaintrain-benchmark"))
    parser.add_argument("--output", help="also write the numbers as JSON to this file")
    args = parser.parse_args()
    if args.images < 100 or args.repeats < 1:
        parser.error("--images must be at least 100 and --repeats at least 1")
    print(f"torch {torch.__version__}, python {platform.python_version()}, {os.cpu_count()} cores")
    result = {what: MEASUREMENTS[what](args.folder, args.images, args.repeats) for what in args.what}
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
