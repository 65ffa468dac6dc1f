"""The sections on the runs: how they stand, what was run, curves, AP, time and memory, warnings."""

import datetime
import math
import os
import shlex
import statistics

from plaintrain.analysis.run_folder import seconds_left, split_result
from plaintrain.config import get_cfg
from plaintrain.config.yaml import flatten
from plaintrain.report.render import Figure, format_duration, format_score, format_value, score_cell
from plaintrain.visualization.charts import cut
from plaintrain.visualization.curves import panels
from plaintrain.visualization.plots import curve_figure

# Of the place, not of the run.
_OF_THE_PLACE = ("OUTPUT_DIR",)
# Weight of the smoothed line of a curve.
_SMOOTHING = 0.6
_MOST_WARNINGS = 100


def training_seconds(run):
    """Return the seconds of all iterations, of the mean time in each line of metrics.json; None without."""
    iterations, times = run.metrics.get("time", ((), ()))
    total, before = 0.0, -1
    for iteration, seconds in zip(iterations, times, strict=True):
        total += (iteration - before) * seconds if math.isfinite(seconds) else 0.0
        before = iteration
    return total if iterations else None


def _scored_tasks(runs):
    return list(
        dict.fromkeys((d, task) for run in runs for d, tasks in run.results.items() for task in tasks)
    )


def _scores(runs, dataset, task):
    """Return the scores of each run's last evaluation, {metric: score} each."""
    return [run.results.get(dataset, {}).get(task, {}) for run in runs]


def _score_cells(scores, metric):
    values = [s.get(metric) for s in scores]
    return [score_cell(value, values) for value in values]


def summary(runs):
    """Return the few numbers that matter most and the state of each run."""
    tasks = _scored_tasks(runs)
    if len(runs) > 1:
        metrics = [(name, task, dataset) for dataset, task in tasks for name in ("AP", "AP50")]
        columns = [f"{name} ({task}, {dataset})" for name, task, dataset in metrics]
        scores = [_score_cells(_scores(runs, dataset, task), name) for name, task, dataset in metrics]
        rows = [
            [run, run.state.name, run.state.iteration + 1, training_seconds(run), *cells]
            for run, *cells in zip(runs, *scores, strict=True)
        ]
        return {"columns": columns, "rows": rows}
    (run,) = runs
    cards = []
    for dataset, task in tasks:
        scores = run.results[dataset][task]
        names = [name for name in ("AP", "AP50", "AP75") if name in scores]
        cards += [(name, format_score(scores[name]), f"{task}, {dataset}") for name in names]
    seconds = training_seconds(run)
    if seconds is not None:
        cards.append(("training", format_duration(seconds), f"{run.state.iteration + 1:,} iterations"))
    left = seconds_left(run.metrics, run.state) if run.state.name == "running" else None
    return {"run": run, "seconds_left": left, "cards": cards[:8], "facts": _facts(run), "best": _best(run)}


def _facts(run):
    """Return names and values that describe the model and the data."""
    model = run.config.get("MODEL", {})
    words = [model.get("META_ARCHITECTURE"), model.get("BACKBONE", {}).get("NAME"), model.get("WEIGHTS")]
    facts = [("model", ", ".join(filter(None, words))), ("trained on", ", ".join(run.train_sets))]
    for name in run.test_sets:
        a = run.analyses.get(name)
        counts = ""
        if a:
            counts = f": {a['images']:,} images, {a['objects']:,} objects, {a['detections']:,} detections"
        facts.append(("tested on", name + counts))
    return facts


def _best(run):
    """Return a sentence on the evaluation with the best AP; None with fewer than two."""
    metric = next((n for n in run.metrics if split_result(n) and split_result(n)[2] == "AP"), None)
    iterations, values = run.metrics.get(metric, ((), ()))
    known = [(v, i) for i, v in zip(iterations, values, strict=True) if math.isfinite(v)]
    if len(known) < 2:
        return None
    value, at = max(known)
    if at == iterations[-1]:
        return f"The last of {len(values)} evaluations was the best ({metric})."
    words = f"The best of {len(values)} evaluations was after iteration {at + 1:,}: {metric} "
    return f"{words}{value:.1f}, now {values[-1]:.1f}."


def what_was_run(runs):
    """Return commands, configs, versions, machines and the state of git."""
    starts = [(run, _start(run)) for run in runs]
    if len(runs) == 1:
        return {"starts": starts, **_config_of_one(runs[0])}
    configs = [flatten(run.config) for run in runs]
    rows = []
    for key in sorted(set().union(*configs) - set(_OF_THE_PLACE)):
        values = [config.get(key, "–") for config in configs]
        if any(value != values[0] for value in values):
            rows.append([key, *map(_setting, values)])
    return {"starts": starts, "names": [run.name for run in runs], "differences": rows}


