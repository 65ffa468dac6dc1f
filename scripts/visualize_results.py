#!/usr/bin/env python
"""Draw predictions beside the truth, the images first where most went wrong.

python scripts/visualize_results.py output/quickstart --grid errors.jpg
python scripts/visualize_results.py output/quickstart --kind missed --kind classification --output pictures
python scripts/visualize_results.py --predictions FILE.json --dataset shapes_val --class circle --show
python scripts/visualize_results.py --config-file my.yaml --predictions FILE.json --grid errors.jpg

RUN is a training's OUTPUT_DIR: its config.yaml, and inference/DATASET/coco_instances_results.json of its
last evaluation. --predictions takes any file in COCO's results format instead.

What is wrong is told apart as by TIDE (https://arxiv.org/abs/2008.08115): an object is missed; a detection
is poorly localized, of the wrong class, both, a duplicate, or on the background. On the left
are the objects, on the right the detections, each in the colour of what became of it.
"""

from plaintrain.utils.arguments import add_image_arguments, build_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = build_parser(__doc__, "YAML config that declares it")
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="a run's folder")
    parser.add_argument("--predictions", default="", metavar="FILE", help="JSON in COCO's results format")
    parser.add_argument("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument(
        "--kind",
        action="append",
        choices=("missed", "classification", "localization", "both", "duplicate", "background"),
        help="images with this kind of error only; may be given again",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that counts (default 0.5)")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a correct detection (default 0.5)")
    parser.add_argument(
        "--task", choices=("bbox", "segm"), default="bbox", help="whose IoU: of boxes, or of masks"
    )
    add_image_arguments(parser)
    args = parser.parse_args()

import itertools

import numpy as np
import torch

from plaintrain.analysis.command import choose_predictions, load_tool_cfg
from plaintrain.analysis.errors import ERRORS, OUTCOMES, find_errors
from plaintrain.data import MetadataCatalog
from plaintrain.data.catalog import load_class_names, select_classes
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import read_detections
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import get_skeleton
from plaintrain.visualization.matches import draw_matches, involves_labels
from plaintrain.visualization.pictures import check_image_arguments, write_images


def count_errors(errors, labels):
    """Return {type: its number in each image}, of some classes, a list of labels, if it is not empty."""
    objects, detections, counts = errors.objects, errors.detections, {}
    chosen = (
        involves_labels(objects, detections, labels)
        if labels
        else np.ones(len(detections["type"]), dtype=bool)
    )
    is_missed = objects["state"] == "missed"
    is_missed &= np.isin(objects["labels"], labels) if labels else True
    for error in ERRORS:
        of_type = detections["image"][chosen & (detections["type"] == error)]
        images = objects["image"][is_missed] if error == "missed" else of_type
        counts[error] = np.bincount(images, minlength=len(errors.records))
    return counts


def setup(args):
    """Register the datasets, and find the predictions, after the checks of the command line."""
    check_image_arguments(args)
    if not (0 <= args.threshold <= 1 and 0 < args.iou <= 1):
        raise UserError("--threshold must be from 0 to 1, and --iou above 0 and at most 1")
    cfg = load_tool_cfg(args)
    args.pixel_range = get_pixel_range(cfg)
    choose_predictions(args, cfg)
    names = load_class_names(args.dataset)
    chosen = select_classes(names, args.classes, args.dataset) if args.classes else []
    args.labels = [names.index(name) for name in chosen]


def draw(errors, counts, args):
    """Iterate over (file name, caption, drawn image), the images first where most went wrong."""
    skeleton = get_skeleton(MetadataCatalog.get(args.dataset))
    num_errors = sum(counts[error] for error in args.kind or ERRORS)
    for index in np.argsort(-num_errors, kind="stable")[: np.count_nonzero(num_errors)].tolist():
        record = errors.records[index]
        image = read_image(record["file_name"], args.pixel_range)
        check_image_size(record, image)
        side = max(args.size, *image.shape)
        left, right = draw_matches(errors, index, image, side=side, skeleton=skeleton, labels=args.labels)
        gap = torch.full((3, left.shape[1], 4), 255, dtype=torch.uint8)
        wrong = ", ".join(f"{counts[error][index]} {error}" for error in ERRORS if counts[error][index])
        caption = f", objects left, detections right: {wrong}"
        yield record["file_name"], caption, torch.cat([left, gap, right], dim=2)


def main(args):
    """Match, draw, and write or show; prints what went wrong how often."""
    detections = read_detections(args.predictions, args.dataset)
    errors = find_errors(args.dataset, detections, args.iou, args.threshold, args.task)
    counts = count_errors(errors, args.labels)
    print(f"{args.dataset}, {len(errors.records)} images, scores from {args.threshold:g}, IoU {args.iou:g}:")
    legend = {f"{name}: {words}": color for name, (color, words) in OUTCOMES.items()}
    for error in ERRORS:
        print(f"  {f'{error}: {OUTCOMES[error][1]}':<48}{counts[error].sum():>8}")
    pictures = itertools.islice(draw(errors, counts, args), args.num)
    if not write_images(pictures, args, args.dataset, legend, width=2):
        print("no image has such an error: there is nothing to draw")


if __name__ == "__main__":
    try:
        setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args,))
