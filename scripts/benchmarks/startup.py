"""Seconds from a command to `--help`, and to the end of the first training iteration, in fresh processes.

Faster R-CNN R50-FPN on COCO's train2017 in $PLAINTRAIN_DATASETS (or a few synthetic images), small images, a
batch of 2, no loader workers, random weights, one CPU thread. The baseline is a start-up as in Detectron2,
written with torch, torchvision and pycocotools: import everything, parse the COCO file, make and serialize
records, build the model. Each process is killed when it prints its first iteration. Detectron2 and
MMDetection are measured if they are installed. Interleaved, after a warm-up round that fills the file caches
of the system and of plaintrain.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable

from shared.measure import (
    Table,
    in_turns,
    installed,
    make_rows,
    parse_args,
    positive,
    report,
    run,
    run_fresh,
    target,
)

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))
_JSON = "coco/annotations/instances_train2017.json"
_IMAGES = "coco/train2017"
_PARTS = ["help", "iteration"]
THEIRS = "as Detectron2's"
OURS = "plaintrain"


def make_coco(root: str, num_images: int = 20) -> None:
    """Write a COCO file and synthetic images below `root`, with COCO's paths."""
    # These import torch.
    from shared.images import write_images

    from plaintrain.data.datasets.write import write_coco

    for path in (os.path.dirname(_JSON), _IMAGES):
        os.makedirs(os.path.join(root, path))
    records = write_images(os.path.join(root, _IMAGES), num_images)
    names = [os.path.basename(record["file_name"]) for record in records]
    write_coco(
        os.path.join(root, _JSON), records, {"thing_classes": [f"class {i}" for i in range(80)]}, names
    )


def plaintrain_options(args: argparse.Namespace, folder: str) -> list[str]:
    """Return the options of plain_train_net.py; it logs every iteration."""
    config = os.path.join(_ROOT, "configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    keys = {
        "MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "MODEL.RESNETS.DEPTH": args.depth, "SEED": 1,
        "DATASETS.TEST": "()", "DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": args.batch,
        "INPUT.MIN_SIZE_TRAIN": f"({args.size},)", "SOLVER.BASE_LR": 1e-5, "LOG_PERIOD": 1,
        "OUTPUT_DIR": tempfile.mkdtemp(dir=folder),
    }  # fmt: skip
    return ["--config-file", config, *(str(item) for pair in keys.items() for item in pair)]


def make_variants(
    args: argparse.Namespace, root: str, folder: str
) -> list[dict[str, Callable[[], tuple[float, float]]]]:
    """Return the functions that measure --help, and those for the first iteration, by name."""
    sizes = ["--size", args.size, "--batch", args.batch, "--depth", args.depth]
    files = [os.path.join(root, _JSON), os.path.join(root, _IMAGES), *map(str, sizes)]
    ours = [sys.executable, os.path.join(_ROOT, "scripts", "plain_train_net.py")]
    others = {THEIRS: ("start", "iter: 0")}
    marks = {"detectron2": "iter: 0", "mmdet": "Epoch(train)"}
    others |= {name: (name, marks[name]) for name in installed(*marks)}
    # Each run needs a new OUTPUT_DIR.
    helps: dict[str, Callable[[], tuple[float, float]]] = {OURS: lambda: run_fresh([*ours, "--help"])}
    starts: dict[str, Callable[[], tuple[float, float]]] = {
        OURS: lambda: run_fresh([*ours, *plaintrain_options(args, folder)], "iter: 0")
    }
    for name, (stem, mark) in others.items():
        command = [sys.executable, "-m", f"baselines.run_{stem}"]
        helps[name] = functools.partial(run_fresh, [*command, "--help"])
        starts[name] = functools.partial(run_fresh, [*command, *files], mark)
    # The baseline comes first.
    return [{name: variants[name] for name in (THEIRS, *variants)} for variants in (helps, starts)]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("startup", description=__doc__)
    parser.add_argument("--size", type=positive, default=160, help="shorter side of the images, pixels")
    parser.add_argument("--batch", type=positive, default=2, help="batch size")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50, help="ResNet depth")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to time")
    args = parse_args(parser, repeats=5, quick={"size": 64, "batch": 1, "depth": 18})
    path = os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    tables: dict[str, Table] = {}
    targets = []
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.abspath(os.environ.get("PLAINTRAIN_DATASETS", "datasets"))
        if not os.path.isfile(os.path.join(root, _JSON)):
            root = os.path.join(folder, "datasets")
            make_coco(root)
        os.environ |= {"PLAINTRAIN_DATASETS": root, "PLAINTRAIN_CACHE": os.path.join(folder, "cache")}
        for name, functions in zip(_PARTS, make_variants(args, root, folder), strict=True):
            if name not in args.parts:
                continue
            times = in_turns(functions, args.repeats, warm_up=not args.quick)
            for i, clock in enumerate(("CPU", "wall")):
                values = {variant: [pair[i] for pair in pairs] for variant, pairs in times.items()}
                tables[f"to {name}, {clock} s"] = make_rows(values)
        if "iteration" in args.parts:
            ratio = tables["to iteration, CPU s"][OURS]["times less"]
            targets.append(target("start to the first iteration: times less CPU", 1.3, ratio))
    report(args, tables, targets)


if __name__ == "__main__":
    run(main)
