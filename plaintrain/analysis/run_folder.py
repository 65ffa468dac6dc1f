"""What a run has left in its folder (OUTPUT_DIR), also while it goes on, read as plain data.

What an older or interrupted run has not written is empty, not an error, and lines that are cut off are
left out. Nothing here needs torch.
"""

import contextlib
import csv
import json
import math
import os
import re
import statistics
import time
from collections import namedtuple

from plaintrain.analysis.run_log import opened, read_log
from plaintrain.config import get_cfg
from plaintrain.config.yaml import parse_yaml
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import read_text
from plaintrain.utils.lock import alive
from plaintrain.utils.run_files import read_results_file, recorded_starts

# The tasks in the names of results: [DATASET/]TASK/METRIC.
_RESULT = re.compile(r"(?:(?P<dataset>.+?)/)?(?P<task>bbox|segm|keypoints|box_proposals)/(?P<metric>.+)")
# Of a run on another machine, whose lock may not be seen here: how old its last line may be.
_SILENT_SECONDS = 600
_OF_A_RUN = ("config.yaml", "metrics.json", "metrics.csv", "log.txt", "inference")

RunState = namedtuple("RunState", "name iteration max_iter")


def check_run(folder):
    """Refuse what is no run folder.

    Raises:
        UserError: names the folder and what is missing in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: a run's folder (OUTPUT_DIR) was expected")
    if not any(os.path.exists(os.path.join(folder, name)) for name in _OF_A_RUN):
        raise UserError(
            f"{folder} is no run's folder: it holds neither config.yaml, metrics.json, log.txt nor inference/"
        )


def run_names(folders):
    """A short name for each run folder, the ends of the paths as far as they tell them apart."""
    paths = [os.path.abspath(folder).split(os.sep) for folder in folders]
    for parts in range(1, max(map(len, paths), default=1) + 1):
        names = [os.sep.join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{os.sep.join(path[-1:])} ({i + 1})" for i, path in enumerate(paths)]


def read_metrics(folder):
    """The series of metrics.json, or metrics.csv: {name: (iterations, values)}, lists by iteration.

    A value that was not finite is NaN. Of an iteration that stands there twice the later line counts.
    """
    path = os.path.join(folder, "metrics.json")
    found = _json_rows(path) if os.path.isfile(path) else _csv_rows(os.path.join(folder, "metrics.csv"))
    rows, series = {row["iteration"]: row for row in found if isinstance(row.get("iteration"), int)}, {}
    for iteration in sorted(rows):
        for name, value in rows[iteration].items():
            if name != "iteration" and (value is None or isinstance(value, int | float)):
                iterations, values = series.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(math.nan if value is None else float(value))
    return series


def _json_rows(path):
    with opened(path) as f:
        for line in f:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict):
                    yield content


def _csv_rows(path):
    with opened(path) as f:
        # What is not there and what was not finite are both empty.
        for row in csv.DictReader(f):
            with contextlib.suppress(TypeError, ValueError):
                yield {"iteration": int(row.pop("iteration")), **{n: float(v) for n, v in row.items() if v}}


def read_config(folder):
    """The config.yaml of a run as a cfg.

    Raises:
        UserError: there is none, or it has keys that are not known here.
    """
    path = os.path.join(folder, "config.yaml")
    if not os.path.isfile(path):
        raise UserError(f"there is no {path}")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


def read_config_tree(folder):
    """The config.yaml of a run as dicts, whatever its keys; {} without one."""
    path = os.path.join(folder, "config.yaml")
    with contextlib.suppress(OSError, ValueError):
        return parse_yaml(read_text(path), path)
    return {}


def read_starts(folder):
    """How the run was started and resumed: the `starts` of run.json (`engine.run_facts`), else from log.txt.

    From the log there are only `command` (one string in a list), `started` (as the log has it),
    `environment` and `world_size`.
    """
    starts, environment = recorded_starts(folder), {}
    if starts:
        return starts
    for record in read_log(folder).get("log.txt", ()):
        text = record.text
        of_machine = re.match(r"rank \d+ of (\d+)\n", text)
        if record.level == "INFO" and of_machine:
            pairs = (line.partition(": ") for line in text.splitlines()[1:])
            environment = {
                "world_size": int(of_machine[1]),
                "environment": {name: value for name, _, value in pairs if value},
            }
        elif record.level == "INFO" and text.startswith("command line: "):
            command = [text.removeprefix("command line: ")]
            starts.append({"command": command, "started": record.time, **environment})
    return starts


def split_result(name):
    """(dataset or "", task, metric) of a result's name as metrics.json has it; None for another name."""
    found = _RESULT.fullmatch(name)
    return (found["dataset"] or "", found["task"], found["metric"]) if found else None


