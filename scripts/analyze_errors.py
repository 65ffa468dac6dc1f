#!/usr/bin/env python
"""Analyze the errors of a detector's predictions and the AP that they cost.

python scripts/analyze_errors.py output/quickstart
python scripts/analyze_errors.py output/quickstart --dataset shapes_val --iou-threshold 0.75
python scripts/analyze_errors.py --config-file configs/quickstart.yaml --predictions FILE.json

The predictions are those of a run's last evaluation, or a JSON in COCO's results format for the dataset in
DATASETS.TEST; neither a model nor images are needed. Prints AP per class and size, TIDE's delta AP of each
error type (classification, localization, both, duplicate, background, missed), the score threshold with the
highest F1, recall by object size, shape and crowding, the confusion matrix, calibration, and the worst
images. The JSON output adds the curves; `plaintrain.analysis.analyze` documents its keys.
"""

from plaintrain.utils.arguments import add_renamed_argument, build_parser

if __name__ == "__main__":
    # Parse before the slow imports, so that --help and errors are instant.
    parser = build_parser(__doc__, "YAML config, instead of RUN")
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder of a run (OUTPUT_DIR)")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first test set")
    parser.add_argument("--predictions", metavar="FILE", help="COCO results (default: the run's last ones)")
    iou = {"type": float, "default": 0.5, "metavar": "IOU"}
    add_renamed_argument(parser, "--iou-threshold", "--iou", help="IoU of a match (default: 0.5)", **iou)
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="SCORE",
        help="minimum score to count (default: highest F1)",
    )
    parser.add_argument(
        "--gallery", type=int, default=12, metavar="N", help="number of best and worst images (default: 12)"
    )
    parser.add_argument("--output", metavar="FILE", help="default: analysis.json next to the predictions")
    args = parser.parse_args()
    if args.gallery < 0:
        parser.error(f"--gallery must be at least 0, got {args.gallery}")
    for flag in ("iou_threshold", "score_threshold"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{flag.replace('_', '-')} must be 0 to 1, got {value:g}")

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from plaintrain.analysis.analyze import analyze
from plaintrain.analysis.breakdown import GROUPS
from plaintrain.analysis.command import choose_predictions, load_tool_cfg
from plaintrain.analysis.errors import ERRORS, OUTCOMES, describe_matching
from plaintrain.engine.launch import launch
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_json
from plaintrain.utils.errors import UserError

# With more classes, print the most confused pairs instead of the confusion matrix.
_MAX_MATRIX_CLASSES = 12


def print_table(
    title: str, records: Sequence[dict[str, Any]], columns: Sequence[str] = (), required: str = ""
) -> None:
    """Print records as a table with some or all columns; skip those with 0 or None in the required column."""
    shown = [record for record in records if not required or record[required]]
    num_skipped = len(records) - len(shown)
    skipped = f" ({num_skipped} without {required} skipped)" if num_skipped else ""
    if shown:
        columns = list(columns or shown[0])
        cells = [
            ["-" if record[column] is None else record[column] for column in columns] for record in shown
        ]
        print(f"\n{title}{skipped}\n{format_table(cells, columns)}")


def print_errors(task: str, errors: dict[str, Any], settings: dict[str, Any]) -> None:
    """Print TIDE's delta AP, the counts of each error type and their definition."""
    counts = {**errors["detections"], "missed": errors["objects"]["missed"]}
    cells = [[error, errors["delta_ap"][error], counts[error], OUTCOMES[error][1]] for error in ERRORS]
    cells.append(["all false positives", errors["false_positives"], "", "all wrong detections"])
    cells.append(
        ["all false negatives", errors["false_negatives"], "", "all objects without a correct detection"]
    )
    columns = ["type", "delta AP", "count", "description"]
    ap = "" if errors["AP"] is None else f" of {errors['AP']:.2f}"
    score = f"{settings['score_threshold']:.3f} ({settings['score_threshold_is']})"
    title = f"{task}, delta AP at IoU {settings['iou_threshold']:g}{ap}; counts at score threshold {score}"
    print_table(title, [dict(zip(columns, values, strict=True)) for values in cells])
    columns = ["name", "correct", *ERRORS[:-1], "erroneous", "missed"]
    print_table(f"{task}, detections and objects by class", errors["classes"], columns)
    print(describe_matching(settings["iou_threshold"], settings["score_threshold"], task))


def print_analysis(analysis: dict[str, Any]) -> None:
    """Print the tables of an analysis."""
    confusion = analysis["confusion"]
    thresholds = analysis["thresholds"]
    for task, metrics in analysis["metrics"].items():
        print_table(f"{task}, COCO metrics", [metrics])
        print_table(f"{task}, by class", analysis["per_class"][task], required="objects")
    classes = [{"name": "all", **thresholds["overall"]}, *thresholds["classes"]]
    print_table("score threshold with the highest F1", classes, required="threshold")
    for task, errors in analysis["errors"].items():
        print_errors(task, errors, analysis["settings"])
    columns = ["name", "objects", "recall", "recall_above", "mean_iou", "erroneous", "missed"]
    for key, (title, description, _) in GROUPS.items():
        bins = analysis["breakdown"][key]
        print_table(f"objects by {title.lower()}, {description}", bins, columns, required="objects")
    names = confusion["labels"]
    if len(names) - 2 <= _MAX_MATRIX_CLASSES:
        matrix = [
            {"": name, **dict(zip(names, counts, strict=True))}
            for name, counts in zip(names, confusion["counts"], strict=True)
        ]
        print_table("confusion matrix (rows: ground truth, columns: predictions)", matrix)
        print("other error: localization error, duplicate or both; background, as column: missed")
    else:
        print_table("most confused pairs of classes", confusion["pairs"])
    settings = analysis["settings"]
    print(describe_matching(settings["iou_threshold"], settings["score_threshold"]))
    calibration = analysis["calibration"]
    if calibration["expected_error"] is not None:
        title = f"precision by score; expected calibration error {calibration['expected_error']:.3f}"
        print_table(title, calibration["bins"])
    worst = [{**e, "file": os.path.basename(e["file_name"])} for e in analysis["gallery"]["worst"]]
    columns = ["file", "f1", "correct", *ERRORS[:-1], "erroneous", "missed"]
    print_table("worst images", worst, columns)


def main(args: Namespace) -> None:
    """Analyze, print and write."""
    options = {"gallery": args.gallery, "kpt_oks_sigmas": args.cfg.TEST.KEYPOINT_OKS_SIGMAS}
    analysis = analyze(args.dataset, args.predictions, args.iou_threshold, args.score_threshold, **options)
    crowds = f" and {analysis['crowds']} crowds" if analysis["crowds"] else ""
    print(
        f"{args.dataset}: {analysis['images']} images, {analysis['objects']} objects{crowds}, "
        f"{analysis['detections']} detections of {args.predictions}"
    )
    print_analysis(analysis)
    write_json(args.output, analysis)
    print(f"\nwrote {args.output}")


def resolve_arguments(args: Namespace) -> None:
    """Set `cfg`, and the defaults of `dataset`, `predictions` and `output`."""
    args.cfg = load_tool_cfg(args)
    choose_predictions(args, args.cfg)
    folder = os.path.dirname(args.predictions)
    if args.run:
        folder = os.path.join(args.run, "inference", args.dataset)
    args.output = args.output or os.path.join(folder, "analysis.json")


if __name__ == "__main__":
    try:
        resolve_arguments(args)
    except UserError as e:
        parser.error(str(e))
    sys.exit(launch(main, args=(args,)))
