"""Curves of a run's metrics: which belong into one plot, smoothed, and as text for a terminal."""

import datetime
import fnmatch
import math

from plaintrain.analysis.run_folder import estimate_seconds_left, split_result

# Of a task's metrics, those that are drawn together for one run.
_SHOWN = ("AP", "AP50", "AP75")
_SCHEDULES = ("lr", "momentum", "max_mem")
_TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "max_mem": "peak memory (MiB)"}
_MOST_CLASSES = 8
# Characters by height, and for a terminal without them by darkness.
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", " .:-=+*#"
_NAME_WIDTH = 24


def smooth(values, weight):
    """Return the exponential moving average of a list, without the pull of its start; NaN is skipped.

    Args:
        values: list of numbers.
        weight: of what came before, 0 (nothing is changed) to below 1.
    """
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(average / total if total else value)
    return smoothed


def wants_log(lines):
    """Return whether a logarithmic scale shows more of lines: all are above 0, and over 30 times apart."""
    values = [v for line in lines for v in line["y"] if math.isfinite(v)]
    return min(values, default=0) > 0 and max(values) > 30 * min(values)


def group_panels(runs, patterns=()):
    """Group the metrics of one or several runs into plots.

    Of one run, related metrics share a plot. Of several, each plot has one metric, a line a run.

    Args:
        runs: {run name: what `run_folder.read_metrics` returns}.
        patterns: globs of the metrics to show, such as "loss_*" or "*/AP"; empty for the usual ones.

    Returns:
        list of dicts: `title`; `type`, "loss", "result", "schedule", "time" or "other"; `lines`, dicts of
        `label`, `x` and `y` (lists) and `color`, an index that is the same for a run in every plot; `log`,
        whether the y axis is to be logarithmic; `legend`, whether the lines need their labels.
    """
    groups, panels = {}, []
    for name in select_metrics(dict.fromkeys(name for series in runs.values() for name in series), patterns):
        groups.setdefault(_get_group(name, everything=bool(patterns)), []).append(name)
    groups.pop(None, None)
    for (_, title, type_), names in sorted(groups.items(), key=lambda group: group[0][0]):
        if len(runs) == 1:
            (series,) = runs.values()
            lines = [make_line(_shorten(name), *series[name], i) for i, name in enumerate(names)]
            # One evaluation makes no curve, and so many classes cannot be told apart by colour.
            is_curve = type_ != "result" or any(len(line["x"]) > 1 for line in lines)
            if patterns or is_curve and not (title.startswith("AP by class") and len(names) > _MOST_CLASSES):
                panels.append(_panel(title, type_, lines, legend=len(lines) > 1))
            continue
        for name in names:
            # The by-class scores of several runs are for tables.
            if patterns or type_ != "result" or split_result(name)[2] in ("AP", "AP50"):
                lines = [make_line(run, *s[name], i) for i, (run, s) in enumerate(runs.items()) if name in s]
                panels.append(_panel(name, type_, lines, legend=True))
    return panels


def select_metrics(names, patterns):
    """Return the names that match one of some globs; all without any."""
    return [n for n in names if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _get_group(name, everything):
    """Return (position on the page, title, type) of the plot that a metric belongs into, or None."""
    if split_result(name):
        dataset, task, metric = split_result(name)
        where = f"{task} on {dataset}" if dataset else task
        if everything or metric in _SHOWN:
            return 2, f"AP, {where}", "result"
        return (3, f"AP by class, {where}", "result") if metric.startswith("AP-") else None
    if name.startswith("val/"):
        return 1, "validation loss", "loss"
    if "loss" in name and "/" not in name:
        return 0, "loss", "loss"
    if name in ("time", "data_time"):
        return 5, "seconds per iteration", "time"
    return (
        (4, _TITLES.get(name, name), "schedule" if name in _SCHEDULES else "other")
        if name != "epoch"
        else None
    )


def _shorten(name):
    """Return a metric's name within a plot whose title says the rest."""
    return split_result(name)[2].removeprefix("AP-") if split_result(name) else name.removeprefix("val/")


def make_line(label, x, y, color):
    return {"label": label, "x": x, "y": y, "color": color}


def _panel(title, type_, lines, legend):
    log = type_ not in ("result", "schedule") and wants_log(lines)
    return {"title": title, "type": type_, "lines": lines, "log": log, "legend": legend}


def format_state(name, metrics, state):
    """Return where a run stands, by its metrics and `RunState`, with the time that is left."""
    done = f"iteration {state.iteration + 1} of {state.max_iter}" if state.max_iter else "no iterations"
    left = estimate_seconds_left(metrics, state) if state.name == "running" else None
    eta = f", {datetime.timedelta(seconds=int(left))} left" if left is not None else ""
    return f"{name}: {state.name}, {done}{eta}"


def format_curves(metrics, patterns=(), smoothing=0.0, width=80, plain=False):
    """Return a line of text for each metric: its name, last value, curve and limits.

    Args:
        metrics, patterns: as `group_panels` has them, of one run.
        smoothing: see `smooth`.
        width: characters of a line.
        plain: use ASCII characters only.
    """
    names, lines = select_metrics(metrics, patterns), []
    if not patterns:
        results = [n for n in metrics if split_result(n) and split_result(n)[2] == "AP"]
        usual = ["total_loss", "val/total_loss", *results, "lr", "time", "data_time"]
        names = [name for name in usual if name in metrics]
    for name in names:
        values = smooth(metrics[name][1], smoothing)
        finite = [v for v in values if math.isfinite(v)] or [math.nan]
        label = name if len(name) < _NAME_WIDTH else "~" + name[-(_NAME_WIDTH - 2) :]
        curve = format_sparkline(values, max(8, width - _NAME_WIDTH - 37), _ASCII if plain else _BLOCKS)
        limits = f"{min(finite):.4g} to {max(finite):.4g}"
        lines.append(f"{label:<{_NAME_WIDTH}}{values[-1]:>10.4g}  {curve} {limits}")
    return lines


def format_sparkline(values, width, levels):
    """Return a curve as a line of the characters `levels`, from low to high, with gaps for NaN."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    text = ""
    for column in range(min(width, len(values))):
        start, end = (i * len(values) // min(width, len(values)) for i in (column, column + 1))
        chosen = [v for v in values[start:end] if math.isfinite(v)]
        height = (sum(chosen) / len(chosen) - low) / (high - low) if chosen and high > low else 0.0
        text += levels[round(height * (len(levels) - 1))] if chosen else " "
    return text.ljust(width)
