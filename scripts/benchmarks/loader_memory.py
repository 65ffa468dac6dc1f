#!/usr/bin/env python
"""Peak host memory of the training loader, with threads and with processes.

python scripts/benchmarks/loader_memory.py
python scripts/benchmarks/loader_memory.py --workers 4 --batch 32

JPEG files of 640x480, shorter side 640 to 800. The training is slower than the loader, so that as much waits
as ever does. Memory is the proportional set size of the process and its workers (Linux only), which counts
what they share once, over what the process had before the loader was built; each loader in a fresh process.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader
from plaintrain.structures import BoxMode

_BOX = {"bbox": [100, 100, 300, 400], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}


def write_images(folder, number=32):
    """Image files of noise, and their records."""
    records, rng = [], np.random.default_rng(0)
    for i in range(number):
        path = os.path.join(folder, f"{i}.jpg")
        Image.fromarray(rng.integers(0, 256, size=(480, 640, 3), dtype=np.uint8)).save(path)
        size = {"height": 480, "width": 640}
        records.append({"file_name": path, "image_id": i, **size, "annotations": [_BOX]})
    return records


def memory():
    """Proportional set size of this process and its children, MB."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        # A worker may end meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
            total += sum(int(line.split()[1]) for line in f if line.startswith("Pss:"))
    return total / 1024


def peak(kind, workers, batch, folder, batches=12, step=1.5):
    """(MB over what the process had before, MB of the largest batch) of one loader."""
    torch.set_num_threads(1)
    # As default_setup does.
    gc.freeze()
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", batch, "DATALOADER.NUM_WORKERS", workers])
    cfg.merge_from_list(["DATALOADER.WORKER_TYPE", kind, "INPUT.MIN_SIZE_TRAIN", tuple(range(640, 801, 32))])
    records, before, found, done = write_images(folder), memory(), [], threading.Event()

    def look():
        while not done.wait(0.1):
            found.append(memory())

    watch, largest = threading.Thread(target=look), 0
    watch.start()
    for samples, _ in zip(build_detection_train_loader(cfg, dataset=records), range(batches), strict=False):
        largest = max(largest, sum(sample["image"].nbytes for sample in samples))
        time.sleep(step)
    done.set()
    watch.join()
    return max(found) - before, largest / 2**20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    for kind in ("thread", "process"):
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                job = pool.submit(peak, kind, args.workers, args.batch, folder)
                found, largest = job.result()
        print(
            f"{args.workers} workers of type {kind}, batch {args.batch}: peak {found:.0f} MB, "
            f"{found / largest:.1f} times the largest batch ({largest:.0f} MB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
