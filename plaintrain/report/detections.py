"""The sections on how good the detections are: what they get wrong, and where."""

from plaintrain.charts import bar_figure, histogram_figure, matrix_figure, xy_figure
from plaintrain.plots import svg_text
from plaintrain.report.html import Cell, details, figure, grid, join, note, table, tag
from plaintrain.report.overview import is_best

# So many classes can be told apart by colour, and as rows of a matrix.
_MOST_LINES, _MOST_ROWS = 8, 20
_KINDS = {
    "localisation": "the right class, placed poorly",
    "class": "an object of another class",
    "both": "another class, placed poorly",
    "duplicate": "found already, by a detection with a higher score",
    "background": "nothing is there",
    "missed": "an object that no detection is near",
}
_GROUPS = {
    "size": ("Size", "root of the area in pixels"),
    "aspect": ("Shape", "width : height"),
    "overlaps": ("Crowdedness", "other objects that overlap it (IoU from 0.1)"),
    "objects_per_image": ("Objects in the image", "number"),
}


def by_dataset(runs, make):
    """What `make` gives for each test set, and a sentence for each that could not be analysed.

    Args:
        runs: list of `RunFacts`.
        make: function (dataset, [(run, analysis)]) that returns pieces of a page.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.test_sets))
    parts = []
    for name in names:
        analysed = [(run, run.analyses[name]) for run in runs if name in run.analyses]
        parts += [tag("h3", name)] if len(names) > 1 else []
        parts += make(name, analysed) if analysed else []
        reasons = [run.problems[name] for run in runs if name in run.test_sets and name in run.problems]
        parts += [note(f"{name}: {reason}.") for reason in dict.fromkeys(reasons)]
    if not names:
        parts.append(note("The run names no test set: DATASETS.TEST is empty."))
    return join(parts)


def precision_recall(runs):
    """Precision over recall, by class or by run."""

    def make(dataset, analysed):
        figures = []
        for task in _tasks(analysed, "curves"):
            for iou in ("0.50", "0.75"):
                lines, words = _curve_lines(analysed, task, iou)
                shown = xy_figure(lines, "recall", "precision", limits=(0, 1)) if lines else None
                if shown:
                    svg = svg_text(shown, f"pr-{_id(dataset)}-{task}-{iou[2:]}")
                    figures.append(figure(svg, f"{task}, IoU {iou}", words))
        return [grid(figures)] if figures else [note(f"{dataset} has no objects, so there is no recall.")]

    return by_dataset(runs, make)


def _tasks(analysed, key):
    return list(dict.fromkeys(task for _, found in analysed for task in found[key]))


def _id(name):
    return "".join(c if c.isalnum() else "-" for c in name)


def _curve_lines(analysed, task, iou):
    if len(analysed) > 1:
        found = [(run.name, a["curves"].get(task), run.color) for run, a in analysed]
        lines = [
            (name, curves["recall"], curves["mean"][iou], color) for name, curves, color in found if curves
        ]
        return [_line(*line) for line in lines if line[2]], "mean over the classes"
    ((_, analysis),) = analysed
    curves = analysis["curves"][task]
    classes = [c for c in curves["classes"] if c[iou]]
    if len(classes) <= _MOST_LINES:
        return [_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(classes)], ""
    objects = {row["name"]: row["objects"] for row in analysis["per_class"][task]}
    most = sorted(classes, key=lambda c: -objects[c["name"]])[: _MOST_LINES - 1]
    lines = [_line("mean", curves["recall"], curves["mean"][iou], 0)]
    lines += [_line(c["name"], curves["recall"], c[iou], i) for i, c in enumerate(most, start=1)]
    return lines, f"the {len(most)} classes with the most objects, and the mean over all {len(classes)}"


def _line(label, x, y, color):
    return {"label": label, "x": x, "y": y, "color": color}


def error_costs(runs):
    """How much AP each kind of error costs, and how often there is one."""

    def make(dataset, analysed):
        parts = []
        for task in _tasks(analysed, "errors"):
            found = [(run, a["errors"][task]) for run, a in analysed if task in a["errors"]]
            series = {run.name: [e["costs"][kind] for kind in _KINDS] for run, e in found}
            shown = bar_figure(_KINDS, series, "AP50 that mending it would gain")
            svg = svg_text(shown, f"cost-{_id(dataset)}-{task}")
            parts.append(tag("h3", f"{task} on {dataset}"))
            parts.append(
                tag("div", figure(svg, "What each kind of error costs"), _kinds_table(found), class_="beside")
            )
            if len(found) == 1:
                parts.append(details("By class", _by_class(found[0][1], dataset)))
        return parts

    lead = (
        "Each bar: how much higher AP50 would be if the errors of one kind were mended and nothing else "
        "changed (TIDE, Bolya et al. 2020). Counted are the detections above the score threshold with the "
        "best F1."
    )
    return join([tag("p", lead, class_="lead"), by_dataset(runs, make)])


def _kinds_table(found):
    rows = []
    for kind, words in {"correct": "the right class and place", **_KINDS}.items():
        counts = [(e["objects"] if kind == "missed" else e["detections"])[kind] for _, e in found]
        rows.append([kind, words, *counts])
    names = ["count"] if len(found) == 1 else [run.name for run, _ in found]
    return table(["kind", "what it is", *names], rows)


def _by_class(errors, dataset):
    kinds = [kind for kind in _KINDS if kind != "missed"]
    rows = [
        [c["name"], c["correct"], *(c[kind] for kind in kinds), c["erroneous"], c["missed"]]
        for c in errors["classes"]
    ]
    columns = ["class", "correct", *kinds, "objects found wrongly", "objects missed"]
    return table(columns, rows, f"Detections and objects of {dataset}")


def confusion(runs):
    """Which classes are taken for which."""

    def make(dataset, analysed):
        parts = []
        for run, analysis in analysed:
            found = analysis["confusion"]
            labels, counts, words = _busiest(found)
            shown = matrix_figure(counts, labels, labels, "found as", "what is there")
            svg = svg_text(shown, f"confusion-{_id(dataset)}-{run.color}")
            title = run.name if len(runs) > 1 else dataset
            pairs = [[p["truth"], p["found"], p["count"], round(100 * p["share"], 1)] for p in found["pairs"]]
            columns = ["what is there", "found as", "times", "% of the class"]
            shown = table(columns, pairs, "The classes that are mistaken most often")
            beside = shown if pairs else tag("p", "No object is taken for one of another class.")
            parts.append(tag("div", figure(svg, title, words), beside, class_="beside"))
        return parts

    lead = "Shades: shares of a row. Background as a row: detections where nothing is; as a column: missed."
    return join([tag("p", lead, class_="lead"), by_dataset(runs, make)])


def _busiest(found):
    """(labels, counts, words) of the classes with the most confusions, and the background."""
    labels, counts = found["labels"], found["counts"]
    last = len(labels) - 1
    if last <= _MOST_ROWS:
        return labels, counts, ""

    def wrong(i):
        return sum(counts[i][:last]) + sum(row[i] for row in counts[:last]) - 2 * counts[i][i]

    chosen = sorted(sorted(range(last), key=lambda i: (-wrong(i), -sum(counts[i])))[:_MOST_ROWS]) + [last]
    words = f"the {_MOST_ROWS} of {last} classes that are mistaken most often"
    return [labels[i] for i in chosen], [[counts[i][j] for j in chosen] for i in chosen], words


def calibration(runs):
    """Whether a score says how often a detection is right, and which threshold is best."""

    def make(dataset, analysed):
        lines, counts = [], {}
        for run, analysis in analysed:
            bins = analysis["calibration"]["bins"]
            known = [b for b in bins if b["count"]]
            line = _line(run.name, [b["score"] for b in known], [b["precision"] for b in known], run.color)
            lines.append({**line, "points": True})
            counts[run.name] = [b["count"] for b in bins]
        edges = [i / len(bins) for i in range(len(bins) + 1)]
        errors = ", ".join(_expected_error(run, a, len(analysed) > 1) for run, a in analysed)
        name = _id(dataset)
        curve = xy_figure(lines, "score", "share that is correct", limits=(0, 1), diagonal=True)
        scores = histogram_figure(edges, counts, "score", "detections")
        figures = [
            figure(svg_text(curve, f"calibration-{name}"), "Calibration", f"dashed: ideal; {errors}"),
            figure(svg_text(scores, f"scores-{name}"), "Scores of all detections"),
        ]
        return [grid(figures)]

    return by_dataset(runs, make)


def _expected_error(run, analysis, name):
    error = analysis["calibration"]["expected_error"]
    return (
        ("off by " if error is not None else "no detections")
        + (f"{100 * error:.1f} points on average" if error is not None else "")
        + (f" ({run.name})" if name else "")
    )


def thresholds(runs):
    """The score threshold with the best F1, of each class."""

    def make(dataset, analysed):
        if len(analysed) > 1:
            return [_thresholds_of_several(dataset, analysed)]
        found = analysed[0][1]["thresholds"]
        keys = ("threshold", "f1", "precision", "recall")
        rows = [[row["name"], *(_rounded(row[key]) for key in keys)] for row in found["classes"]]
        overall = [tag("strong", "all, one threshold"), *(_rounded(found["overall"][key]) for key in keys)]
        return [table(["class", "threshold", "F1", "precision", "recall"], [overall, *rows], dataset)]

    lead = "Detections with at least this score have the best F1 (harmonic mean of precision and recall)."
    return join([tag("p", lead, class_="lead"), by_dataset(runs, make)])


def _rounded(value):
    return Cell("–", None) if value is None else Cell(f"{value:.3f}", value)


def _thresholds_of_several(dataset, analysed):
    names = list(dict.fromkeys(row["name"] for _, a in analysed for row in a["thresholds"]["classes"]))
    rows = []
    for name in [None, *names]:
        found = [_of_class(a["thresholds"], name) for _, a in analysed]
        best = [f["f1"] for f in found]
        cells = []
        for f in found:
            shown = "–" if f["f1"] is None else f"{f['f1']:.3f} (from {f['threshold']:.2f})"
            cells.append(Cell(shown, f["f1"], is_best(f["f1"], best)))
        rows.append([name or tag("strong", "all, one threshold"), *cells])
    return table(["class", *(run.name for run, _ in analysed)], rows, f"F1 on {dataset}, and the threshold")


def _of_class(found, name):
    if name is None:
        return found["overall"]
    return next((c for c in found["classes"] if c["name"] == name), {"f1": None, "threshold": None})


def groups(runs):
    """How many objects are found, by their size and shape and by what is around them."""

    def make(dataset, analysed):
        figures, tables = [], []
        for key, (title, words) in _GROUPS.items():
            bins = [a["breakdown"][key] for _, a in analysed]
            used = [i for i in range(len(bins[0])) if any(b[i]["objects"] for b in bins)]
            names = [f"{bins[0][i]['name']}  ({bins[0][i]['objects']:,})" for i in used]
            if len(analysed) == 1:
                series = {
                    "all detections": [bins[0][i]["recall"] for i in used],
                    "above the threshold": [bins[0][i]["recall_above"] for i in used],
                }
            else:
                series = {
                    run.name: [b[i]["recall_above"] for i in used]
                    for (run, _), b in zip(analysed, bins, strict=True)
                }
            if names:
                svg = svg_text(
                    bar_figure(names, series, "share that is found"), f"group-{_id(dataset)}-{key}"
                )
                figures.append(figure(svg, title, f"{words}; in brackets: objects"))
                tables.append(_group_table(title, [bins[0][i] for i in used]))
        parts = [grid(figures)] if figures else [note(f"{dataset} has no objects.")]
        return parts + ([details("As tables", *tables)] if len(analysed) == 1 and tables else [])

    return by_dataset(runs, make)


def _group_table(title, bins):
    columns = [
        title.lower(),
        "objects",
        "found",
        "found wrongly",
        "missed",
        "recall",
        "recall, all scores",
        "mean IoU",
    ]
    rows = [
        [
            *(b[key] for key in ("name", "objects", "found", "erroneous", "missed")),
            *(_rounded(b[key]) for key in ("recall_above", "recall", "mean_iou")),
        ]
        for b in bins
    ]
    return table(columns, rows, title)
