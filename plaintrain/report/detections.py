"""Build the sections on detections: curves, errors, confusion, calibration, thresholds, groups, gallery."""

import base64
import io
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup
from torchvision.transforms.v2.functional import to_pil_image

from plaintrain.analysis.breakdown import GROUPS
from plaintrain.analysis.errors import ERRORS, OUTCOMES, describe_matching, find_errors
from plaintrain.data.catalog import MetadataCatalog
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.images import read_image
from plaintrain.report.runs import Run, mark_best
from plaintrain.utils.errors import UserError
from plaintrain.visualization.curves import make_line
from plaintrain.visualization.drawing import get_skeleton
from plaintrain.visualization.matches import draw_matches
from plaintrain.visualization.plots import draw_bars, draw_matrix, draw_xy

# Runs with the analysis of their predictions on one test set, see `analyze`.
Analyses = list[tuple[Run, dict[str, Any]]]
_MAX_LINES = 8
_MAX_MATRIX_CLASSES = 20
_ABBREVIATIONS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
_TIDE_NAMES = [f"{error} ({short})" for error, short in zip(ERRORS, _ABBREVIATIONS, strict=True)]
# Number of images in the gallery, and their longer side, pixels.
_GALLERY = {"worst": 8, "best": 4}
_SIDE = 480


def _by_dataset(build: Callable[[str, Analyses], Any]) -> Callable[[list[Run]], list[dict[str, Any]]]:
    """Turn a function of a test set and its analyses into one of the runs; it returns a dict per test set."""

    def build_all(runs):
        test_sets = []
        for name in dict.fromkeys(name for run in runs for name in run.test_sets):
            analyses = [(run, run.analyses[name]) for run in runs if name in run.analyses]
            reasons = [run.problems[name] for run in runs if name in run.test_sets and name in run.problems]
            data = build(name, analyses) if analyses else None
            test_sets.append({"name": name, "data": data, "reasons": dict.fromkeys(reasons)})
        return test_sets

    return build_all


def _get_tasks(analyses, key):
    return list(dict.fromkeys(task for _, analysis in analyses for task in analysis[key]))


@_by_dataset
def build_precision_recall(dataset: str, analyses: Analyses) -> list[tuple]:
    """Draw precision-recall curves of each class, or of each run."""
    figures = []
    for task in _get_tasks(analyses, "curves"):
        for iou in ("0.50", "0.75"):
            lines, remark = _make_curves(analyses, task, iou)
            if lines:
                figures.append((draw_xy(lines, "recall", "precision"), f"{task}, IoU {iou}", remark))
    return figures


def _make_curves(analyses, task, iou):
    if len(analyses) > 1:
        curves = [(run, a["curves"][task]) for run, a in analyses if task in a["curves"]]
        lines = [make_line(run.name, c["recall"], c["mean"][iou], run.color) for run, c in curves]
        return [line for line in lines if line["y"]], "mean over classes"
    ((_, analysis),) = analyses
    curves = analysis["curves"][task]
    classes = [c for c in curves["classes"] if c[iou]]
    remark = ""
    if len(classes) > _MAX_LINES:
        num_objects = {c["name"]: c["objects"] for c in analysis["per_class"][task]}
        most = sorted(classes, key=lambda c: -num_objects[c["name"]])[: _MAX_LINES - 1]
        remark = f"the {len(most)} classes with the most objects, and the mean over all {len(classes)}"
        classes = [{"name": "mean", **curves["mean"]}, *most]
    return [make_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(classes)], remark


@_by_dataset
def build_errors(dataset: str, analyses: Analyses) -> list[dict[str, Any]]:
    """Return TIDE's delta AP and the count of each error type, per task."""
    tasks = []
    for task in _get_tasks(analyses, "errors"):
        known = [(run, a["errors"][task]) for run, a in analyses if task in a["errors"]]
        series = {run.name: [e["delta_ap"][name] for name in ERRORS] for run, e in known}
        colors = [run.color for run, _ in known]
        counts = [{**e["detections"], "missed": e["objects"]["missed"]} for _, e in known]
        tasks.append(
            {
                "task": task,
                "definition": _describe_settings(analyses, task),
                "figure": draw_bars(_TIDE_NAMES, series, "delta AP50", colors=colors),
                "columns": [run.name for run, _ in known] if len(known) > 1 else ["count"],
                "types": [
                    [name, OUTCOMES[type_][1], *(c[type_] for c in counts)]
                    for type_, name in zip(("correct", *ERRORS), ("correct", *_TIDE_NAMES), strict=True)
                ],
                "classes": known[0][1]["classes"] if len(known) == 1 else [],
            }
        )
    return tasks


def _describe_settings(analyses, task):
    settings = [(run.name, analysis["settings"]) for run, analysis in analyses]
    texts = {name: describe_matching(s["iou_threshold"], s["score_threshold"], task) for name, s in settings}
    return "; ".join(f"{name}: {text}" if len(texts) > 1 else text for name, text in texts.items())


