"""The sections on the detections: precision and recall, errors, confusion, scores, groups of objects.

Each makes the data of one test set of (dataset, [(run, analysis)]), see `by_dataset`.
"""

from plaintrain.report.render import Cell, Figure, is_best
from plaintrain.visualization.charts import bar_figure, histogram_figure, matrix_figure, xy_figure
from plaintrain.visualization.curves import curve_line

# So many classes can be told apart by colour, and as rows of a matrix.
_MOST_LINES, _MOST_ROWS = 8, 20
# What became of a detection or an object; all but the first are errors.
ERROR_TYPES = {
    "correct": "the right class and place",
    "localisation": "the right class, placed poorly",
    "class": "an object of another class",
    "both": "another class, placed poorly",
    "duplicate": "found already, by a detection with a higher score",
    "background": "nothing is there",
    "missed": "an object that no detection is near",
}
_ERRORS = list(ERROR_TYPES)[1:]
# Counts of a class, and what to call them.
_COUNTS = {name: name for name in ERROR_TYPES if name != "missed"}
_COUNTS |= {"erroneous": "objects found wrongly", "missed": "objects missed"}
_GROUPS = {
    "size": ("Size", "root of the area in pixels"),
    "aspect": ("Shape", "width : height"),
    "overlaps": ("Crowdedness", "other objects that overlap it (IoU from 0.1)"),
    "objects_per_image": ("Objects in the image", "number"),
}
_GROUP_COLUMNS = ("name", "objects", "found", "erroneous", "missed", "recall_above", "recall", "mean_iou")


def by_dataset(make, runs):
    """Return what `make` returns for each test set, and why some runs have no analysis of it.

    Args:
        make: function (dataset, [(run, analysis)]); None stands for it where no run could be analysed.
        runs: list of `RunFacts`.
    """
    test_sets = []
    for name in dict.fromkeys(name for run in runs for name in run.test_sets):
        analysed = [(run, run.analyses[name]) for run in runs if name in run.analyses]
        reasons = [run.problems[name] for run in runs if name in run.test_sets and name in run.problems]
        data = make(name, analysed) if analysed else None
        test_sets.append({"name": name, "data": data, "reasons": list(dict.fromkeys(reasons))})
    return test_sets


def precision_recall(dataset, analysed):
    """Draw precision over recall, by class or by run."""
    figures = []
    for task in _tasks(analysed, "curves"):
        for iou in ("0.50", "0.75"):
            lines, words = _curve_lines(analysed, task, iou)
            if lines:
                drawing = xy_figure(lines, "recall", "precision", limits=(0, 1))
                name = f"pr-{dataset}-{task}-{iou[2:]}"
                figures.append(Figure(name, drawing, f"{task}, IoU {iou}", words))
    return figures


def _tasks(analysed, key):
    return list(dict.fromkeys(task for _, analysis in analysed for task in analysis[key]))


def _curve_lines(analysed, task, iou):
    if len(analysed) > 1:
        curves = [(run, a["curves"][task]) for run, a in analysed if task in a["curves"]]
        lines = [curve_line(run.name, c["recall"], c["mean"][iou], run.color) for run, c in curves]
        return [line for line in lines if line["y"]], "mean over the classes"
    ((_, analysis),) = analysed
    curves = analysis["curves"][task]
    classes = [c for c in curves["classes"] if c[iou]]
    if len(classes) <= _MOST_LINES:
        return [curve_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(classes)], ""
    objects = {row["name"]: row["objects"] for row in analysis["per_class"][task]}
    most = sorted(classes, key=lambda c: -objects[c["name"]])[: _MOST_LINES - 1]
    lines = [curve_line("mean", curves["recall"], curves["mean"][iou], 0)]
    lines += [curve_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(most, start=1)]
    return lines, f"the {len(most)} classes with the most objects, and the mean over all {len(classes)}"


def errors(dataset, analysed):
    """Return how much AP each type of error costs, and how often there is one, for each task."""
    tasks = []
    for task in _tasks(analysed, "errors"):
        known = [(run, a["errors"][task]) for run, a in analysed if task in a["errors"]]
        series = {run.name: [e["costs"][name] for name in _ERRORS] for run, e in known}
        colors = [run.color for run, _ in known]
        drawing = bar_figure(_ERRORS, series, "AP50 that mending it would gain", colors=colors)
        counts = [{**e["detections"], "missed": e["objects"]["missed"]} for _, e in known]
        tasks.append(
            {
                "task": task,
                "figure": Figure(f"cost-{dataset}-{task}", drawing, "What each kind of error costs"),
                "columns": [run.name for run, _ in known] if len(known) > 1 else ["count"],
                "types": [[name, words, *(c[name] for c in counts)] for name, words in ERROR_TYPES.items()],
                "class_columns": ["class", *_COUNTS.values()],
                "classes": _rows(known[0][1]["classes"], "name", *_COUNTS) if len(known) == 1 else None,
            }
        )
    return tasks


def _rows(records, *keys):
    return [[record[key] for key in keys] for record in records]


