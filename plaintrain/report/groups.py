"""The sections on scores and on groups of objects: calibration, thresholds, size and what is around."""

from plaintrain.charts import bar_figure, histogram_figure, xy_figure
from plaintrain.curves import curve_line
from plaintrain.report.detections import by_dataset
from plaintrain.report.html import Cell, details, figure, grid, join, note, table, tag
from plaintrain.report.overview import is_best

_GROUPS = {
    "size": ("Size", "root of the area in pixels"),
    "aspect": ("Shape", "width : height"),
    "overlaps": ("Crowdedness", "other objects that overlap it (IoU from 0.1)"),
    "objects_per_image": ("Objects in the image", "number"),
}


def calibration(runs):
    """Whether a score says how often a detection is right, and which threshold is best."""

    def _make(dataset, analysed):
        lines, counts = [], {}
        for run, analysis in analysed:
            bins = analysis["calibration"]["bins"]
            known = [b for b in bins if b["count"]]
            line = curve_line(
                run.name, [b["score"] for b in known], [b["precision"] for b in known], run.color
            )
            lines.append({**line, "points": True})
            counts[run.name] = [b["count"] for b in bins]
        edges = [i / len(bins) for i in range(len(bins) + 1)]
        errors = ", ".join(_expected_error(run, a, len(analysed) > 1) for run, a in analysed)
        curve = xy_figure(lines, "score", "share that is correct", limits=(0, 1), diagonal=True)
        colors = [line["color"] for line in lines]
        scores = histogram_figure(edges, counts, "score", "detections", colors=colors)
        figures = [
            figure(curve, f"calibration-{dataset}", "Calibration", f"dashed: ideal; {errors}"),
            figure(scores, f"scores-{dataset}", "Scores of all detections"),
        ]
        return [grid(figures)]

    return by_dataset(runs, _make)


def _expected_error(run, analysis, name):
    error = analysis["calibration"]["expected_error"]
    return (
        ("off by " if error is not None else "no detections")
        + (f"{100 * error:.1f} points on average" if error is not None else "")
        + (f" ({run.name})" if name else "")
    )


def thresholds(runs):
    """The score threshold with the best F1, of each class."""

    def _make(dataset, analysed):
        if len(analysed) > 1:
            return [_thresholds_of_several(dataset, analysed)]
        found = analysed[0][1]["thresholds"]
        keys = ("threshold", "f1", "precision", "recall")
        rows = [[row["name"], *(_rounded(row[key]) for key in keys)] for row in found["classes"]]
        overall = [tag("strong", "all, one threshold"), *(_rounded(found["overall"][key]) for key in keys)]
        return [table(["class", "threshold", "F1", "precision", "recall"], [overall, *rows])]

    lead = "Detections with at least this score have the best F1 (harmonic mean of precision and recall)."
    return join([tag("p", lead, class_="lead"), by_dataset(runs, _make)])


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

    def _make(dataset, analysed):
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
                colors = [run.color for run, _ in analysed] if len(analysed) > 1 else None
                shown = bar_figure(names, series, "share that is found", colors=colors)
                name = f"group-{dataset}-{key}"
                figures.append(figure(shown, name, title, f"{words}; in brackets: objects"))
                tables.append(_group_table(title, [bins[0][i] for i in used]))
        parts = [grid(figures)] if figures else [note(f"{dataset} has no objects.")]
        return parts + ([details("As tables", *tables)] if len(analysed) == 1 and tables else [])

    return by_dataset(runs, _make)


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
