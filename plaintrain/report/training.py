"""The sections on the training: its curves, its time and memory, its warnings."""

import math
import statistics

from plaintrain.charts import cut
from plaintrain.curves import panels
from plaintrain.plots import curve_figure
from plaintrain.report.html import Cell, figure, grid, join, note, table, tag
from plaintrain.report.overview import duration, run_label, training_seconds

# Weight of the smoothed line of a curve.
_SMOOTHING = 0.6
_MOST_WARNINGS = 100


def curves(runs):
    """The metrics over the iterations."""
    found = panels({run.name: run.metrics for run in runs})
    if not found:
        return note("metrics.json holds no values yet: the first come after LOG_PERIOD iterations.")
    figures = []
    for i, panel in enumerate(found):
        remark = "logarithmic" if panel["log"] else ""
        figures.append(figure(curve_figure(panel, _SMOOTHING), f"curve{i}", panel["title"], remark))
    lead = "Faint: as logged; strong: smoothed. Scores, learning rate and momentum are as they are."
    return join([tag("p", lead, class_="lead"), grid(figures)])


def timing(runs):
    """Where the time went, and the memory."""
    rows = []
    for run in runs:
        seconds, data = _median(run, "time"), _median(run, "data_time")
        images = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        rows.append(
            [
                run_label(run) if len(runs) > 1 else run.name,
                seconds,
                data,
                round(100 * data / seconds, 2) if seconds and data is not None else None,
                images / seconds if seconds and images else None,
                Cell(duration(training_seconds(run)), training_seconds(run)),
                max(run.metrics.get("max_mem", ((), (None,)))[1], default=None),
            ]
        )
    columns = [
        "run",
        "s per iteration",
        "s waiting for data",
        "% waiting",
        "images per s",
        "training",
        "peak memory (MiB)",
    ]
    parts = [table(columns, rows, sortable=len(runs) > 1)]
    if not any(run.metrics.get("time") for run in runs):
        parts = [note("metrics.json has no times yet.")]
    lead = "Medians over the iterations. Evaluations and saves are not counted."
    return join([tag("p", lead, class_="lead"), *parts])


def _median(run, name):
    values = [v for v in run.metrics.get(name, ((), ()))[1] if math.isfinite(v)]
    return statistics.median(values) if values else None


def warnings(runs):
    """What was logged as a warning or worse."""
    parts = []
    for run in runs:
        rows = [
            [
                w["level"],
                tag("span", cut(w["text"], 500)),
                w["count"],
                w["first"],
                w["last"],
                ", ".join(w["files"]),
            ]
            for w in run.warnings[:_MOST_WARNINGS]
        ]
        parts += [tag("h3", run_label(run))] if len(runs) > 1 else []
        if rows:
            parts.append(table(["level", "text", "times", "first", "last", "file"], rows))
        else:
            parts.append(tag("p", "Nothing was logged as a warning."))
        if len(run.warnings) > _MOST_WARNINGS:
            parts.append(note(f"And {len(run.warnings) - _MOST_WARNINGS} more, see log.txt."))
    return join(parts)