@_by_dataset
def build_confusion(dataset: str, analyses: Analyses) -> list[dict[str, Any]]:
    """Return the confusion matrix of each run, and its most confused pairs of classes."""
    matrices = []
    for run, analysis in analyses:
        labels, counts, remark = _select_confused(analysis["confusion"])
        figure = draw_matrix(counts, labels, "prediction", "ground truth")
        definition = _describe_settings([(run, analysis)], "bbox")
        plot = figure, f"{run.name} on {dataset}", f"{remark}{definition}", len(labels) > _MAX_LINES
        matrices.append({"figure": plot, "pairs": analysis["confusion"]["pairs"]})
    return matrices


def _select_confused(confusion):
    """Return (labels, counts, remark) of the most confused classes and the last two labels."""
    labels = confusion["labels"]
    counts = np.array(confusion["counts"])
    last = len(labels) - 2
    if last <= _MAX_MATRIX_CLASSES:
        return labels, counts, ""
    classes = counts[:last, :last]
    wrong = classes.sum(axis=0) + classes.sum(axis=1) - 2 * classes.diagonal()
    chosen = [*sorted(np.lexsort((-counts[:last].sum(axis=1), -wrong))[:_MAX_MATRIX_CLASSES]), last, last + 1]
    remark = f"the {_MAX_MATRIX_CLASSES} of {last} classes that are confused most often; "
    return [labels[i] for i in chosen], counts[np.ix_(chosen, chosen)], remark


@_by_dataset
def build_calibration(dataset: str, analyses: Analyses) -> list[tuple]:
    """Draw precision over score, and the histogram of the scores."""
    lines = []
    counts = {}
    remarks = []
    for run, analysis in analyses:
        bins, error = (analysis["calibration"][key] for key in ("bins", "expected_error"))
        known = [b for b in bins if b["count"]]
        x, y = ([b[key] for b in known] for key in ("score", "precision"))
        lines.append(make_line(run.name, x, y, run.color))
        counts[run.name] = [b["count"] for b in bins]
        remark = "no detections" if error is None else f"expected calibration error {error:.3f}"
        remarks.append(f"{remark} ({run.name})" if len(analyses) > 1 else remark)
    curve = draw_xy(lines, "score", "precision", diagonal=True, marker="o")
    names = [f"{b['low']:g} to {b['high']:g}" for b in bins]
    histogram = draw_bars(names, counts, "detections", colors=[line["color"] for line in lines])
    remark = f"dashed: ideal; {', '.join(remarks)}"
    return [(curve, "Calibration", remark), (histogram, "Score histogram")]


@_by_dataset
def build_thresholds(dataset: str, analyses: Analyses) -> dict[str, list]:
    """Return the score threshold with the highest F1, over all classes (name None) and per class."""
    by_run = [
        {c.get("name"): c for c in (a["thresholds"]["overall"], *a["thresholds"]["classes"])}
        for _, a in analyses
    ]
    keys = ("threshold", "f1", "precision", "recall")
    cells = []
    for name in dict.fromkeys(name for known in by_run for name in known):
        values = [[known.get(name, {}).get(key) for known in by_run] for key in keys]
        values[1] = mark_best(values[1])
        cells.append([name, *itertools.chain(*zip(*values, strict=True))])
    columns = [f"{key}, {run.name}" if len(analyses) > 1 else key for run, _ in analyses for key in keys]
    return {"columns": columns, "rows": cells}


@_by_dataset
def build_groups(dataset: str, analyses: Analyses) -> dict[str, list]:
    """Return recall by the size, shape and neighbors of the objects."""
    figures = []
    tables = []
    for key, (title, description, _) in GROUPS.items():
        all_bins = zip(*(a["breakdown"][key] for _, a in analyses), strict=True)
        bins = [per_run for per_run in all_bins if any(b["objects"] for b in per_run)]
        if not bins:
            continue
        names = [f"{b['name']}  ({b['objects']:,})" for b, *_ in bins]
        if len(analyses) == 1:
            shown = {"all detections": "recall", "above the threshold": "recall_above"}
            series = {label: [b[k] for (b,) in bins] for label, k in shown.items()}
            colors = []
            tables.append((title, [b for (b,) in bins]))
        else:
            series = {run.name: [b[i]["recall_above"] for b in bins] for i, (run, _) in enumerate(analyses)}
            colors = [run.color for run, _ in analyses]
        figure = draw_bars(names, series, "recall", colors=colors)
        figures.append((figure, title, f"{description}; in parentheses: number of objects"))
    return {"figures": figures, "tables": tables}


@_by_dataset
def build_gallery(dataset: str, analyses: Analyses) -> list[tuple]:
    """Return the images with the lowest and the highest F1."""
    ((run, analysis),) = analyses
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
    images = []
    problem = ""
    try:
        image = read_image(file_name, run.config.get("INPUT", {}).get("PIXEL_RANGE") or ())
        side = min(_SIDE, 2 * max(image.shape[-2:]))
        skeleton = get_skeleton(MetadataCatalog.get(dataset))
        for drawn in draw_matches(errors, entry["index"], image, side=side, skeleton=skeleton):
            jpeg = io.BytesIO()
            to_pil_image(drawn).save(jpeg, format="JPEG", quality=80)
            images.append(Markup(base64.b64encode(jpeg.getvalue()).decode()))
    except UserError as e:
        problem = str(e)
    return {**entry, "name": name, "images": images, "problem": problem}
