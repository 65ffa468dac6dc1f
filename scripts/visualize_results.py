#!/usr/bin/env python
"""Draw predictions beside the truth, the images first where most went wrong.

python scripts/visualize_results.py output/quickstart --grid errors.jpg
python scripts/visualize_results.py output/quickstart --kind missed --kind class --output pictures
python scripts/visualize_results.py --predictions FILE.json --dataset shapes_val --class circle --show
python scripts/visualize_results.py --config-file my.yaml --predictions FILE.json --grid errors.jpg

RUN is a training's OUTPUT_DIR: its config.yaml, and inference/DATASET/coco_instances_results.json of its
last evaluation. --predictions takes any file in COCO's results format instead.

What is wrong is told apart as by TIDE (https://arxiv.org/abs/2008.08115): an object is missed; a detection
is poorly placed (localisation), of the wrong class, both, a duplicate, or on the background. On the left
are the objects, on the right the detections, each in the colour of what became of it.
"""

import argparse

from plaintrain.utils.arguments import add_picture_arguments

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="a run's folder")
    parser.add_argument("--predictions", default="", metavar="FILE", help="JSON in COCO's results format")
    parser.add_argument("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config that declares it")
    parser.add_argument(
        "--kind",
        action="append",
        choices=("missed", "class", "localisation", "both", "duplicate", "background"),
        help="images with this kind of error only; may be given again",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that counts (default 0.5)")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a correct detection (default 0.5)")
    parser.add_argument(
        "--task", choices=("bbox", "segm"), default="bbox", help="whose IoU: of boxes, or of masks"
    )
    add_picture_arguments(parser)
    args = parser.parse_args()

import os
from collections import Counter

import numpy as np
import torch

from plaintrain.analysis.errors import errors_of
from plaintrain.config import get_cfg
from plaintrain.data import MetadataCatalog
from plaintrain.data.catalog import class_names, select_classes
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import PREDICTIONS_FILE, detections_of_image, read_detections
from plaintrain.utils.errors import UserError
from plaintrain.utils.logger import progress
from plaintrain.visualization.drawing import (
    contact_sheet,
    default_captions,
    draw_instances,
    record_instances,
    scale_to,
    select,
    skeleton_of,
)
from plaintrain.visualization.images import check_picture_arguments, save_picture, show_picture

# What became of a detection or an object -> (its colour, what the legend says).
LOOKS = {
    "correct": ((0, 160, 80), "correct"),
    "missed": ((225, 25, 40), "missed"),
    "class": ((150, 70, 230), "class: the wrong one"),
    "localisation": ((255, 140, 0), "localisation: poorly placed"),
    "both": ((140, 90, 50), "both: wrong class and place"),
    "duplicate": ((0, 130, 255), "duplicate"),
    "background": ((240, 70, 190), "background: nothing is there"),
    "ignored": ((130, 130, 130), "does not count: crowd"),
}
_WRONG = [kind for kind in LOOKS if kind not in ("correct", "ignored")]


def object_kinds(matches):
    """Of each object what became of it, a key of `LOOKS`."""
    names = {"found": "correct", "missed": "missed", "crowd": "ignored"}
    kinds = []
    for state, detection in zip(matches.states.tolist(), matches.detections.tolist(), strict=True):
        kinds.append(matches.kinds[detection].item() if state == "erroneous" else names[state])
    return kinds


def classes_of(objects, detections, matches):
    """Of each detection the labels that it is about: its own, and where that is wrong the object's too."""
    found = []
    for label, kind, thing in zip(
        detections["labels"].tolist(), matches.kinds.tolist(), matches.objects.tolist(), strict=True
    ):
        found.append({label, int(objects["labels"][thing])} if kind in ("class", "both") else {label})
    return found


def count_errors(errors, labels):
    """A `Counter` of what is wrong in each image; of some classes, a set of labels, if it is not empty."""
    counts = [Counter() for _ in range(len(errors.records))]
    m, objects, detections = errors.matches, errors.objects, errors.detections
    about = classes_of(objects, detections, m)
    for i, kind, of in zip(detections["image"].tolist(), m.kinds.tolist(), about, strict=True):
        if kind in _WRONG and (not labels or of & labels):
            counts[i][kind] += 1
    missed = np.flatnonzero(m.states == "missed")
    for i, label in zip(objects["image"][missed].tolist(), objects["labels"][missed].tolist(), strict=True):
        if not labels or label in labels:
            counts[i]["missed"] += 1
    return counts


def worst_first(counts, kinds):
    """The indices of the images with errors of these kinds, by their number."""
    numbers = [sum(count[kind] for kind in kinds) for count in counts]
    order = np.argsort([-number for number in numbers], kind="stable").tolist()
    return [i for i in order if numbers[i]]


def captions_of(detections, objects, matches, names):
    """What is written at each detection: the class, the score, and of a wrong class the right one."""
    texts = default_captions(detections, names)
    for i, (kind, thing) in enumerate(zip(matches.kinds.tolist(), matches.objects.tolist(), strict=True)):
        if kind in ("class", "both"):
            texts[i] += f" is {names[objects['labels'][thing]]}"
        elif kind in ("localisation", "duplicate"):
            texts[i] += f" IoU {matches.ious[i]:.2f}"
    return texts


