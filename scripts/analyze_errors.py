#!/usr/bin/env python
"""Say what goes wrong in a detector's predictions, and what it costs.

python scripts/analyze_errors.py output/quickstart
python scripts/analyze_errors.py output/quickstart --dataset shapes_val --iou 0.75
python scripts/analyze_errors.py --config-file configs/quickstart.yaml --predictions FILE.json

Takes the predictions of a run's last evaluation, or a JSON in COCO's results format for the dataset in
DATASETS.TEST; neither a model nor images are needed. Prints AP by class and size, how much AP each kind of
error costs (class, localisation, both, duplicate, background, missed, as TIDE defines them), the score
threshold with the highest F1, which objects are found by their size, shape and surroundings, what classes
are mistaken for, whether scores mean what they say, and the worst images. All of it, with curves, goes into
a JSON: see `plaintrain.analysis.analyze.analyze` for its keys.
"""

import argparse

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run (OUTPUT_DIR)")
    parser.add_argument("--config-file", metavar="FILE", help="YAML config, instead of a run")
    parser.add_argument("--dataset", metavar="NAME", help="which of several test sets")
    parser.add_argument("--predictions", metavar="FILE", help="COCO results; default: the run's last ones")
    parser.add_argument("--iou", type=float, default=0.5, help="what a correct detection has; default: 0.5")
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="of what is counted; default: the best F1"
    )
    parser.add_argument("--gallery", type=int, default=12, metavar="N", help="best and worst images to list")
    parser.add_argument("--output", metavar="FILE", help="default: analysis.json beside the predictions")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    args = parser.parse_args()
    if args.gallery < 0:
        parser.error("--gallery is at least 0")
    for flag, value in (("--iou", args.iou), ("--score-threshold", args.score_threshold)):
        if value is not None and not 0 <= value <= 1:
            parser.error(f"{flag} must be 0 to 1, not {value:g}")

import os
import sys

from plaintrain.analysis.analyze import analyze
from plaintrain.analysis.errors import ERRORS, OUTCOMES
from plaintrain.analysis.run_folder import check_run, predictions_path, read_config, test_sets
from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, declare_datasets
from plaintrain.engine.launch import launch
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_json
from plaintrain.utils.errors import UserError

# Up to so many classes the confusion is shown as a matrix.
_MATRIX = 12
_BREAKDOWN = {
    "size": "size, the root of the area in pixels",
    "aspect": "width / height",
    "overlaps": "number of other objects that overlap (IoU >= 0.1)",
    "objects_per_image": "objects in the image",
}


def cell(value, scale=1.0):
    """What a table shows: "-" for what is not known, numbers with two decimals."""
    return "-" if value is None else value * scale if isinstance(value, float) else value


def show(title, header, rows):
    """Print a table under its title, if there is anything in it."""
    if rows:
        print(f"\n{title}\n{format_table(rows, header)}")


def left_out(rows, some, what):
    """Words for a title."""
    return f" (not shown: {len(rows) - len(some)} without {what})" if len(some) < len(rows) else ""


def show_scores(found):
    """COCO's metrics, and AP and thresholds of each class."""
    for task, metrics in found["metrics"].items():
        show(f"{task}, COCO's metrics", list(metrics), [[cell(value) for value in metrics.values()]])
    for task, rows in found["per_class"].items():
        header = ["class", *list(rows[0])[1:]]
        some = [[cell(value) for value in row.values()] for row in rows if row["objects"]]
        show(f"{task}, by class{left_out(rows, some, 'objects')}", header, some)
    overall, classes = found["thresholds"]["overall"], found["thresholds"]["classes"]
    rows = [["all", *overall.values()], *(list(row.values()) for row in classes)]
    rows = [[name, *(f"{v:.3f}" for v in values)] for name, *values in rows if values[0] is not None]
    title = f"score threshold with the highest F1{left_out(classes, rows[1:], 'a correct detection')}"
    show(title, ["class", "threshold", "F1", "precision", "recall"], rows)


def show_errors(found):
    """What each kind of error costs, and how often it is made."""
    settings = found["settings"]
    for task, errors in found["errors"].items():
        counts = {**errors["detections"], "missed": errors["objects"]["missed"]}
        rows = [[kind, cell(errors["costs"][kind]), counts[kind], OUTCOMES[kind][1]] for kind in ERRORS]
        rows += [
            ["all false positives", cell(errors["false_positives"]), "", "all wrong detections"],
            ["all false negatives", cell(errors["false_negatives"]), "", "all objects that are not found"],
        ]
        score = f"a score of at least {settings['score_threshold']:.3f} ({settings['score_threshold_is']})"
        ap = "" if errors["AP"] is None else f" of {errors['AP']:.2f}"
        title = f"{task}, what each kind of error costs of the AP at IoU {settings['iou_threshold']:g}{ap}"
        show(f"{title}; counts are of {score}", ["type", "AP", "count", "what it is"], rows)
        columns = ["correct", *ERRORS[:-1], "erroneous", "missed"]
        rows = [[row["name"], *(row[column] for column in columns)] for row in errors["classes"]]
        some = [row for row in rows if any(row[1:])]
        title = f"{task}, detections and objects by class{left_out(rows, some, 'any')}"
        show(title, ["class", *columns], some)