def test_sets(folder):
    """The names of the run's test sets: those of its config, and others with predictions or results."""
    datasets = read_config_tree(folder).get("DATASETS", {})
    names = list(datasets.get("TEST") or ()) if isinstance(datasets, dict) else []
    inference = os.path.join(folder, "inference")
    found = sorted(os.listdir(inference)) if os.path.isdir(inference) else []
    return names + [n for n in found if n not in names and os.path.isdir(os.path.join(inference, n))]


def predictions_path(folder, dataset_name):
    """The file of the last evaluation's predictions on a dataset, or None if there is none."""
    path = os.path.join(folder, "inference", dataset_name, "coco_instances_results.json")
    return path if os.path.isfile(path) else None


def read_results(folder, metrics=None):
    """The scores of the last evaluation: {dataset: {task: {metric: number or NaN}}}.

    From inference/DATASET/results.json, or for a dataset without it from the last scores in metrics.json.

    Args:
        folder: the run's folder.
        metrics: what `read_metrics` gave, to save reading it again.
    """
    names, results = test_sets(folder), {}
    for name, (_, values) in (read_metrics(folder) if metrics is None else metrics).items():
        parts = split_result(name)
        if parts:
            dataset, task, metric = parts
            dataset = dataset or (names[0] if names else "")
            results.setdefault(dataset, {}).setdefault(task, {})[metric] = values[-1]
    for dataset in names:
        saved = read_results_file(os.path.join(folder, "inference", dataset))
        for task, scores in saved.get(dataset, {}).items():
            plain = {m: math.nan if v is None else v for m, v in scores.items()}
            results.setdefault(dataset, {})[task] = plain
    return results


def run_state(folder, metrics=None):
    """Where a run stands.

    Args:
        folder: the run's folder.
        metrics: what `read_metrics` gave, to save reading it again.

    Returns:
        `RunState`: `name` is "running", "finished", "interrupted", or "not trained" where no training has
        written anything; `iteration` is that of the last line of metrics.json (-1 without), `max_iter`
        SOLVER.MAX_ITER (0 if unknown).
    """
    metrics = read_metrics(folder) if metrics is None else metrics
    iteration = max((iterations[-1] for iterations, _ in metrics.values()), default=-1)
    solver = read_config_tree(folder).get("SOLVER", {})
    max_iter = solver.get("MAX_ITER", 0) if isinstance(solver, dict) else 0
    found, last = alive(folder), ""
    with opened(os.path.join(folder, "last_checkpoint")) as f:
        last = "".join(f).strip()
    if found:
        name = "running"
    elif last == "model_final.pth":
        # A resumed run's checkpoints come after it, until its end.
        name = "finished"
    elif found is None and _log_age(folder) < _SILENT_SECONDS:
        name = "running"
    else:
        name = "interrupted" if metrics or last else "not trained"
    return RunState(name, iteration, max_iter)


def _log_age(folder):
    ages = [time.time() - os.path.getmtime(os.path.join(folder, name)) for name in read_log(folder)]
    return min(ages, default=math.inf)


def seconds_left(metrics, state, window=20):
    """Seconds to the end of the training at the pace of the last lines; None if unknown."""
    _, times = metrics.get("time", ((), ()))
    times = [t for t in times[-window:] if t == t]
    if not times or state.max_iter <= 0:
        return None
    return statistics.median(times) * max(0, state.max_iter - state.iteration - 1)
