"""Group and smooth the metrics of a run for plots."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plaintrain.analysis.run_folder import Metrics, split_result
from plaintrain.utils.text import truncate_text

# See `make_line`.
Lines = Sequence[Mapping[str, Any]]
# Metrics of a task that share a plot.
_SHOWN = ("AP", "AP50", "AP75")
_SCHEDULES = ("lr", "momentum", "max_mem")
_TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "max_mem": "peak memory (MiB)"}
_MAX_CLASSES = 8


def smooth(values: Iterable[float], weight: float) -> list[float]:
    """Return the bias-corrected EMA with decay `weight`; NaN and infinite values are skipped."""
    average = 0.0
    total = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(average / total if total else value)
    return smoothed


def wants_log(lines: Lines) -> bool:
    """Return whether lines need a logarithmic axis: all values are positive and span a factor above 30."""
    values = [v for line in lines for v in line["y"] if math.isfinite(v)]
    return min(values, default=0) > 0 and max(values) > 30 * min(values)


def group_panels(runs: Mapping[str, Metrics], patterns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Group metrics into plots: related metrics of one run, or one metric of several runs.

    Args:
        runs: {run name: metrics}.
        patterns: globs of the metrics to show, such as "loss_*" or "*/AP"; empty for a default selection.

    Returns:
        dicts with `title`; `type`, "loss", "result", "schedule", "time" or "other"; `lines`, see `make_line`
        (a run has the same color in every plot); `log`, whether the y axis is logarithmic; `legend`, whether
        to draw one.
    """
    groups: dict[Any, list[str]] = {}
    for name in select_metrics(dict.fromkeys(name for series in runs.values() for name in series), patterns):
        groups.setdefault(_get_group(name, show_all=bool(patterns)), []).append(name)
    groups.pop(None, None)
    panels = []
    for (_, title, type_), names in sorted(groups.items(), key=lambda group: group[0][0]):
        if len(runs) == 1:
            (series,) = runs.values()
            lines = [make_line(_shorten(name), *series[name], i) for i, name in enumerate(names)]
            # A single evaluation is no curve, and colors cannot distinguish many classes.
            is_curve = type_ != "result" or any(len(line["x"]) > 1 for line in lines)
            if patterns or is_curve and not (title.startswith("AP by class") and len(names) > _MAX_CLASSES):
                panels.append(_make_panel(title, type_, lines, legend=len(lines) > 1))
            continue
        for name in names:
            result = split_result(name)
            if patterns or result is None or result[2] in ("AP", "AP50"):
                lines = [make_line(run, *s[name], i) for i, (run, s) in enumerate(runs.items()) if name in s]
                panels.append(_make_panel(name, type_, lines, legend=True))
    return panels


def select_metrics(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match a glob; without globs, all."""
    return [n for n in names if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _get_group(name, show_all):
    """Return (order, title, type) of the plot of a metric, or None if it is not shown."""
    if split_result(name):
        dataset, task, metric = split_result(name)
        suffix = f"{task} on {dataset}" if dataset else task
        if show_all or metric in _SHOWN:
            return 2, f"AP, {suffix}", "result"
        return (3, f"AP by class, {suffix}", "result") if metric.startswith("AP-") else None
    if name.startswith("val/"):
        return 1, "validation loss", "loss"
    if "loss" in name and "/" not in name:
        return 0, "loss", "loss"
    if name in ("time", "data_time"):
        return 5, "seconds per iteration", "time"
    type_ = "schedule" if name in _SCHEDULES else "other"
    return (4, _TITLES.get(name, name), type_) if name != "epoch" else None


def _shorten(name):
    """Return the label of a metric in a plot whose title has the dataset and the task."""
    return split_result(name)[2].removeprefix("AP-") if split_result(name) else name.removeprefix("val/")


def make_line(label: str, x: Sequence[float], y: Sequence[float], color: int) -> dict[str, Any]:
    """Return a line of a plot; `color` is an index into the palette."""
    return {"label": truncate_text(label, 48), "x": x, "y": y, "color": color}


def _make_panel(title, type_, lines, legend):
    log = type_ not in ("result", "schedule") and wants_log(lines)
    return {"title": truncate_text(title, 80), "type": type_, "lines": lines, "log": log, "legend": legend}