def show_objects(found):
    """Which objects are found: by all detections, and by those above the score threshold."""
    score = found["settings"]["score_threshold"]
    header = ["", "objects", "found %", f"above {score:.2f} %", "IoU", "erroneous", "missed"]
    for key, title in _BREAKDOWN.items():
        rows = [
            [part["name"], part["objects"], cell(part["recall"], 100.0), cell(part["recall_above"], 100.0)]
            + [cell(part["mean_iou"]), part["erroneous"], part["missed"]]
            for part in found["breakdown"][key]
            if part["objects"]
        ]
        show(f"objects by {title}", header, rows)


def show_confusion(found):
    """What objects of each class are found as."""
    confusion = found["confusion"]
    names = confusion["labels"]
    if len(names) - 1 <= _MATRIX:
        rows = [[name, *counts] for name, counts in zip(names, confusion["counts"], strict=True)]
        show("objects (rows) by what they are found as (columns)", ["", *names], rows)
    else:
        header = ["class", "found as", "count", "% of the class"]
        rows = [[p["truth"], p["found"], p["count"], cell(p["share"], 100.0)] for p in confusion["pairs"]]
        show("classes that are mistaken most often", header, rows)


def show_rest(found):
    """Calibration, and the worst images."""
    calibration = found["calibration"]
    rows = [
        [f"{part['low']:.1f}-{part['high']:.1f}", part["count"], cell(part["score"], 100.0)]
        + [cell(part["precision"], 100.0)]
        for part in calibration["bins"]
    ]
    if calibration["expected_error"] is not None:
        title = (
            f"scores and how many are correct; expected calibration error {calibration['expected_error']:.3f}"
        )
        show(title, ["score", "detections", "mean score %", "correct %"], rows)
    columns = ["f1", "correct", *ERRORS[:-1], "erroneous", "missed"]
    rows = [
        [os.path.basename(image["file_name"]), *(cell(image[column]) for column in columns)]
        for image in found["gallery"]["worst"]
    ]
    show("worst images", ["file", *columns], rows)


def main(args):
    """Analyse, print, write."""
    sigmas = args.cfg.TEST.KEYPOINT_OKS_SIGMAS
    found = analyze(
        args.dataset,
        args.predictions,
        args.iou,
        args.score_threshold,
        gallery=args.gallery,
        kpt_oks_sigmas=sigmas,
    )
    crowds = f" and {found['crowds']} crowds" if found["crowds"] else ""
    print(
        f"{args.dataset}: {found['images']} images, {found['objects']} objects{crowds}, "
        f"{found['detections']} detections of {args.predictions}"
    )
    for part in (show_scores, show_errors, show_objects, show_confusion, show_rest):
        part(found)
    write_json(args.output, found)
    print(f"\nall of it is in {args.output}")


def choose(args):
    """Set the config, the dataset, the predictions and the output of a command line."""
    if bool(args.run) == bool(args.config_file):
        raise UserError("give the folder of a run, or --config-file FILE and --predictions FILE")
    if args.run:
        check_run(args.run)
        args.cfg = read_config(args.run)
    else:
        args.cfg = get_cfg()
        args.cfg.merge_from_file(args.config_file)
    declare_datasets(args.cfg)
    names = test_sets(args.run) if args.run else list(args.cfg.DATASETS.TEST)
    if args.run and not args.predictions:
        # Those that can be analysed.
        names = [name for name in names if predictions_path(args.run, name)]
        if not names:
            command = f"scripts/test_net.py --config-file {os.path.join(args.run, 'config.yaml')} --resume"
            raise UserError(
                f"{args.run} holds no predictions, inference/DATASET/coco_instances_results.json: {command} "
                "makes them"
            )
    args.dataset = args.dataset or choose_dataset(names)
    if args.dataset not in DatasetCatalog:
        # Says which is near.
        DatasetCatalog.get(args.dataset)
    if not args.predictions:
        args.predictions = args.run and predictions_path(args.run, args.dataset)
        if not args.predictions:
            known = f"; there are those for {', '.join(names)}" if args.run else ""
            raise UserError(f"there are no predictions for {args.dataset}{known}: give --predictions FILE")
    if not os.path.isfile(args.predictions):
        raise UserError(f"--predictions {args.predictions}: there is no such file")
    folder = (
        os.path.join(args.run, "inference", args.dataset) if args.run else os.path.dirname(args.predictions)
    )
    args.output = args.output or os.path.join(folder, "analysis.json")


def choose_dataset(names):
    """The only one of some names."""
    if not names:
        raise UserError("DATASETS.TEST is empty: give --dataset NAME")
    if len(names) > 1:
        raise UserError(
            f"there are {len(names)} test sets, {', '.join(names)}: choose one with --dataset NAME"
        )
    return names[0]


if __name__ == "__main__":
    try:
        choose(args)
    except UserError as e:
        parser.error(str(e))
    sys.exit(launch(main, args=(args,)))