def _start(run):
    """Describe the last start and the state of the folder; None where no start is known."""
    if not run.starts:
        return None
    start = run.starts[-1]
    command = list(map(str, start.get("command") or ["–"]))
    git = start.get("git") or {}
    changed = git.get("changed_files")
    if isinstance(changed, list):
        changed = f"{len(changed)}: {', '.join(map(str, changed[:10]))}" if changed else "none"
    resumed = len(run.starts) - 1
    facts = {
        "folder": os.path.abspath(run.folder),
        "config file": start.get("config_file"),
        "started": start.get("started"),
        "last line of metrics.json": _last_written(run),
        "resumed": f"{resumed} times, first started {run.starts[0].get('started')}" if resumed else "",
        "processes": start.get("world_size"),
        "plaintrain": start.get("plaintrain"),
        "git commit": f"{git['commit']} ({git.get('branch')})" if git.get("commit") else "",
        "files changed since": changed,
    }
    command = shlex.join(command) if len(command) > 1 else command[0]
    return {"command": command, "facts": facts, "environment": start.get("environment") or {}}


def _last_written(run):
    path = os.path.join(run.folder, "metrics.json")
    if not os.path.isfile(path):
        return ""
    written = datetime.datetime.fromtimestamp(os.path.getmtime(path)).astimezone()
    return written.isoformat(timespec="seconds")


def _config_of_one(run):
    """Return the config and its differences from the one it is based on or, if unknown, the defaults."""
    config = flatten(run.config)
    changes = run.starts[-1].get("changes") if run.starts else None
    against = "the config it is based on"
    if not isinstance(changes, list):
        defaults = flatten(get_cfg())
        changes = [(k, defaults.get(k, "–"), v) for k, v in config.items() if defaults.get(k, "–") != v]
        against = "the defaults"
    return {
        "against": against,
        "changes": [[key, _setting(before), _setting(now)] for key, before, now in changes],
        "config": [[key, _setting(value)] for key, value in sorted(config.items())],
    }


def _setting(value):
    return "null" if value is None else str(format_value(value)) if value != "" else "''"


def curves(runs):
    """Draw the metrics over the iterations."""
    figures = []
    for i, panel in enumerate(panels({run.name: run.metrics for run in runs})):
        remark = "logarithmic" if panel["log"] else ""
        figures.append(Figure(f"curve{i}", curve_figure(panel, _SMOOTHING), panel["title"], remark))
    return figures


def scores(runs):
    """Return the scores of the last evaluation, and those by class."""
    columns, tables = [run.name for run in runs] if len(runs) > 1 else ["AP"], []
    for dataset, task in _scored_tasks(runs):
        known = _scores(runs, dataset, task)
        names = list(dict.fromkeys(name for s in known for name in s))
        main = [[n, *_score_cells(known, n), n] for n in names if "-" not in n]
        classes = [[n.removeprefix("AP-"), *_score_cells(known, n)] for n in names if n.startswith("AP-")]
        table = {"columns": columns, "rows": classes, "skipped": 0} if classes else None
        if classes and len(runs) == 1 and dataset in runs[0].analyses:
            table = _class_table(runs[0].analyses[dataset]["per_class"].get(task, []))
        tables.append({"dataset": dataset, "task": task, "main": main, "classes": table})
    return {"columns": [run.name for run in runs] if len(runs) > 1 else ["score"], "tables": tables}


def _class_table(classes):
    """Return AP by class with the number of objects, from the analysis of a single run."""
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    shown = [c for c in classes if c["objects"]]
    rows = [[c["name"], c["objects"], *(score_cell(c[m]) for m in metrics)] for c in shown]
    return {"columns": ["objects", *metrics], "rows": rows, "skipped": len(classes) - len(shown)}


def timing(runs):
    """Return times of an iteration, of the training, and the memory: a row for each run."""
    rows = []
    for run in runs:
        seconds, data = _median(run, "time"), _median(run, "data_time")
        images = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        rows.append(
            [
                run,
                seconds,
                data,
                round(100 * data / seconds, 2) if seconds and data is not None else None,
                images / seconds if seconds and images else None,
                training_seconds(run),
                max(run.metrics.get("max_mem", ((), (None,)))[1], default=None),
            ]
        )
    return rows if any(run.metrics.get("time") for run in runs) else []


def _median(run, name):
    values = [v for v in run.metrics.get(name, ((), ()))[1] if math.isfinite(v)]
    return statistics.median(values) if values else None


def warnings(runs):
    """Return (run, rows of what was logged as a warning or worse, number of those skipped) of each run."""
    logged = []
    for run in runs:
        rows = [
            [w["level"], cut(w["text"], 500), w["count"], w["first"], w["last"], ", ".join(w["files"])]
            for w in run.warnings[:_MOST_WARNINGS]
        ]
        logged.append((run, rows, len(run.warnings) - len(rows)))
    return logged
