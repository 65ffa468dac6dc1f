"""What loading a training set of COCO's size costs, on synthetic records.

`time` is CPU time from reading the annotation file to the first batch, checks included, and that of a
plain `json.load` of the same file; each in a fresh process, in turns. `memory` is what a worker
process has for itself (unique set size, Linux only) after an epoch, beside a worker of 100 records,
with workers that are forked and with spawned ones. The files of both, some 470 MB at COCO's 117,000
images, are kept in --folder for the next time.
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

import numpy as np
from shared.measure import fresh, in_turns, make_rows, parse_args, positive, read_memory, run, run_parts

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, build_detection_train_loader, register_coco_instances
from plaintrain.evaluation.predictions import write_json

_BATCH, _CLASSES = 16, 80
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
    polygons = [[rng.uniform(1, 480, size=2 * n).round(2).tolist()] for n in sizes]
    content = {"images": [], "annotations": []}
    for i in range(images):
        name = f"{i:012d}.jpg"
        open(os.path.join(root, name), "w").close()
        content["images"].append(_image(i, name))
        for _ in range(rng.geometric(1 / _PER_IMAGE)):
            polygon = polygons[rng.integers(len(polygons))]
            content["annotations"].append(_annotation(len(content["annotations"]), i, polygon, rng))
    content["categories"] = [{"id": i + 1, "name": f"class {i}"} for i in range(_CLASSES)]
    write_json(path, content)
    return path, root


def _image(number, name):
    """An entry of `images` with all that COCO's have."""
    url = f"http://images.cocodataset.org/train2017/{name}"
    size = {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45"}
    return {"license": 3, "file_name": name, "coco_url": url, **size, "flickr_url": url, "id": number}


def _annotation(number, image, polygon, rng):
    """An entry of `annotations`."""
    x, y, w, h = (rng.integers(1, 24000, size=4) / 100).tolist()
    outline = {"segmentation": polygon, "area": w * h / 2, "iscrowd": 0}
    category = int(rng.integers(_CLASSES)) + 1
    return {**outline, "image_id": image, "bbox": [x, y, w, h], "category_id": category, "id": number}


def _touch(record):
    """A mapper that looks at the record alone."""
    return record["image_id"], len(record["annotations"])


def _make_loader(path, root, num_workers):
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", _BATCH, "DATALOADER.NUM_WORKERS", num_workers])
    # Each loader reads the file anew.
    name = f"benchmark_records_{len(DatasetCatalog.list())}"
    register_coco_instances(name, {}, path, root)
    cfg.DATASETS.TRAIN = (name,)
    return build_detection_train_loader(cfg, mapper=_touch)


def parse(path, root):
    """CPU seconds of `json.load`."""
    start = time.process_time()
    with open(path, encoding="utf-8") as f:
        json.load(f)
    return time.process_time() - start


def first_batch(path, root, cache=""):
    """CPU seconds from the annotation file to the first batch; `cache` keeps parsed files, "" does not."""
    os.environ["PLAINTRAIN_CACHE"] = cache
    start = time.process_time()
    next(iter(_make_loader(path, root, num_workers=0)))
    return time.process_time() - start


def worker_memory(path, root, images, start_method):
    """The largest unique set size of two workers after an epoch over `images` images, in MB."""
    multiprocessing.set_start_method(start_method, force=True)
    batches = iter(_make_loader(path, root, num_workers=2))
    for _ in range(-(-images // _BATCH)):
        next(batches)
    return max(read_memory(child.pid, "Private_") for child in multiprocessing.active_children())


def measure_time(args):
    """({title: rows}, no targets) of the CPU seconds to the first batch, beside those of `json.load`."""
    files = write_dataset(os.path.join(args.folder, str(args.images)), args.images)
    cache = os.path.join(args.folder, "cache")
    calls = {
        "json.load": (parse, *files),
        "to the first batch": (first_batch, *files),
        "to the first batch, parsed before": (first_batch, *files, cache),
    }
    first_batch(*files, cache)
    if not args.quick:
        calls = {name: (fresh, *call) for name, call in calls.items()}
    functions = {name: functools.partial(*call) for name, call in calls.items()}
    rows = make_rows(in_turns(functions, args.repeats, warm_up=False))
    for row in rows.values():
        row["times json.load"] = 1 / row["times less"]
    return {f"CPU, {args.images:,} images, s": rows}, []


def measure_memory(args):
    """({title: rows}, no targets) of the private memory of a worker, MB; both load as many samples."""
    folder, images, repeats, result = args.folder, args.images, args.repeats, {}
    for start in ("fork", "spawn"):
        sizes = {}
        for size in (100, images):
            files = write_dataset(os.path.join(folder, str(size)), size)
            sizes[size] = statistics.median(
                fresh(worker_memory, *files, images, start) for _ in range(repeats)
            )
        result[start] = {f"{size:,} records": mb for size, mb in sizes.items()}
        result[start]["more"] = sizes[images] - sizes[100]
    return {"private memory of a worker, MB": result}, []


MEASUREMENTS = {"time": measure_time, "memory": measure_memory}


def main():
    """Measure and report."""
    parser = argparse.ArgumentParser("records", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--images", type=positive, default=117000, help="size of the set")
    default = os.path.join(tempfile.gettempdir(), "plaintrain-benchmark")
    parser.add_argument("--folder", default=default, help="where the files are kept")
    args = parse_args(parser, repeats=3, quick={"images": 100, "parts": ["time"]})
    if "memory" in args.parts and not sys.platform.startswith("linux"):
        parser.error("the memory of a worker is measured on Linux only; give --parts time")
    run_parts(args, MEASUREMENTS)


if __name__ == "__main__":
    run(main)
