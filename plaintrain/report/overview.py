"""The sections on the run itself: how it stands, and what was run."""

import datetime
import math
import os
import shlex

from plaintrain.config import get_cfg
from plaintrain.plots import PALETTE
from plaintrain.report.html import (
    Cell,
    cards,
    details,
    facts,
    join,
    note,
    score,
    score_cell,
    table,
    tag,
)
from plaintrain.run_folder import seconds_left, split_result
from plaintrain.utils.yaml_files import flatten

# Differences that are shown at once.
_AT_ONCE = 25
# Of the place, not of the run.
_OF_THE_PLACE = ("OUTPUT_DIR",)


def run_label(run):
    """A run's name with its colour."""
    return join(
        [tag("span", class_="swatch", style=f"background:{PALETTE[run.color % len(PALETTE)]}"), run.name]
    )


def duration(seconds):
    """Seconds as h:mm:ss; "–" where they are not known."""
    return "–" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def state_text(run):
    """Where a run stands, in a sentence, and the badge for it."""
    name, iteration, max_iter = run.state
    done = f"{iteration + 1:,} of {max_iter:,} iterations"
    if name == "running":
        left = seconds_left(run.metrics, run.state)
        words = f"Still running: {done}" + (f", about {duration(left)} left." if left is not None else ".")
    elif name == "finished":
        early = max_iter and iteration + 1 < max_iter
        words = f"Finished: {done}" + (", ended early by SOLVER.PATIENCE." if early else ".")
    elif name == "interrupted":
        words = f"Interrupted after {done}; the same command with --resume goes on."
    else:
        words = "No training has written into this folder."
    return tag("span", name, class_=f"badge {name.split()[0]}"), words


def training_seconds(run):
    """Seconds that the iterations took, of the mean time of each line of metrics.json; None without."""
    iterations, times = run.metrics.get("time", ((), ()))
    total, before = 0.0, -1
    for iteration, seconds in zip(iterations, times, strict=True):
        total += (iteration - before) * seconds if math.isfinite(seconds) else 0.0
        before = iteration
    return total if iterations else None


def main_scores(run):
    """[(dataset, task, scores)] of the last evaluation."""
    return [(d, task, scores) for d, tasks in run.results.items() for task, scores in tasks.items()]


def summary(runs):
    """The few numbers that matter most."""
    if len(runs) > 1:
        return _summary_of_several(runs)
    (run,) = runs
    badge, words = state_text(run)
    items = []
    for dataset, task, scores in main_scores(run):
        where = f"{task}, {dataset}"
        items += [(name, score(scores[name]), where) for name in ("AP", "AP50", "AP75") if name in scores]
    seconds = training_seconds(run)
    if seconds is not None:
        items.append(("training", duration(seconds), f"{run.state.iteration + 1:,} iterations"))
    parts = [tag("p", badge, " ", words), cards(items[:8]), facts(_what_it_is(run))]
    best = _best(run)
    if best:
        parts.append(tag("p", best))
    if not run.results:
        parts.append(
            note("There are no scores yet: the first evaluation (TEST.EVAL_PERIOD, or the end) makes them.")
        )
    return join(parts)


def _what_it_is(run):
    """The model and the data, in a few words."""
    model = run.config.get("MODEL", {})
    parts = [model.get("META_ARCHITECTURE"), model.get("BACKBONE", {}).get("NAME"), model.get("WEIGHTS")]
    yield "model", ", ".join(part for part in parts if part)
    yield "trained on", ", ".join(run.train_sets)
    for name in run.test_sets:
        a = run.analyses.get(name)
        counts = (
            f": {a['images']:,} images, {a['objects']:,} objects, {a['detections']:,} detections" if a else ""
        )
        yield "tested on", name + counts


def _best(run):
    """A sentence on the evaluation with the best AP, where that is not the last."""
    name = next((n for n in run.metrics if split_result(n) and split_result(n)[2] == "AP"), None)
    iterations, values = run.metrics.get(name, ((), ()))
    known = [(v, i) for i, v in zip(iterations, values, strict=True) if math.isfinite(v)]
    if len(known) < 2:
        return ""
    value, at = max(known)
    if at == iterations[-1]:
        return f"The last of {len(values)} evaluations was the best ({name})."
    words = f"The best of {len(values)} evaluations was after iteration {at + 1:,}: {name} "
    return f"{words}{value:.1f}, now {values[-1]:.1f}."


