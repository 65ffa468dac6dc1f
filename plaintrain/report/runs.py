"""Load runs, and build the sections on config, curves, AP, datasets, time, memory and warnings."""

import logging
import math
import statistics
from typing import Any

import numpy as np

from plaintrain.analysis import run_folder
from plaintrain.analysis.analyze import analyze
from plaintrain.analysis.dataset import compute_dataset_statistics
from plaintrain.analysis.run_folder import estimate_seconds_left
from plaintrain.config.yaml import flatten
from plaintrain.data.catalog import DatasetCatalog, load_class_names
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation.detections import Detections
from plaintrain.evaluation.predictions import read_detections
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import read_starts
from plaintrain.utils.logger import silenced
from plaintrain.utils.text import truncate_text
from plaintrain.visualization.curves import group_panels
from plaintrain.visualization.plots import draw_bars, draw_curves

logger = logging.getLogger(__name__)

_SMOOTHING = 0.6
_MAX_WARNINGS = 100
# (statistic, title, what the bars count, remark).
_HISTOGRAMS = (
    ("objects_per_image", "Objects per image", "images", ""),
    ("box_size", "Size", "objects", "square root of the box area, pixels"),
    ("aspect", "Aspect ratio", "objects", "width / height"),
)


class Run:
    """Files of a run's folder, and the analyses of its predictions.

    Attributes:
        color: index into the palette.
        problems: {dataset: why it has no analysis}.
        analyses: {test set: result of `analyze`}.
    """

    def __init__(self, folder: str, name: str, color: int = 0):
        run_folder.check_run(folder)
        self.folder = folder
        self.name = name
        self.color = color
        self.metrics = run_folder.read_metrics(folder)
        self.state = run_folder.get_run_state(folder, self.metrics)
        self.config = run_folder.read_config_tree(folder)
        self.starts = read_starts(folder)
        self.warnings = run_folder.read_warnings(folder)
        self.results = run_folder.read_run_results(folder)
        self.test_sets = run_folder.list_test_sets(folder)
        self.train_sets = list(self.config.get("DATASETS", {}).get("TRAIN") or ())
        self.problems: dict[str, str] = {}
        self.analyses: dict[str, dict[str, Any]] = {}
        self.detections: dict[str, Detections] = {}
        declared = self.config.get("DATASETS", {}).get("DECLARE") or {}
        for dataset in [name for name in (*self.test_sets, *self.train_sets) if name in declared]:
            # The name may already be declared differently in this process.
            try:
                declare_dataset(dataset, declared[dataset])
            except UserError as e:
                self.problems[dataset] = str(e)
        for dataset in self.test_sets:
            if dataset not in self.problems:
                self._analyze(dataset)

    def _analyze(self, dataset):
        """Analyze the predictions on a test set, or record the problem."""
        sigmas = self.config.get("TEST", {}).get("KEYPOINT_OKS_SIGMAS") or ()
        try:
            path = run_folder.find_predictions(self.folder, dataset)
            # Silence the log line on the COCO backend.
            with silenced(logging.INFO):
                self.detections[dataset] = read_detections(path, dataset)
                options = {"kpt_oks_sigmas": sigmas, "detections": self.detections[dataset]}
                self.analyses[dataset] = analyze(dataset, path, **options)
        except UserError as e:
            self.problems[dataset] = str(e)
        except Exception as e:
            logger.warning(
                f"the analysis of the predictions of {self.folder} on {dataset} failed", exc_info=True
            )
            self.problems[dataset] = f"the analysis failed: {type(e).__name__}: {get_first_line(e)}"

    @property
    def training_seconds(self) -> float | None:
        """Return the sum of all iteration times; each line of metrics.json has the mean since the last."""
        iterations, times = self.metrics.get("time", ((), ()))
        return np.nansum(np.diff(iterations, prepend=-1) * times).item() if iterations else None

    @property
    def scored_tasks(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return (dataset, task, {metric: score}) of the last evaluation."""
        return [(d, task, scores) for d, tasks in self.results.items() for task, scores in tasks.items()]


class Best(float):
    """Highest of several scores."""


def mark_best(values: list[float | None]) -> list[float | None]:
    """Return the scores, with the highest as `Best` if at least two are finite."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return [Best(v) if len(known) > 1 and v == max(known) else v for v in values]


def build_summary(runs: list[Run]) -> dict[str, Any]:
    """Return the state and the main scores of each run."""
    if len(runs) > 1:
        tasks = dict.fromkeys((dataset, task) for run in runs for dataset, task, _ in run.scored_tasks)
        metrics = [(name, task, dataset) for dataset, task in tasks for name in ("AP", "AP50")]
        scores = [mark_best([r.results.get(d, {}).get(t, {}).get(n) for r in runs]) for n, t, d in metrics]
        table = [
            [run, run.state.name, run.state.iteration + 1, run.training_seconds, *run_scores]
            for run, *run_scores in zip(runs, *scores, strict=True)
        ]
        return {"columns": [f"{name} ({task}, {dataset})" for name, task, dataset in metrics], "rows": table}
    (run,) = runs
    model = run.config.get("MODEL", {})
    names = [model.get("META_ARCHITECTURE"), model.get("BACKBONE", {}).get("NAME"), model.get("WEIGHTS")]
    seconds_left = estimate_seconds_left(run.metrics, run.state) if run.state.name == "running" else None
    return {"run": run, "model": ", ".join(filter(None, names)), "seconds_left": seconds_left}


def build_run_table(runs: list[Run]) -> dict[str, Any]:
    """Return the config of one run, or the differences between the configs of several."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted(set().union(*configs))
    if len(runs) == 1:
        changes = runs[0].starts[-1].get("changes", ()) if runs[0].starts else ()
        changes = [row for row in changes if len(row) == 3]
        return {"runs": runs, "changes": changes, "config": [[key, configs[0][key]] for key in keys]}
    table = [[key, *(config.get(key, "–") for config in configs)] for key in keys if key != "OUTPUT_DIR"]
    return {"runs": runs, "differences": [row for row in table if any(v != row[1] for v in row[2:])]}


def build_curves(runs: list[Run]) -> list[tuple]:
    """Draw the training curves."""
    panels = group_panels({run.name: run.metrics for run in runs})
    return [
        (draw_curves([p], _SMOOTHING, titles=False), p["title"], "logarithmic" if p["log"] else "")
        for p in panels
    ]


def build_scores(runs: list[Run]) -> dict[str, list]:
    """Return tables of the metrics of the last evaluation, and of the AP per class."""
    tables = []
    for dataset, task in dict.fromkeys((d, task) for run in runs for d, task, _ in run.scored_tasks):
        known = [run.results.get(dataset, {}).get(task, {}) for run in runs]
        names = dict.fromkeys(name for metrics in known for name in metrics)
        scores = {name: mark_best([metrics.get(name) for metrics in known]) for name in names}
        main = [[name, *values, name] for name, values in scores.items() if "-" not in name]
        classes = [[n.removeprefix("AP-"), *values] for n, values in scores.items() if n.startswith("AP-")]
        columns = [run.name for run in runs] if len(runs) > 1 else ["AP"]
        num_empty = 0
        if classes and len(runs) == 1 and dataset in runs[0].analyses:
            per_class = runs[0].analyses[dataset]["per_class"].get(task, [])
            columns = ["objects", "AP", "AP50", "AP75", "APs", "APm", "APl"]
            classes = [[c["name"], *(c[key] for key in columns)] for c in per_class if c["objects"]]
            num_empty = len(per_class) - len(classes)
        table = {"dataset": dataset, "task": task, "main": main}
        tables.append({**table, "columns": columns, "classes": classes, "skipped": num_empty})
    return {"columns": [run.name for run in runs] if len(runs) > 1 else ["score"], "tables": tables}


def build_timing(runs: list[Run]) -> list[list]:
    """Return a row per run: iteration times, training time and peak memory."""
    table = []
    for run in runs:
        seconds, data = (_median(run.metrics.get(name, ((), ()))[1]) for name in ("time", "data_time"))
        images = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        waiting = round(100 * data / seconds, 2) if seconds and data is not None else None
        speed = images / seconds if seconds and images else None
        memory = max(run.metrics.get("max_mem", ((), ()))[1], default=None)
        table.append([run, seconds, data, waiting, speed, run.training_seconds, memory])
    return table if any(run.metrics.get("time") for run in runs) else []


def _median(values):
    finite = [v for v in values if math.isfinite(v)]
    return statistics.median(finite) if finite else None


def build_datasets(runs: list[Run]) -> dict[str, Any]:
    """Return statistics of the training and test sets."""
    roles: dict[str, dict[str, None]] = {}
    for run in runs:
        for role, names in (("train", run.train_sets), ("test", run.test_sets)):
            for name in names:
                roles.setdefault(name, {})[role] = None
    statistics_of = {}
    unreadable = {}
    for name in roles:
        try:
            statistics_of[name] = compute_dataset_statistics(DatasetCatalog.get(name), load_class_names(name))
        except UserError as e:
            unreadable[name] = next((run.problems[name] for run in runs if name in run.problems), str(e))
    classes = dict.fromkeys(c for s in statistics_of.values() for c in s["classes"])
    counts = ("objects", "images")
    return {
        "datasets": [[n, " and ".join(roles[n]), *_format_counts(s)] for n, s in statistics_of.items()],
        "unreadable": unreadable,
        "columns": [f"{key}, {name}" for name in statistics_of for key in counts],
        "classes": [
            [c, *(s["classes"].get(c, {}).get(key) for s in statistics_of.values() for key in counts)]
            for c in classes
        ],
        "figures": list(_draw_histograms(statistics_of)),
    }


def _format_counts(s):
    """Return the counts of a dataset, the percentages of small, medium and large objects, and image sizes."""
    percentages = [round(100 * area, 1) for area in s["areas"]]
    ranges = [f"{a}" if a == b else f"{a} to {b}" for a, b in s["ranges"].values()]
    counts = [s[key] for key in ("images", "empty_images", "objects", "crowds", "mean_objects")]
    return [*counts, *percentages, " x ".join(ranges)]


def build_warnings(runs: list[Run]) -> list[tuple[Run, list]]:
    """Return a table of the logged warnings and errors per run."""
    return [(run, [_format_warning(w) for w in run.warnings[:_MAX_WARNINGS]]) for run in runs]


def _format_warning(w):
    text = truncate_text(w["text"], 500)
    return [w["level"], text, w["count"], w["first"], w["last"], ", ".join(w["files"])]


def _draw_histograms(statistics_of):
    if not statistics_of:
        return
    for key, title, counted, remark in _HISTOGRAMS:
        counts = {name: s[key]["counts"] for name, s in statistics_of.items()}
        names = next(iter(statistics_of.values()))[key]["names"]
        used = [i for i, bin_counts in enumerate(zip(*counts.values(), strict=True)) if any(bin_counts)]
        series = {n: [100 * c[i] / max(1, sum(c)) for i in used] for n, c in counts.items()}
        if used:
            yield draw_bars([names[i] for i in used], series, f"% of the {counted}"), title, remark
