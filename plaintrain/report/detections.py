"""The sections on what the detections get wrong: precision and recall, errors, confusion."""

from plaintrain.charts import bar_figure, matrix_figure, xy_figure
from plaintrain.curves import curve_line
from plaintrain.report.html import details, figure, grid, join, note, table, tag

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
_KINDS = list(ERROR_TYPES)[1:]


def by_dataset(runs, make, headings=True):
    """What `make` gives for each test set, and a sentence for each that could not be analysed.

    Args:
        runs: list of `RunFacts`.
        make: function (dataset, [(run, analysis)]) that returns pieces of a page.
        headings: whether the names of several test sets are to stand above their parts.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.test_sets))
    parts = []
    for name in names:
        analysed = [(run, run.analyses[name]) for run in runs if name in run.analyses]
        parts += [tag("h3", name)] if headings and len(names) > 1 else []
        parts += make(name, analysed) if analysed else []
        reasons = [run.problems[name] for run in runs if name in run.test_sets and name in run.problems]
        parts += [note(f"{name}: {reason}.") for reason in dict.fromkeys(reasons)]
    if not names:
        parts.append(note("The run names no test set: DATASETS.TEST is empty."))
    return join(parts)


def precision_recall(runs):
    """Precision over recall, by class or by run."""

    def _make(dataset, analysed):
        figures = []
        for task in _tasks(analysed, "curves"):
            for iou in ("0.50", "0.75"):
                lines, words = _curve_lines(analysed, task, iou)
                if lines:
                    shown = xy_figure(lines, "recall", "precision", limits=(0, 1))
                    name = f"pr-{dataset}-{task}-{iou[2:]}"
                    figures.append(figure(shown, name, f"{task}, IoU {iou}", words))
        return [grid(figures)] if figures else [note(f"{dataset} has no objects, so there is no recall.")]

    return by_dataset(runs, _make)


def _tasks(analysed, key):
    return list(dict.fromkeys(task for _, found in analysed for task in found[key]))


def _curve_lines(analysed, task, iou):
    if len(analysed) > 1:
        found = [(run.name, a["curves"].get(task), run.color) for run, a in analysed]
        lines = [
            (name, curves["recall"], curves["mean"][iou], color) for name, curves, color in found if curves
        ]
        return [curve_line(*line) for line in lines if line[2]], "mean over the classes"
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


def error_costs(runs):
    """How much AP each kind of error costs, and how often there is one."""

    def _make(dataset, analysed):
        parts = []
        for task in _tasks(analysed, "errors"):
            found = [(run, a["errors"][task]) for run, a in analysed if task in a["errors"]]
            series = {run.name: [e["costs"][kind] for kind in _KINDS] for run, e in found}
            colors = [run.color for run, _ in found]
            shown = bar_figure(_KINDS, series, "AP50 that mending it would gain", colors=colors)
            shown = figure(shown, f"cost-{dataset}-{task}", "What each kind of error costs")
            parts.append(tag("h3", f"{task} on {dataset}"))
            parts.append(tag("div", shown, _kinds_table(found), class_="beside"))
            if len(found) == 1:
                parts.append(details("By class", _by_class(found[0][1], dataset)))
        return parts

    lead = (
        "Each bar: how much higher AP50 would be if the errors of one kind were mended and nothing else "
        "changed (TIDE, Bolya et al. 2020). Counted are the detections above the score threshold with the "
        "best F1."
    )
    return join([tag("p", lead, class_="lead"), by_dataset(runs, _make, headings=False)])


def _kinds_table(found):
    rows = []
    for kind, words in ERROR_TYPES.items():
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

    def _make(dataset, analysed):
        parts = []
        for run, analysis in analysed:
            found = analysis["confusion"]
            labels, counts, words = _busiest(found)
            drawn = matrix_figure(counts, labels, labels, "found as", "what is there")
            title = run.name if len(runs) > 1 else dataset
            pairs = [[p["truth"], p["found"], p["count"], round(100 * p["share"], 1)] for p in found["pairs"]]
            columns = ["what is there", "found as", "times", "% of the class"]
            shown = table(columns, pairs, "The classes that are mistaken most often")
            beside = shown if pairs else tag("p", "No object is taken for one of another class.")
            name, is_wide = f"confusion-{dataset}-{run.color}", len(labels) > _MOST_LINES
            drawn = figure(drawn, name, title, words, is_wide)
            parts.append(tag("div", drawn, beside, class_="beside"))
        return parts

    lead = "Shades: shares of a row. Background as a row: detections where nothing is; as a column: missed."
    return join([tag("p", lead, class_="lead"), by_dataset(runs, _make)])


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
