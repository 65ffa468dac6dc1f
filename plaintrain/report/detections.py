"""The sections on the detections: precision and recall, errors, confusion, scores, groups, images."""

import base64
import io
import itertools
import os

import numpy as np
from torchvision.transforms.v2.functional import to_pil_image

from plaintrain.analysis.breakdown import GROUPS
from plaintrain.analysis.errors import ERRORS, OUTCOMES, find_errors
from plaintrain.data.catalog import MetadataCatalog
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.images import read_image
from plaintrain.report.runs import mark_best
from plaintrain.utils.errors import UserError
from plaintrain.visualization.curves import make_line
from plaintrain.visualization.drawing import get_skeleton
from plaintrain.visualization.matches import draw_matches
from plaintrain.visualization.plots import draw_bars, draw_matrix, draw_xy

# So many classes can be told apart by colour, and as rows of a matrix.
_MOST_LINES, _MOST_ROWS = 8, 20
_GROUP_COLUMNS = ("name", "objects", "detected", "erroneous", "missed", "recall_above", "recall", "mean_iou")
_CLASS_COLUMNS = ("name", "correct", *ERRORS[:-1], "erroneous", "missed")
# Images of each list; the longer side of each, pixels.
_GALLERY, _SIDE = {"worst": 8, "best": 4}, 480


def _by_dataset(make):
    """Return a function from a list of `Run` to what `make` returns for each test set.

    Args:
        make: function (dataset, [(run, analysis)]); None stands for it where no run could be analysed.
    """

    def collect(runs):
        test_sets = []
        for name in dict.fromkeys(name for run in runs for name in run.test_sets):
            analysed = [(run, run.analyses[name]) for run in runs if name in run.analyses]
            reasons = [run.problems[name] for run in runs if name in run.test_sets and name in run.problems]
            data = make(name, analysed) if analysed else None
            test_sets.append({"name": name, "data": data, "reasons": dict.fromkeys(reasons)})
        return test_sets

    return collect


def _tasks(analysed, key):
    return list(dict.fromkeys(task for _, analysis in analysed for task in analysis[key]))


@_by_dataset
def build_precision_recall(dataset, analysed):
    """Draw precision over recall, by class or by run."""
    figures = []
    for task in _tasks(analysed, "curves"):
        for iou in ("0.50", "0.75"):
            lines, remark = _curve_lines(analysed, task, iou)
            if lines:
                figures.append((draw_xy(lines, "recall", "precision"), f"{task}, IoU {iou}", remark))
    return figures


def _curve_lines(analysed, task, iou):
    if len(analysed) > 1:
        curves = [(run, a["curves"][task]) for run, a in analysed if task in a["curves"]]
        lines = [make_line(run.name, c["recall"], c["mean"][iou], run.color) for run, c in curves]
        return [line for line in lines if line["y"]], "mean over the classes"
    ((_, analysis),) = analysed
    curves = analysis["curves"][task]
    classes, remark = [c for c in curves["classes"] if c[iou]], ""
    if len(classes) > _MOST_LINES:
        objects = {row["name"]: row["objects"] for row in analysis["per_class"][task]}
        most = sorted(classes, key=lambda c: -objects[c["name"]])[: _MOST_LINES - 1]
        remark = f"the {len(most)} classes with the most objects, and the mean over all {len(classes)}"
        classes = [{"name": "mean", **curves["mean"]}, *most]
    return [make_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(classes)], remark


@_by_dataset
def build_errors(dataset, analysed):
    """Return how much AP each type of error costs, and how often there is one, for each task."""
    tasks = []
    for task in _tasks(analysed, "errors"):
        known = [(run, a["errors"][task]) for run, a in analysed if task in a["errors"]]
        series = {run.name: [e["delta_ap"][name] for name in ERRORS] for run, e in known}
        colors = [run.color for run, _ in known]
        classes = known[0][1]["classes"] if len(known) == 1 else ()
        counts = [{**e["detections"], "missed": e["objects"]["missed"]} for _, e in known]
        tasks.append(
            {
                "task": task,
                "figure": draw_bars(ERRORS, series, "AP50 that fixing it would gain", colors=colors),
                "columns": [run.name for run, _ in known] if len(known) > 1 else ["count"],
                "types": [[n, OUTCOMES[n][1], *(c[n] for c in counts)] for n in ("correct", *ERRORS)],
                "classes": [[c[key] for key in _CLASS_COLUMNS] for c in classes],
            }
        )
    return tasks


@_by_dataset
def build_confusion(dataset, analysed):
    """Return which classes are mistaken for which, by run."""
    matrices = []
    for run, analysis in analysed:
        labels, counts, remark = _busiest(analysis["confusion"])
        figure = draw_matrix(counts, labels, "detected as", "ground truth")
        pairs = analysis["confusion"]["pairs"]
        rows = [
            [p["ground_truth"], p["detected_as"], p["count"], round(100 * p["fraction"], 1)] for p in pairs
        ]
        is_wide = len(labels) > _MOST_LINES
        matrices.append({"figure": (figure, f"{run.name} on {dataset}", remark, is_wide), "pairs": rows})
    return matrices


