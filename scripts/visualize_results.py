#!/usr/bin/env python
"""Draw the ground truth and the predictions of images, those with the most errors first.

python scripts/visualize_results.py output/quickstart --grid errors.jpg
python scripts/visualize_results.py output/quickstart --error-type missed --error-type both --output images
python scripts/visualize_results.py --predictions FILE.json --dataset shapes_val --class circle --show
python scripts/visualize_results.py --config-file my.yaml --predictions FILE.json --grid errors.jpg

RUN is a training's OUTPUT_DIR; the predictions are those of its last evaluation,
inference/DATASET/coco_instances_results.json. --predictions takes any file in COCO's results format instead.

The error types are those of TIDE (https://arxiv.org/abs/2008.08115). The ground truth is on the left, the
detections are on the right, each in the color of its outcome.
"""

from plaintrain.utils.arguments import add_image_arguments, add_renamed_argument, build_parser

if __name__ == "__main__":
    # Parse before the slow imports, so that --help and errors are instant.
    parser = build_parser(__doc__, "YAML config that declares the dataset")
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder of a run (OUTPUT_DIR)")
    parser.add_argument("--predictions", default="", metavar="FILE", help="JSON in COCO's results format")
    parser.add_argument("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    types = ("missed", "classification", "localization", "both", "duplicate", "background")
    add_renamed_argument(
        parser,
        "--error-type",
        "--kind",
        action="append",
        choices=types,
        help="only images with this error; repeatable",
    )
    threshold = {"type": float, "default": 0.5}
    add_renamed_argument(
        parser,
        "--score-threshold",
        "--threshold",
        type=float,
        help="minimum score (default: highest F1, as in analyze_errors.py)",
    )
    add_renamed_argument(
        parser, "--iou-threshold", "--iou", help="IoU of a match (default: 0.5)", **threshold
    )
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox", help="IoU of boxes or of masks")
    add_image_arguments(parser)
    args = parser.parse_args()

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from plaintrain.analysis.breakdown import compute_best_thresholds
from plaintrain.analysis.command import choose_predictions, load_tool_cfg
from plaintrain.analysis.errors import ERRORS, OUTCOMES, Errors, describe_matching, find_errors
from plaintrain.data import MetadataCatalog
from plaintrain.data.catalog import load_class_names, select_classes
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import read_detections
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import get_skeleton
from plaintrain.visualization.images import check_image_arguments, write_images
from plaintrain.visualization.matches import draw_matches, involves_labels


def count_errors(errors: Errors, labels: Sequence[int]) -> dict[str, np.ndarray]:
    """Return {error type: count in each image}, of some classes, or without labels of all."""
    objects = errors.objects
    detections = errors.detections
    counts = {}
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


def setup(args: Namespace) -> None:
    """Check the command line, declare the datasets and locate the predictions."""
    check_image_arguments(args)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score-threshold must be 0 to 1, got {args.score_threshold:g}")
    if not 0 < args.iou_threshold <= 1:
        raise UserError(f"--iou-threshold must be above 0 and at most 1, got {args.iou_threshold:g}")
    cfg = load_tool_cfg(args)
    args.pixel_range = get_pixel_range(cfg)
    choose_predictions(args, cfg)
    names = load_class_names(args.dataset)
    chosen = select_classes(names, args.classes, args.dataset) if args.classes else []
    args.labels = [names.index(name) for name in chosen if name in names]


def draw(errors: Errors, counts: dict[str, np.ndarray], args: Namespace) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file name, caption, drawn image), the images with the most errors first."""
    skeleton = get_skeleton(MetadataCatalog.get(args.dataset))
    num_errors = sum(counts[error] for error in args.error_type or ERRORS)
    for index in np.argsort(-num_errors, kind="stable")[: np.count_nonzero(num_errors)].tolist():
        record = errors.records[index]
        image = read_image(record["file_name"], args.pixel_range)
        check_image_size(record, image)
        side = max(args.size, *image.shape)
        left, right = draw_matches(errors, index, image, side=side, skeleton=skeleton, labels=args.labels)
        gap = torch.full((3, left.shape[1], 4), 255, dtype=torch.uint8)
        listed = ", ".join(f"{counts[error][index]} {error}" for error in ERRORS if counts[error][index])
        caption = f", ground truth and detections: {listed}"
        yield record["file_name"], caption, torch.cat([left, gap, right], dim=2)


def main(args: Namespace) -> None:
    """Match the predictions, print the error counts, and write or show the images."""
    detections = read_detections(args.predictions, args.dataset)
    if args.score_threshold is None:
        best = compute_best_thresholds(find_errors(args.dataset, detections, args.iou_threshold))["overall"]
        args.score_threshold = best["threshold"] or 0.0
    errors = find_errors(args.dataset, detections, args.iou_threshold, args.score_threshold, args.task)
    counts = count_errors(errors, args.labels)
    print(f"{args.dataset}, {len(errors.records)} images:")
    legend = {f"{name}: {description}": color for name, (color, description) in OUTCOMES.items()}
    for error in ERRORS:
        print(f"  {f'{error}: {OUTCOMES[error][1]}':<62}{counts[error].sum():>6}")
    print(f"  {describe_matching(args.iou_threshold, args.score_threshold, args.task)}")
    drawings = itertools.islice(draw(errors, counts, args), args.max_images)
    if not write_images(drawings, args, args.dataset, legend, width=2):
        print("no image has such an error")


if __name__ == "__main__":
    try:
        setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args,))
