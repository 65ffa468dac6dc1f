"""Read the files of a run folder (OUTPUT_DIR), also of a running training; does not import torch.

Missing files give empty results and truncated lines are skipped.
"""

import contextlib
import datetime
import glob
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from plaintrain.config import CfgNode, get_cfg
from plaintrain.config.yaml import parse_yaml
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import (
    is_number,
    keep_valid,
    parse_csv_rows,
    parse_json_rows,
    read_results_file,
    read_text,
)
from plaintrain.utils.lock import is_in_use
from plaintrain.utils.text import is_file_name
from plaintrain.utils.user_code import note_imports

# [DATASET/]TASK/METRIC
_RESULT = re.compile(r"(?:(?P<dataset>.+?)/)?(?P<task>bbox|segm|keypoints|box_proposals)/(?P<metric>.+)")
_LOG_HEAD = r"\[(\d\d/\d\d \d\d:\d\d:\d\d) [\w.]+\] ([A-Z]+): "
# The time, level and text of a record; the text may have several lines.
_LOG_RECORD = re.compile(rf"^{_LOG_HEAD}(.*(?:\n(?!{_LOG_HEAD}).*)*)", re.MULTILINE)
_LOG_FILE = re.compile(r"log\.txt(\.rank\d+)?")
_MAX_LOG_LENGTH = 4000
# Locks may be invisible from other machines; a run with a more recent log line counts as running.
_SILENT_SECONDS = 600
# Example of the values in config.yaml that are used here and in the report, for `keep_valid`.
_CONFIG = {
    "DATASETS": {"DECLARE": {}, "TEST": [""], "TRAIN": [""]},
    "INPUT": {"PIXEL_RANGE": [0.0]},
    "MODEL": {"META_ARCHITECTURE": "", "BACKBONE": {"NAME": ""}, "WEIGHTS": ""},
    "SOLVER": {"IMS_PER_BATCH": 0, "MAX_ITER": 0},
    "TEST": {"KEYPOINT_OKS_SIGMAS": [0.0]},
}
_RUN_FILES = ("config.yaml", "metrics.json", "metrics.csv", "log.txt", "inference")

# {name: (iterations, values)}
Metrics = dict[str, tuple[list[int], list[float]]]


class RunState(NamedTuple):
    """State of a run: "running", "finished", "interrupted" or "not trained".

    `iteration` is that of the last line of metrics.json, or -1; `max_iter` is 0 if it is unknown.
    """

    name: str
    iteration: int
    max_iter: int


def check_run(folder: str) -> None:
    """Raise a `UserError` if `folder` is not a run folder."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; expected a run folder (OUTPUT_DIR)")
    if not any(os.path.exists(os.path.join(folder, name)) for name in _RUN_FILES):
        raise UserError(f"{folder} is not a run folder: it has none of {', '.join(_RUN_FILES)}")


def get_run_names(folders: Sequence[str]) -> list[str]:
    """Return the base names of run folders, or their paths if the base names are not unique."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _read_lines(path):
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            yield from f
    except OSError as e:
        raise UserError(f"cannot read {path}: {get_first_line(e)}") from e


def read_metrics(folder: str) -> Metrics:
    """Read metrics.json or metrics.csv; non-finite values are NaN, the last line of an iteration counts."""
    path = os.path.join(folder, "metrics.json")
    is_json = os.path.isfile(path)
    lines = _read_lines(path if is_json else os.path.join(folder, "metrics.csv"))
    by_iteration = {row["iteration"]: row for row in (parse_json_rows if is_json else parse_csv_rows)(lines)}
    series: Metrics = {}
    for iteration in sorted(i for i in by_iteration if abs(i) < 2**53):
        for name, value in by_iteration[iteration].items():
            if name != "iteration" and (value is None or isinstance(value, int | float)):
                iterations, values = series.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(float(value) if value is not None and is_number(value) else math.nan)
    return series


def read_config(folder: str) -> CfgNode:
    """Read the config.yaml of a run."""
    path = os.path.join(folder, "config.yaml")
    if not os.path.isfile(path):
        problem = "has no config.yaml" if os.path.isdir(folder) else "does not exist"
        raise UserError(f"{folder!r} {problem}; expected a run folder (OUTPUT_DIR)")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    note_imports(folder)
    return cfg


