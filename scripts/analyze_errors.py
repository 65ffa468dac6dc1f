#!/usr/bin/env python
"""Say what goes wrong in a detector's predictions, and what it costs.

python scripts/analyze_errors.py output/quickstart
python scripts/analyze_errors.py output/quickstart --dataset shapes_val --iou 0.75
python scripts/analyze_errors.py --config-file configs/quickstart.yaml --predictions FILE.json

Takes the predictions of a run's last evaluation, or a JSON in COCO's results format for the dataset in
DATASETS.TEST; neither a model nor images are needed. Prints AP by class and size, TIDE's delta AP of each
error type (classification, localization, both, duplicate, background, missed), the score threshold with the
highest F1, the recall by size, shape and surroundings of objects, the confusion matrix, the calibration and
the worst images. All of it, with curves, goes into a JSON: see `plaintrain.analysis.analyze` for its keys.
"""

from plaintrain.utils.arguments import build_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = build_parser(__doc__, "YAML config, instead of a run")
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="folder of a run (OUTPUT_DIR)")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first test set")
    parser.add_argument("--predictions", metavar="FILE", help="COCO results; default: the run's last ones")
    parser.add_argument("--iou", type=float, default=0.5, help="what a correct detection has; default: 0.5")
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="of what is counted; default: the best F1"
    )
    parser.add_argument("--gallery", type=int, default=12, metavar="N", help="best and worst images to list")
    parser.add_argument("--output", metavar="FILE", help="default: analysis.json beside the predictions")
    args = parser.parse_args()
    if args.gallery < 0:
        parser.error("--gallery is at least 0")
    for flag, value in (("--iou", args.iou), ("--score-threshold", args.score_threshold)):
        if value is not None and not 0 <= value <= 1:
            parser.error(f"{flag} must be 0 to 1, not {value:g}")

import os
import sys

from plaintrain.analysis.analyze import analyze
from plaintrain.analysis.breakdown import GROUPS
from plaintrain.analysis.command import choose_predictions, load_tool_cfg
from plaintrain.analysis.errors import ERRORS, OUTCOMES
from plaintrain.engine.launch import launch
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_json
from plaintrain.utils.errors import UserError

# Up to so many classes the confusion is shown as a matrix.
_MATRIX = 12


def show(title, rows, columns=(), needed=""):
    """Print dicts as a table, of all columns or some; skip those that have nothing in a column."""
    shown = [row for row in rows if not needed or row[needed]]
    skipped = f" ({len(rows) - len(shown)} without {needed} are skipped)" if len(shown) < len(rows) else ""
    if shown:
        columns = columns or list(shown[0])
        cells = [["-" if row[column] is None else row[column] for column in columns] for row in shown]
        print(f"\n{title}{skipped}\n{format_table(cells, columns)}")


def show_analysis(found):
    """Print the tables of an analysis."""
    settings, confusion, thresholds = found["settings"], found["confusion"], found["thresholds"]
    for task, metrics in found["metrics"].items():
        show(f"{task}, COCO's metrics", [metrics])
        show(f"{task}, by class", found["per_class"][task], needed="objects")
    rows = [{"name": "all", **thresholds["overall"]}, *thresholds["classes"]]
    show("score threshold with the highest F1", rows, needed="threshold")
    for task, errors in found["errors"].items():
        counts = {**errors["detections"], "missed": errors["objects"]["missed"]}
        rows = [[error, errors["delta_ap"][error], counts[error], OUTCOMES[error][1]] for error in ERRORS]
        rows.append(["all false positives", errors["false_positives"], "", "all wrong detections"])
        rows.append(["all false negatives", errors["false_negatives"], "", "all objects that are not found"])
        columns = ["type", "AP", "count", "what it is"]
        ap = "" if errors["AP"] is None else f" of {errors['AP']:.2f}"
        title = f"{task}, what each type of error costs of the AP at IoU {settings['iou_threshold']:g}{ap}"
        score = f"{settings['score_threshold']:.3f} ({settings['score_threshold_is']})"
        title = f"{title}; counts are of a score of at least {score}"
        show(title, [dict(zip(columns, row, strict=True)) for row in rows])
        columns = ["name", "correct", *ERRORS[:-1], "erroneous", "missed"]
        show(f"{task}, detections and objects by class", errors["classes"], columns)
    columns = ["name", "objects", "recall", "recall_above", "mean_iou", "erroneous", "missed"]
    for key, (title, words) in GROUPS.items():
        show(f"objects by {title.lower()}, {words}", found["breakdown"][key], columns, needed="objects")
    names = confusion["labels"]
    if len(names) - 1 <= _MATRIX:
        rows = [
            {"": n, **dict(zip(names, counts, strict=True))}
            for n, counts in zip(names, confusion["counts"], strict=True)
        ]
        show("objects (rows) by what they are detected as (columns)", rows)
    else:
        show("classes that are mistaken most often", confusion["pairs"])
    calibration = found["calibration"]
    if calibration["expected_error"] is not None:
        title = f"scores and precision; expected calibration error {calibration['expected_error']:.3f}"
        show(title, calibration["bins"])
    rows = [{**e, "file": os.path.basename(e["file_name"])} for e in found["gallery"]["worst"]]
    columns = ["file", "f1", "correct", *ERRORS[:-1], "erroneous", "missed"]
    show("worst images", rows, columns)


def main(args):
    """Analyse, print, write."""
    options = {"gallery": args.gallery, "kpt_oks_sigmas": args.cfg.TEST.KEYPOINT_OKS_SIGMAS}
    found = analyze(args.dataset, args.predictions, args.iou, args.score_threshold, **options)
    crowds = f" and {found['crowds']} crowds" if found["crowds"] else ""
    print(
        f"{args.dataset}: {found['images']} images, {found['objects']} objects{crowds}, "
        f"{found['detections']} detections of {args.predictions}"
    )
    show_analysis(found)
    write_json(args.output, found)
    print(f"\nall of it is in {args.output}")


def choose(args):
    """Set the config, the dataset, the predictions and the output of a command line."""
    args.cfg = load_tool_cfg(args)
    choose_predictions(args, args.cfg)
    folder = os.path.dirname(args.predictions)
    if args.run:
        folder = os.path.join(args.run, "inference", args.dataset)
    args.output = args.output or os.path.join(folder, "analysis.json")


if __name__ == "__main__":
    try:
        choose(args)
    except UserError as e:
        parser.error(str(e))
    sys.exit(launch(main, args=(args,)))