def confusion(runs):
    """Return which classes are mistaken for which, by test set and run."""

    def _make(dataset, analysed):
        return [_confusion(dataset, run.name if len(runs) > 1 else dataset, run, a) for run, a in analysed]

    return by_dataset(_make, runs)


def _confusion(dataset, title, run, analysis):
    labels, counts, words = _busiest(analysis["confusion"])
    drawing = matrix_figure(counts, labels, labels, "found as", "what is there")
    name, pairs = f"confusion-{dataset}-{run.color}", analysis["confusion"]["pairs"]
    return {
        "figure": Figure(name, drawing, title, words, len(labels) > _MOST_LINES),
        "pairs": [[p["truth"], p["found"], p["count"], round(100 * p["share"], 1)] for p in pairs],
    }


def _busiest(confusion):
    """Return (labels, counts, words) of the classes with the most confusions, and the background."""
    labels, counts = confusion["labels"], confusion["counts"]
    last = len(labels) - 1
    if last <= _MOST_ROWS:
        return labels, counts, ""

    def wrong(i):
        return sum(counts[i][:last]) + sum(row[i] for row in counts[:last]) - 2 * counts[i][i]

    chosen = sorted(sorted(range(last), key=lambda i: (-wrong(i), -sum(counts[i])))[:_MOST_ROWS]) + [last]
    words = f"the {_MOST_ROWS} of {last} classes that are mistaken most often"
    return [labels[i] for i in chosen], [[counts[i][j] for j in chosen] for i in chosen], words


def calibration(dataset, analysed):
    """Draw how often detections are correct, by their score."""
    lines, counts, remarks = [], {}, []
    for run, analysis in analysed:
        bins, error = (analysis["calibration"][key] for key in ("bins", "expected_error"))
        known = [b for b in bins if b["count"]]
        line = curve_line(run.name, [b["score"] for b in known], [b["precision"] for b in known], run.color)
        lines.append({**line, "points": True})
        counts[run.name] = [b["count"] for b in bins]
        remark = "no detections" if error is None else f"off by {100 * error:.1f} points on average"
        remarks.append(f"{remark} ({run.name})" if len(analysed) > 1 else remark)
    edges = [i / len(bins) for i in range(len(bins) + 1)]
    curve = xy_figure(lines, "score", "share that is correct", limits=(0, 1), diagonal=True)
    colors = [line["color"] for line in lines]
    scores = histogram_figure(edges, counts, "score", "detections", colors=colors)
    words = f"dashed: ideal; {', '.join(remarks)}"
    return [
        Figure(f"calibration-{dataset}", curve, "Calibration", words),
        Figure(f"scores-{dataset}", scores, "Scores of all detections"),
    ]


def thresholds(_, analysed):
    """Return the score threshold with the best F1, of all classes together (None) and of each class.

    Of several runs each has a cell with its F1.
    """
    by_run = [{None: a["thresholds"]["overall"]} for _, a in analysed]
    for known, (_, a) in zip(by_run, analysed, strict=True):
        known |= {c["name"]: c for c in a["thresholds"]["classes"]}
    names = dict.fromkeys(name for known in by_run for name in known)
    if len(analysed) == 1:
        keys = ("threshold", "f1", "precision", "recall")
        return {"runs": None, "rows": [[n, *(by_run[0][n][key] for key in keys)] for n in names]}
    rows = []
    for name in names:
        best = [known.get(name, {"f1": None, "threshold": None}) for known in by_run]
        scores = [b["f1"] for b in best]
        shown = ["–" if b["f1"] is None else f"{b['f1']:.3f} (from {b['threshold']:.2f})" for b in best]
        rows.append([name, *(Cell(s, v, is_best(v, scores)) for s, v in zip(shown, scores, strict=True))])
    return {"runs": [run.name for run, _ in analysed], "rows": rows}


def groups(dataset, analysed):
    """Return how many objects are detected, by their size, shape and neighbours."""
    figures, tables = [], []
    for key, (title, words) in _GROUPS.items():
        bins = [a["breakdown"][key] for _, a in analysed]
        used = [i for i in range(len(bins[0])) if any(b[i]["objects"] for b in bins)]
        bins = [[b[i] for i in used] for b in bins]
        names = [f"{b['name']}  ({b['objects']:,})" for b in bins[0]]
        if not names:
            continue
        series = {
            run.name: [b["recall_above"] for b in of_run]
            for (run, _), of_run in zip(analysed, bins, strict=True)
        }
        colors = [run.color for run, _ in analysed]
        if len(analysed) == 1:
            shown = {"all detections": "recall", "above the threshold": "recall_above"}
            series, colors = {name: [b[k] for b in bins[0]] for name, k in shown.items()}, None
            tables.append((title, _rows(bins[0], *_GROUP_COLUMNS)))
        drawing = bar_figure(names, series, "share that is found", colors=colors)
        figures.append(Figure(f"group-{dataset}-{key}", drawing, title, f"{words}; in brackets: objects"))
    return {"figures": figures, "tables": tables}
