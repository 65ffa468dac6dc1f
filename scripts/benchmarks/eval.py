"""CPU time of COCO's box metrics: pycocotools, and COCOEvaluator with each installed backend.

From boxes in memory to the metrics, without a results file. The first row is pycocotools called directly, on
results as lists of dicts. Also compares the metrics with those of pycocotools.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shared.measure import Table, in_turns, make_rows, parse_args, positive, report, run, target, timed

from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.evaluation import COCOEvaluator
from plaintrain.evaluation.coco_backend import BACKENDS
from plaintrain.evaluation.coco_gt import build_coco_gt
from plaintrain.structures import BoxMode

_NAME = "benchmark_eval"
# Speedup over pycocotools; with the same backend only noise is tolerated.
WANTED = {"hotcoco": 20, "faster_coco_eval": 6, "pycocotools": 0.95}


def make_dataset(
    images: int, boxes: int, classes: int, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """Return records of up to 7 objects per image, and perturbed detections of them."""
    rng = np.random.default_rng(seed)
    records = []
    outputs = []
    for i in range(images):
        objects = np.concatenate([rng.uniform(0, 400, (7, 2)), np.exp(rng.uniform(2, 5.5, (7, 2)))], axis=1)
        labels = rng.integers(classes, size=7)
        size = rng.integers(1, 8)
        annotations = [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(label), "iscrowd": 0}
            for box, label in zip(objects[:size], labels[:size], strict=True)
        ]
        records.append({"image_id": i, "height": 640, "width": 640, "annotations": annotations})
        chosen = rng.integers(size, size=boxes)
        moved = objects[chosen] * np.exp(rng.normal(0, 0.1, (boxes, 4)))
        moved[:, 2:] += moved[:, :2]
        wrong = rng.random(boxes) < 0.5
        predicted = np.where(wrong, rng.integers(classes, size=boxes), labels[chosen])
        columns = {"boxes": moved, "scores": rng.random(boxes), "labels": predicted}
        outputs.append({name: torch.from_numpy(values) for name, values in columns.items()})
    return records, outputs


def compute_ap(
    gt: dict[str, Any], records: list[dict[str, Any]], outputs: list[dict[str, torch.Tensor]]
) -> float:
    """Return the AP in percent by plain pycocotools."""
    results: list[dict[str, Any]] = []
    for record, output in zip(records, outputs, strict=True):
        boxes = output["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), output["scores"].tolist(), output["labels"].tolist())
        results += [
            {"image_id": record["image_id"], "bbox": box, "score": score, "category_id": label}
            for box, score, label in zip(*columns, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = gt
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


def make_variants(images: int, boxes: int, classes: int) -> dict[str, Callable[[], Any]]:
    """Return {name: function that computes the metrics}."""
    records, outputs = make_dataset(images, boxes, classes)
    DatasetCatalog.register(_NAME, lambda: records)
    MetadataCatalog.get(_NAME).set(thing_classes=[f"class {i}" for i in range(classes)])
    gt = build_coco_gt("bbox", records, range(images), range(classes))
    variants: dict[str, Callable[[], Any]] = {
        "pycocotools alone": lambda: {"bbox": {"AP": compute_ap(gt, records, outputs)}}
    }
    for backend in reversed(BACKENDS):
        if importlib.util.find_spec(backend):
            # Do not measure the import.
            importlib.import_module(backend)
            evaluator = COCOEvaluator(_NAME)
            evaluator.backend = backend
            evaluator.process(records, outputs)
            variants[f"COCOEvaluator, {backend}"] = evaluator.evaluate
    DatasetCatalog.remove(_NAME)
    MetadataCatalog.remove(_NAME)
    return variants


def measure(variants: dict[str, Callable[[], Any]], repeats: int) -> Table:
    """Return seconds, AP, and whether the results are those of pycocotools."""
    results: dict[str, Any] = {}

    def keep(name):
        results[name] = variants[name]()

    calls = {name: timed(functools.partial(keep, name)) for name in variants}
    table = make_rows(in_turns(calls, repeats, warm_up=False))
    expected = results["COCOEvaluator, pycocotools"]
    for name, row in table.items():
        row["AP"] = f"{results[name]['bbox']['AP']:.8f}"
        if "Evaluator" in name:
            # Compare as text: NaN (no objects of a size) is not equal to itself.
            row["same results"] = repr(results[name]) == repr(expected)
    return table


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("eval", description=__doc__)
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--boxes", type=positive, default=100, help="detections per image")
    parser.add_argument("--classes", type=positive, default=80)
    args = parse_args(parser, repeats=3, quick={"images": 6, "boxes": 5, "classes": 3})
    torch.set_num_threads(1)
    table = measure(make_variants(args.images, args.boxes, args.classes), args.repeats)
    wanted = [
        target(f"{name}: times less than pycocotools alone", WANTED[name.split(", ")[1]], row["times less"])
        for name, row in table.items()
        if "Evaluator" in name
    ]
    title = f"CPU, {args.images:,} images of {args.boxes} boxes, {args.classes} classes, s"
    report(args, {title: table}, wanted)


if __name__ == "__main__":
    run(main)