def _summary_of_several(runs):
    scored = list(dict.fromkeys((d, t) for run in runs for d, t, _ in main_scores(run)))
    columns = ["run", "state", "iterations", "training"]
    columns += [f"{name} ({task}, {dataset})" for dataset, task in scored for name in ("AP", "AP50")]
    values = [
        [run.results.get(d, {}).get(t, {}).get(name) for run in runs]
        for d, t in scored
        for name in ("AP", "AP50")
    ]
    rows = []
    for i, run in enumerate(runs):
        seconds = training_seconds(run)
        row = [run_label(run), state_text(run)[0], run.state.iteration + 1, Cell(duration(seconds), seconds)]
        rows.append(row + [score_cell(found[i], is_best(found[i], found)) for found in values])
    return table(columns, rows)


def is_best(value, values, least=False):
    """Whether a value is the best of several, of which at least two are known."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return len(known) > 1 and value is not None and value == (min if least else max)(known)


def what_was_run(runs):
    """Commands, configs, versions, machines, the state of git."""
    if len(runs) == 1:
        return join([*_one_start(runs[0]), tag("h3", "Config"), *_config_of_one(runs[0])])
    parts = []
    for run in runs:
        parts.append(details(run_label(run), *_one_start(run)))
    return join([tag("h3", "Config differences"), _config_of_several(runs), tag("h3", "Starts"), *parts])


def _one_start(run):
    if not run.starts:
        yield note("Neither run.json nor log.txt in the folder says how it was started.")
        return
    start = run.starts[-1]
    command = start.get("command") or ["–"]
    yield tag("pre", shlex.join(map(str, command)) if len(command) > 1 else command[0])
    git, resumed = start.get("git") or {}, len(run.starts) - 1
    changed = git.get("changed_files")
    if isinstance(changed, list):
        changed = f"{len(changed)}: {', '.join(map(str, changed[:10]))}" if changed else "none"
    pairs = [
        ("folder", os.path.abspath(run.folder)),
        ("config file", start.get("config_file")),
        ("started", start.get("started")),
        ("last line of metrics.json", _last_written(run)),
        ("resumed", f"{resumed} times, first started {run.starts[0].get('started')}" if resumed else ""),
        ("processes", start.get("world_size")),
        ("plaintrain", start.get("plaintrain")),
        ("git commit", f"{git['commit']} ({git.get('branch')})" if git.get("commit") else ""),
        ("files changed since", changed if git else ""),
    ]
    yield facts(pairs)
    environment = start.get("environment") or {}
    yield tag("h3", "Versions and machine")
    yield facts(environment.items(), compact=True)


def _last_written(run):
    path = os.path.join(run.folder, "metrics.json")
    if not os.path.isfile(path):
        return ""
    written = datetime.datetime.fromtimestamp(os.path.getmtime(path)).astimezone()
    return written.isoformat(timespec="seconds")


def _config_of_one(run):
    start = run.starts[-1] if run.starts else {}
    changes = start.get("changes")
    against = "the config it is based on"
    if not isinstance(changes, list):
        defaults, config = flatten(get_cfg()), flatten(run.config)
        changes = [(k, defaults.get(k, "–"), v) for k, v in config.items() if defaults.get(k, "–") != v]
        against = "the defaults"
    if not run.config:
        yield note("The folder has no config.yaml.")
        return
    rows = [[tag("code", key), _value(before), _value(now)] for key, before, now in changes]
    shown = table(["key", against, "this run"], rows)
    what = f"{len(rows)} keys differ from {against}."
    yield tag("p", what)
    yield shown if len(rows) <= _AT_ONCE else details("Show them", shown)
    everything = [[tag("code", k), _value(v)] for k, v in sorted(flatten(run.config).items())]
    yield details("The whole config", table(["key", "value"], everything))


def _value(value):
    return tag("code", value if value not in ("", None) else "''" if value == "" else "null")


def _config_of_several(runs):
    flat = [flatten(run.config) for run in runs]
    keys = sorted(set().union(*flat) - set(_OF_THE_PLACE))
    rows = []
    for key in keys:
        values = [config.get(key, "–") for config in flat]
        if any(value != values[0] for value in values):
            rows.append([tag("code", key), *map(_value, values)])
    if not rows:
        return tag("p", "The configs are equal, but for OUTPUT_DIR.")
    return table(["key", *(run.name for run in runs)], rows)
