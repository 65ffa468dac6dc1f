"""Read what a run has left in its folder (OUTPUT_DIR), also while it goes on, as plain data.

What an older or interrupted run has not written is empty, not an error, and lines that are cut off are
skipped. Nothing here needs torch.
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

from plaintrain.config import get_cfg
from plaintrain.config.yaml import parse_yaml
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import describe_os_error, read_results_file, read_text
from plaintrain.utils.lock import is_in_use

# The tasks in the names of results: [DATASET/]TASK/METRIC.
_RESULT = re.compile(r"(?:(?P<dataset>.+?)/)?(?P<task>bbox|segm|keypoints|box_proposals)/(?P<metric>.+)")
_LOG_HEAD = r"\[(\d\d/\d\d \d\d:\d\d:\d\d) [\w.]+\] ([A-Z]+): "
# Time, level and text, also of several lines.
_LOG_RECORD = re.compile(rf"^{_LOG_HEAD}(.*(?:\n(?!{_LOG_HEAD}).*)*)", re.MULTILINE)
_LOG_FILE = re.compile(r"log\.txt(\.rank\d+)?")
# A record of the log that is longer is cut.
_LONGEST = 4000
# Of a run on another machine, whose lock may not be seen here: how old its last line may be.
_SILENT_SECONDS = 600
_OF_A_RUN = ("config.yaml", "metrics.json", "metrics.csv", "log.txt", "inference")

RunState = namedtuple("RunState", "name iteration max_iter")


def check_run(folder):
    """Reject what is no run folder."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: a run's folder (OUTPUT_DIR) was expected")
    if not any(os.path.exists(os.path.join(folder, name)) for name in _OF_A_RUN):
        raise UserError(
            f"{folder} is no run's folder: it holds neither config.yaml, metrics.json, log.txt nor inference/"
        )


def get_run_names(folders):
    """Return a name for each run folder: its own if it tells them apart, otherwise the path."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _read_lines(path):
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            yield from f
    except OSError as e:
        raise UserError(f"{path} cannot be read: {describe_os_error(e)}") from e


def read_metrics(folder):
    """Return the series of metrics.json, or metrics.csv: {name: (iterations, values)}, lists by iteration.

    A value that was not finite is NaN. Of an iteration that stands there twice the later line counts.
    """
    path = os.path.join(folder, "metrics.json")
    lines = _json_lines(path) if os.path.isfile(path) else _csv_lines(os.path.join(folder, "metrics.csv"))
    by_iteration = {line["iteration"]: line for line in lines if isinstance(line.get("iteration"), int)}
    series = {}
    for iteration in sorted(by_iteration):
        for name, value in by_iteration[iteration].items():
            if name != "iteration" and (value is None or isinstance(value, int | float)):
                iterations, values = series.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(math.nan if value is None else float(value))
    return series


def _json_lines(path):
    for line in _read_lines(path):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(line)
            if isinstance(content, dict):
                yield content


def _csv_lines(path):
    # What is missing and what was not finite are both empty.
    for line in csv.DictReader(_read_lines(path)):
        with contextlib.suppress(TypeError, ValueError):
            yield {"iteration": int(line.pop("iteration")), **{n: float(v) for n, v in line.items() if v}}


def read_config(folder):
    """Return the config.yaml of a run as a cfg."""
    path = os.path.join(folder, "config.yaml")
    if not os.path.isfile(path):
        problem = "has no config.yaml" if os.path.isdir(folder) else "does not exist"
        raise UserError(f"{folder!r} {problem}: expected the OUTPUT_DIR of a training")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


def read_config_tree(folder):
    """Return the config.yaml of a run as dicts, whatever its keys; {} without one."""
    path = os.path.join(folder, "config.yaml")
    with contextlib.suppress(UserError):
        return parse_yaml(read_text(path), path)
    return {}


def split_result(name):
    """Return (dataset or "", task, metric) of a result's name in metrics.json; None for another name."""
    match = _RESULT.fullmatch(name)
    return (match["dataset"] or "", match["task"], match["metric"]) if match else None


def list_test_sets(folder):
    """Return the run's test sets: those of its config, and others with predictions or results."""
    names = list(read_config_tree(folder).get("DATASETS", {}).get("TEST") or ())
    inference = os.path.join(folder, "inference")
    evaluated = sorted(os.listdir(inference)) if os.path.isdir(inference) else []
    return names + [n for n in evaluated if n not in names and os.path.isdir(os.path.join(inference, n))]


def find_predictions(folder, dataset_name):
    """Return the file of the last evaluation's predictions on a dataset."""
    path = os.path.join(folder, "inference", dataset_name, "coco_instances_results.json")
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} holds no predictions for {dataset_name}; the next evaluation writes them, also that "
            f"of scripts/test_net.py --config-file {os.path.join(folder, 'config.yaml')} --resume"
        )
    return path


def read_run_results(folder):
    """Return the scores of the last evaluations: {dataset: {task: {metric: number or None}}}."""
    results = {}
    for dataset in list_test_sets(folder):
        results |= read_results_file(os.path.join(folder, "inference", dataset))
    return results


def get_run_state(folder, metrics):
    """Return the `RunState` of a folder and its metrics.

    `name` is "running", "finished", "interrupted", or "not trained" where no training has written anything;
    `iteration` is that of the last line of metrics.json (-1 without), `max_iter` SOLVER.MAX_ITER (0 if
    unknown).
    """
    iteration = max((iterations[-1] for iterations, _ in metrics.values()), default=-1)
    max_iter = read_config_tree(folder).get("SOLVER", {}).get("MAX_ITER", 0)
    is_alive, last = is_in_use(folder), "".join(_read_lines(os.path.join(folder, "last_checkpoint"))).strip()
    ages = [time.time() - os.path.getmtime(path) for path in _log_files(folder)]
    if is_alive:
        name = "running"
    elif last == "model_final.pth":
        # A resumed run's checkpoints come after it, until its end.
        name = "finished"
    elif is_alive is None and min(ages, default=math.inf) < _SILENT_SECONDS:
        name = "running"
    else:
        name = "interrupted" if metrics or last else "not trained"
    return RunState(name, iteration, max_iter)


def estimate_seconds_left(metrics, state):
    """Return the seconds to the end of the training at the pace of the last lines; None if unknown."""
    _, times = metrics.get("time", ((), ()))
    times = [t for t in times[-20:] if math.isfinite(t)]
    if not times or state.max_iter <= 0:
        return None
    return statistics.median(times) * max(0, state.max_iter - state.iteration - 1)


def _log_files(folder):
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if _LOG_FILE.fullmatch(name)]


def read_warnings(folder):
    """Return what was logged as WARNING or worse, by first appearance; those that differ in numbers are one.

    Returns:
        list of dicts: `level`, `text` (of the first), `count` (over all ranks), `first` and `last` (times
        as in the log), `files`.
    """
    warnings = {}
    for path in _log_files(folder):
        for when, level, text, *_ in _LOG_RECORD.findall("".join(_read_lines(path))):
            if level in ("INFO", "DEBUG"):
                continue
            text = text[:_LONGEST].rstrip()
            key = level, re.sub(r"\d+(\.\d+)?", "#", text)
            new = {"level": level, "text": text, "count": 0, "first": when, "files": []}
            entry = warnings.setdefault(key, new)
            entry["count"] += 1
            entry["last"] = when
            if os.path.basename(path) not in entry["files"]:
                entry["files"].append(os.path.basename(path))
    return list(warnings.values())