def _busiest(confusion):
    """Return (labels, counts, remark) of the classes with the most confusions, and the background."""
    labels, counts = confusion["labels"], np.array(confusion["counts"])
    last = len(labels) - 1
    if last <= _MOST_ROWS:
        return labels, counts, ""
    classes = counts[:last, :last]
    wrong = classes.sum(axis=0) + classes.sum(axis=1) - 2 * classes.diagonal()
    chosen = [*sorted(np.lexsort((-counts[:last].sum(axis=1), -wrong))[:_MOST_ROWS]), last]
    remark = f"the {_MOST_ROWS} of {last} classes that are mistaken most often"
    return [labels[i] for i in chosen], counts[np.ix_(chosen, chosen)], remark


@_by_dataset
def build_calibration(dataset, analysed):
    """Draw how often detections are correct, by their score."""
    lines, counts, remarks = [], {}, []
    for run, analysis in analysed:
        bins, error = (analysis["calibration"][key] for key in ("bins", "expected_error"))
        known = [b for b in bins if b["count"]]
        x, y = ([b[key] for b in known] for key in ("score", "precision"))
        lines.append(make_line(run.name, x, y, run.color))
        counts[run.name] = [b["count"] for b in bins]
        remark = "no detections" if error is None else f"off by {100 * error:.1f} points on average"
        remarks.append(f"{remark} ({run.name})" if len(analysed) > 1 else remark)
    curve = draw_xy(lines, "score", "fraction that is correct", diagonal=True, marker="o")
    names = [f"{b['low']:g} to {b['high']:g}" for b in bins]
    histogram = draw_bars(names, counts, "detections", colors=[line["color"] for line in lines])
    remark = f"dashed: ideal; {', '.join(remarks)}"
    return [(curve, "Calibration", remark), (histogram, "Scores of all detections")]


@_by_dataset
def build_thresholds(dataset, analysed):
    """Return the score threshold with the best F1, of all classes together (None) and of each class."""
    by_run = [
        {c.get("name"): c for c in (a["thresholds"]["overall"], *a["thresholds"]["classes"])}
        for _, a in analysed
    ]
    keys, rows = ("threshold", "f1", "precision", "recall"), []
    for name in dict.fromkeys(name for known in by_run for name in known):
        values = [[known.get(name, {}).get(key) for known in by_run] for key in keys]
        values[1] = mark_best(values[1])
        rows.append([name, *itertools.chain(*zip(*values, strict=True))])
    columns = [f"{key}, {run.name}" if len(analysed) > 1 else key for run, _ in analysed for key in keys]
    return {"columns": columns, "rows": rows}


@_by_dataset
def build_groups(dataset, analysed):
    """Return how many objects are detected, by their size, shape and neighbours."""
    figures, tables = [], []
    for key, (title, words) in GROUPS.items():
        bins = zip(*(a["breakdown"][key] for _, a in analysed), strict=True)
        bins = [of_runs for of_runs in bins if any(b["objects"] for b in of_runs)]
        if not bins:
            continue
        names = [f"{b['name']}  ({b['objects']:,})" for b, *_ in bins]
        if len(analysed) == 1:
            shown = {"all detections": "recall", "above the threshold": "recall_above"}
            series, colors = {name: [b[k] for (b,) in bins] for name, k in shown.items()}, None
            tables.append((title, [[b[column] for column in _GROUP_COLUMNS] for (b,) in bins]))
        else:
            series = {run.name: [b[i]["recall_above"] for b in bins] for i, (run, _) in enumerate(analysed)}
            colors = [run.color for run, _ in analysed]
        figure = draw_bars(names, series, "fraction that is found", colors=colors)
        figures.append((figure, title, f"{words}; in brackets: objects"))
    return {"figures": figures, "tables": tables}


@_by_dataset
def build_gallery(dataset, analysed):
    """Return the images with the lowest and the highest F1."""
    ((run, analysis),) = analysed
    settings = analysis["settings"]
    thresholds = settings["iou_threshold"], settings["score_threshold"]
    errors = find_errors(dataset, run.detections[dataset], *thresholds)
    return [
        (name, [_draw_entry(entry, dataset, errors, run) for entry in analysis["gallery"][name][:most]])
        for name, most in _GALLERY.items()
    ]


def _draw_entry(entry, dataset, errors, run):
    file_name = entry["file_name"]
    name = f"image {entry['image_id']}" if is_drawn(file_name) else os.path.basename(file_name)
    images, problem = [], ""
    try:
        image = read_image(file_name, run.config.get("INPUT", {}).get("PIXEL_RANGE") or ())
        side = min(_SIDE, 2 * max(image.shape[-2:]))
        skeleton = get_skeleton(MetadataCatalog.get(dataset))
        for drawn in draw_matches(errors, entry["index"], image, side=side, skeleton=skeleton):
            jpeg = io.BytesIO()
            to_pil_image(drawn).save(jpeg, format="JPEG", quality=80)
            images.append(base64.b64encode(jpeg.getvalue()).decode())
    except UserError as e:
        problem = str(e)
    return {**entry, "name": name, "images": images, "problem": problem}