def read_config_tree(folder: str) -> dict[str, Any]:
    """Read the config.yaml of a run, without values of a wrong type; an unreadable file is empty."""
    path = os.path.join(folder, "config.yaml")
    with contextlib.suppress(UserError):
        return keep_valid(parse_yaml(read_text(path), path), _CONFIG)
    return {}


def split_result(name: str) -> tuple[str, str, str] | None:
    """Split a name [DATASET/]TASK/METRIC in metrics.json; return None for other names."""
    match = _RESULT.fullmatch(name)
    return (match["dataset"] or "", match["task"], match["metric"]) if match else None


def list_test_sets(folder: str) -> list[str]:
    """List DATASETS.TEST of a run and further datasets with predictions or results."""
    names = [n for n in read_config_tree(folder).get("DATASETS", {}).get("TEST", ()) if is_file_name(n)]
    evaluated = sorted(glob.glob(os.path.join(glob.escape(folder), "inference", "*", "")))
    return list(dict.fromkeys([*names, *(os.path.basename(os.path.dirname(path)) for path in evaluated)]))


def find_predictions(folder: str, dataset_name: str) -> str:
    """Return the file with the predictions of the last evaluation on a dataset."""
    path = os.path.join(folder, "inference", dataset_name, "coco_instances_results.json")
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} holds no predictions for {dataset_name}; the next evaluation writes them, also that "
            f"of scripts/test_net.py --config-file {os.path.join(folder, 'config.yaml')} --resume"
        )
    return path


def read_run_results(folder: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return {dataset: {task: {metric: value}}} of the last evaluations."""
    results: dict[str, dict[str, dict[str, float | None]]] = {}
    for dataset in list_test_sets(folder):
        results |= read_results_file(os.path.join(folder, "inference", dataset))
    return results


def get_run_state(folder: str, metrics: Metrics) -> RunState:
    """Return the `RunState` from the files of a run and its metrics."""
    iteration = max((iterations[-1] for iterations, _ in metrics.values()), default=-1)
    max_iter = read_config_tree(folder).get("SOLVER", {}).get("MAX_ITER", 0)
    is_alive = is_in_use(folder)
    last_checkpoint = "".join(_read_lines(os.path.join(folder, "last_checkpoint"))).strip()
    ages = [time.time() - os.path.getmtime(path) for path in _list_log_files(folder)]
    if is_alive:
        name = "running"
    elif last_checkpoint == "model_final.pth":
        # A resumed run first replaces it by its own checkpoints.
        name = "finished"
    elif is_alive is None and min(ages, default=math.inf) < _SILENT_SECONDS:
        name = "running"
    else:
        name = "interrupted" if metrics or last_checkpoint else "not trained"
    return RunState(name, iteration, max_iter)


def estimate_seconds_left(metrics: Metrics, state: RunState) -> float | None:
    """Estimate the remaining training time from the last iteration times; return None if unknown."""
    _, times = metrics.get("time", ((), ()))
    times = [t for t in times[-20:] if math.isfinite(t)]
    if not times or state.max_iter <= 0:
        return None
    return statistics.median(times) * max(0, state.max_iter - state.iteration - 1)


def format_duration(seconds: float) -> str:
    """Format seconds as H:MM:SS."""
    return str(datetime.timedelta(seconds=round(seconds))) if abs(seconds) < 1e12 else f"{seconds:.3g} s"


def _list_log_files(folder):
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "log.txt*")))
    return [path for path in paths if _LOG_FILE.fullmatch(os.path.basename(path)) and os.path.isfile(path)]


def read_warnings(folder: str) -> list[dict[str, Any]]:
    """List the log records at WARNING or above, merging those that differ only in numbers.

    They have `level`, `text` (of the first), `count` (over all ranks), `first` and `last` (times in the
    log) and `files`.
    """
    warnings: dict[tuple[str, str], dict[str, Any]] = {}
    for path in _list_log_files(folder):
        for timestamp, level, text, *_ in _LOG_RECORD.findall("".join(_read_lines(path))):
            if level in ("INFO", "DEBUG"):
                continue
            text = text[:_MAX_LOG_LENGTH].rstrip()
            key = level, re.sub(r"\d+(\.\d+)?", "#", text)
            new = {"level": level, "text": text, "count": 0, "first": timestamp, "files": []}
            entry = warnings.setdefault(key, new)
            entry["count"] += 1
            entry["last"] = timestamp
            if os.path.basename(path) not in entry["files"]:
                entry["files"].append(os.path.basename(path))
    return list(warnings.values())
