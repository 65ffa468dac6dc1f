"""Which curves belong into one picture, and curves made smooth and short: plain data, no drawing."""

import fnmatch
import math

from plaintrain.analysis.run_folder import split_result

# Of a task's metrics, those that are drawn together for one run.
_SHOWN = ("AP", "AP50", "AP75")
_OTHER_KINDS = dict.fromkeys(("lr", "momentum", "max_mem"), "schedule")
# So many classes can be told apart by colour.
_MOST_CLASSES = 8


def smooth(values, weight):
    """Exponential moving average of a list, without the pull of its start; NaN is passed over.

    Args:
        values: list of numbers.
        weight: of what came before, 0 (nothing is changed) to below 1.
    """
    average, share, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            share = weight * share + (1 - weight)
        result.append(average / share if share else value)
    return result


def thin(x, y, most=600):
    """At most so many points of a curve, evenly chosen, the last always among them."""
    step = max(1, math.ceil(len(x) / most))
    keep = range((len(x) - 1) % step, len(x), step)
    return [x[i] for i in keep], [y[i] for i in keep]


def wants_log(lines):
    """Whether a logarithmic scale shows more of these lines: all above 0, and over 30 times apart."""
    values = sorted(v for line in lines for v in line["y"] if math.isfinite(v))
    if not values or values[0] <= 0:
        return False
    # A single wild value is no reason.
    return values[round(0.98 * (len(values) - 1))] > 30 * values[round(0.02 * (len(values) - 1))]


def panels(runs, patterns=()):
    """The pictures that show the metrics of one or several runs.

    Of one run, related metrics share a picture. Of several, each picture has one metric, a line a run.

    Args:
        runs: {run name: what `run_folder.read_metrics` gave}.
        patterns: globs of the metrics to show, such as "loss_*" or "*/AP"; empty for the usual ones.

    Returns:
        list of dicts: `title`; `kind`, "loss", "result", "schedule", "time" or "other"; `lines`, dicts of
        `label`, `x` and `y` (lists) and `color`, a number that is the same for a run in every picture;
        `log`, whether the y axis is to be logarithmic; `legend`, whether the lines need their labels.
    """
    known = list(dict.fromkeys(name for series in runs.values() for name in series))
    if patterns:
        known = [name for name in known if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    found = []
    for title, kind, names in _groups(known, all_of_them=bool(patterns)):
        if len(runs) == 1:
            (series,) = runs.values()
            lines = [curve_line(_short(name, kind), *series[name], i) for i, name in enumerate(names)]
            # One evaluation makes no curve.
            if patterns or kind != "result" or any(len(line["x"]) > 1 for line in lines):
                found.append(_panel(title, kind, lines, legend=len(lines) > 1))
            continue
        # The by-class scores of several runs are for tables.
        for name in names if patterns else _main(kind, names):
            lines = [curve_line(run, *s[name], i) for i, (run, s) in enumerate(runs.items()) if name in s]
            found.append(_panel(name, kind, lines, legend=True))
    return found


def _groups(names, all_of_them):
    """[(title, kind, names)] of metrics that belong together, in the order of the page."""
    losses = [n for n in names if "loss" in n and "/" not in n]
    validation = [n for n in names if n.startswith("val/")]
    times = [n for n in names if n in ("time", "data_time")]
    results, classes = {}, {}
    for name in names:
        parts = split_result(name)
        if parts:
            dataset, task, metric = parts
            where = f"{task} on {dataset}" if dataset else task
            if all_of_them or metric in _SHOWN:
                results.setdefault(f"AP, {where}", []).append(name)
            elif metric.startswith("AP-"):
                classes.setdefault(f"AP by class, {where}", []).append(name)
    classes = {title: members for title, members in classes.items() if len(members) <= _MOST_CLASSES}
    taken = {*losses, *validation, *times}
    others = [n for n in names if n not in taken and not split_result(n) and n != "epoch"]
    groups = [("loss", "loss", losses), ("validation loss", "loss", validation)]
    groups += [(title, "result", members) for title, members in {**results, **classes}.items()]
    titles = {"lr": "learning rate", "grad_norm": "gradient norm", "max_mem": "peak memory (MiB)"}
    groups += [(titles.get(name, name), _OTHER_KINDS.get(name, "other"), [name]) for name in others]
    groups += [("seconds per iteration", "time", times)]
    return [group for group in groups if group[2]]


def _main(kind, names):
    """The metrics of a group that several runs are compared by."""
    if kind == "result":
        return [n for n in names if split_result(n)[2] in ("AP", "AP50")]
    return names


def _short(name, kind):
    """A metric's name within a picture whose title says the rest."""
    if kind == "result" and split_result(name):
        return split_result(name)[2].removeprefix("AP-")
    return name.removeprefix("val/")


def curve_line(label, x, y, color):
    return {"label": label, "x": x, "y": y, "color": color}


def _panel(title, kind, lines, legend):
    log = kind not in ("result", "schedule") and wants_log(lines)
    return {"title": title, "kind": kind, "lines": lines, "log": log, "legend": legend}
