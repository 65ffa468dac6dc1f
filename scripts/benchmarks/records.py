"""CPU time and memory of loading a training set of COCO's size, with synthetic records.

`time` is CPU time from reading the annotation file to the first batch, checks included, and that of a
plain `json.load` of the same file; each in a fresh process, interleaved. `memory` is the unique set size
(Linux only) of a worker process after an epoch, compared with a worker for 100 records, with forked and with
spawned workers. The files of both, about 470 MB for COCO's 117,000 images, are kept in --folder for reuse.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
from shared.measure import (
    Results,
    fresh,
    in_turns,
    make_rows,
    parse_args,
    positive,
    read_memory,
    run,
    run_parts,
)

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, build_detection_train_loader, register_coco_instances
from plaintrain.evaluation.predictions import write_json

_BATCH = 16
_CLASSES = 80
# As in COCO's train2017: annotations per image, and the log-normal distribution of points per polygon.
_PER_IMAGE = 7.3
_POINTS = 20
_SPREAD = 0.6


def write_dataset(folder: str, images: int) -> tuple[str, str]:
    """Write a COCO file of 640x480 images and empty image files, and return (json, root)."""
    path = os.path.join(folder, "instances.json")
    root = os.path.join(folder, "images")
    if os.path.exists(path):
        return path, root
    os.makedirs(root, exist_ok=True)
    rng = np.random.default_rng(0)
    sizes = np.maximum(3, rng.lognormal(np.log(_POINTS), _SPREAD, size=2000).astype(int))
    polygons = [[rng.uniform(1, 480, size=2 * n).round(2).tolist()] for n in sizes]
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    for i in range(images):
        name = f"{i:012d}.jpg"
        open(os.path.join(root, name), "w").close()
        content["images"].append(_make_image(i, name))
        for _ in range(rng.geometric(1 / _PER_IMAGE)):
            polygon = polygons[rng.integers(len(polygons))]
            content["annotations"].append(_make_annotation(len(content["annotations"]), i, polygon, rng))
    content["categories"] = [{"id": i + 1, "name": f"class {i}"} for i in range(_CLASSES)]
    write_json(path, content)
    return path, root


def _make_image(id_, name):
    """Return an entry of `images` with all of COCO's keys."""
    url = f"http://images.cocodataset.org/train2017/{name}"
    size = {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45"}
    return {"license": 3, "file_name": name, "coco_url": url, **size, "flickr_url": url, "id": id_}


def _make_annotation(id_, image, polygon, rng):
    x, y, w, h = (rng.integers(1, 24000, size=4) / 100).tolist()
    outline = {"segmentation": polygon, "area": w * h / 2, "iscrowd": 0}
    category = int(rng.integers(_CLASSES)) + 1
    return {**outline, "image_id": image, "bbox": [x, y, w, h], "category_id": category, "id": id_}


def _touch(record):
    """Map a record without opening its image."""
    return record["image_id"], len(record["annotations"])


def _make_loader(path, root, num_workers):
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", _BATCH, "DATALOADER.NUM_WORKERS", num_workers])
    # A new name: the catalog would return the loaded records.
    name = f"benchmark_records_{len(DatasetCatalog.list())}"
    register_coco_instances(name, {}, path, root)
    cfg.DATASETS.TRAIN = (name,)
    return build_detection_train_loader(cfg, mapper=_touch)


def parse(path: str, root: str) -> float:
    """Return the CPU seconds of `json.load`."""
    start = time.process_time()
    with open(path, encoding="utf-8") as f:
        json.load(f)
    return time.process_time() - start


def first_batch(path: str, root: str, cache: str = "") -> float:
    """Return the CPU seconds from the annotation file to the first batch; `cache` is a folder or ""."""
    os.environ["PLAINTRAIN_CACHE"] = cache
    start = time.process_time()
    next(iter(_make_loader(path, root, num_workers=0)))
    return time.process_time() - start


def measure_worker(path: str, root: str, images: int, start_method: str) -> float:
    """Return the larger unique set size of two workers after an epoch, in MB."""
    multiprocessing.set_start_method(start_method, force=True)
    batches = iter(_make_loader(path, root, num_workers=2))
    for _ in range(-(-images // _BATCH)):
        next(batches)
    return max(read_memory(child.pid, "Private_") for child in multiprocessing.active_children())


def measure_time(args: argparse.Namespace) -> Results:
    """Return the CPU seconds to the first batch and of `json.load`."""
    files = write_dataset(os.path.join(args.folder, str(args.images)), args.images)
    cache = os.path.join(args.folder, "cache")
    functions = {
        "json.load": functools.partial(parse, *files),
        "to the first batch": functools.partial(first_batch, *files),
        "to the first batch, parsed before": functools.partial(first_batch, *files, cache),
    }
    first_batch(*files, cache)
    if not args.quick:
        functions = {name: functools.partial(fresh, f) for name, f in functions.items()}
    table = make_rows(in_turns(functions, args.repeats, warm_up=False))
    for row in table.values():
        row["times json.load"] = 1 / row["times less"]
    return {f"CPU, {args.images:,} images, s": table}, []


def measure_memory(args: argparse.Namespace) -> Results:
    """Return the private memory of a worker, in MB."""
    table = {}
    for start in ("fork", "spawn"):
        sizes = {}
        for size in (100, args.images):
            files = write_dataset(os.path.join(args.folder, str(size)), size)
            sizes[size] = statistics.median(
                fresh(measure_worker, *files, args.images, start) for _ in range(args.repeats)
            )
        table[start] = {f"{size:,} records": mb for size, mb in sizes.items()}
        table[start]["more"] = sizes[args.images] - sizes[100]
    return {"private memory of a worker, MB": table}, []


MEASUREMENTS = {"time": measure_time, "memory": measure_memory}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("records", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--images", type=positive, default=117000, help="number of images")
    default = os.path.join(tempfile.gettempdir(), "plaintrain-benchmark")
    parser.add_argument("--folder", default=default, help="folder of the generated files")
    args = parse_args(parser, repeats=3, quick={"images": 100, "parts": ["time"]})
    if "memory" in args.parts and not sys.platform.startswith("linux"):
        parser.error("--parts memory needs Linux; give --parts time")
    run_parts(args, MEASUREMENTS)


if __name__ == "__main__":
    run(main)