def draw_pair(index, errors, found, args):
    """The picture of an image: its objects on the left, its detections on the right."""
    record = errors.records[index]
    image = read_image(record["file_name"], args.pixel_range)
    check_image_size(record, image)
    objects, table, matches = errors.of_image(index)
    truth, detections = record_instances(record), detections_of_image(found, index, args.threshold, record)
    # Of the objects nothing that detections do not have, either.
    truth = {key: value for key, value in truth.items() if key in detections or key == "crowds"}
    skeleton = skeleton_of(MetadataCatalog.get(args.dataset))
    about = [{label} for label in truth["labels"].tolist()], classes_of(objects, table, matches)
    kinds = object_kinds(matches), matches.kinds.tolist()
    texts = default_captions(truth, errors.classes), captions_of(detections, objects, matches, errors.classes)
    halves = []
    for instances, labels, of, text in zip((truth, detections), about, kinds, texts, strict=True):
        kept = [i for i, which in enumerate(labels) if not args.labels or which & args.labels]
        instances, text = select(instances, torch.tensor(kept, dtype=torch.int64)), [text[i] for i in kept]
        scaled, instances = scale_to(image, instances, max(args.size, *image.shape))
        colors = [LOOKS[of[i]][0] for i in kept]
        halves.append(draw_instances(scaled, instances, errors.classes, skeleton, text, colors))
    gap = torch.full((3, halves[0].shape[1], 4), 255, dtype=torch.uint8)
    return torch.cat([halves[0], gap, halves[1]], dim=2)


def setup(args):
    """Register the datasets, and find the predictions, after the checks of the command line."""
    check_picture_arguments(args)
    if bool(args.run) == bool(args.predictions):
        raise UserError("give either RUN, a run's folder, or --predictions FILE")
    if not (0 <= args.threshold <= 1 and 0 < args.iou <= 1):
        raise UserError("--threshold must be from 0 to 1, and --iou above 0 and at most 1")
    cfg, saved = get_cfg(), os.path.join(args.run, "config.yaml")
    if args.run and not args.config_file and not os.path.isfile(saved):
        what = "has no config.yaml" if os.path.isdir(args.run) else "does not exist"
        raise UserError(f"RUN {args.run} {what}: expected the OUTPUT_DIR of a training")
    if args.config_file or args.run:
        cfg.merge_from_file(args.config_file or saved)
    declare_datasets(cfg)
    args.pixel_range = get_pixel_range(cfg)
    args.dataset = args.dataset or next(iter(cfg.DATASETS.TEST), "")
    if not args.dataset:
        raise UserError("which dataset are the predictions of? Name it with --dataset")
    names = class_names(args.dataset)
    args.labels = {names.index(name) for name in select_classes(names, args.classes, args.dataset)}
    args.labels = args.labels if args.classes else set()
    args.predictions = args.predictions or os.path.join(args.run, "inference", args.dataset, PREDICTIONS_FILE)
    if not os.path.isfile(args.predictions):
        hint = ": evaluate the model on the dataset first" if args.run else ""
        raise UserError(f"there is no file {args.predictions} of predictions{hint}")


def main(args):
    """Match, draw, and write or show; prints what went wrong how often."""
    parts = ("masks", "keypoints")
    found = read_detections(args.predictions, args.dataset, parts)
    errors = errors_of(args.dataset, found, args.iou, args.threshold, args.task)
    counts = count_errors(errors, args.labels)
    totals = sum(counts, Counter())
    print(f"{args.dataset}, {len(counts)} images, scores from {args.threshold:g}, IoU {args.iou:g}:")
    for kind in _WRONG:
        print(f"  {LOOKS[kind][1]:<28}{totals[kind]:>8}")
    pictures, captions = [], []
    chosen = worst_first(counts, args.kind or _WRONG)[: args.num]
    for place, index in enumerate(progress(chosen, desc="pictures")):
        stem = os.path.splitext(os.path.basename(errors.records[index]["file_name"].split("?")[0]))[0]
        wrong = ", ".join(f"{counts[index][kind]} {kind}" for kind in _WRONG if counts[index][kind])
        picture = draw_pair(index, errors, found, args)
        if args.output:
            save_picture(os.path.join(args.output, f"{place + 1:04d}_{stem}.jpg"), picture)
        captions.append(f"{stem}, objects left, detections right: {wrong}")
        pictures.append(picture if args.grid or args.show else None)
    if not pictures:
        print("no image has such an error: there is nothing to draw")
        return
    if args.output:
        print(f"wrote {len(pictures)} pictures to {args.output}")
    if pictures[0] is None:
        return
    columns = min(max(1, args.columns // 2), len(pictures))
    legend = {text: color for color, text in LOOKS.values()}
    sheet = contact_sheet(pictures, captions, columns, columns * 2 * max(args.size, 320), legend)
    if args.grid:
        save_picture(args.grid, sheet)
        print(f"wrote {len(pictures)} pictures to {args.grid}")
    if args.show:
        show_picture(sheet, args.dataset)


if __name__ == "__main__":
    try:
        setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args,))
