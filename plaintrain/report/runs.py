"""What a report knows about its runs, and the sections on them: config, curves, AP, data, time and memory."""

import logging
import math
import statistics

import numpy as np

from plaintrain.analysis import run_folder
from plaintrain.analysis.analyze import analyze
from plaintrain.analysis.dataset import compute_dataset_statistics
from plaintrain.analysis.run_folder import estimate_seconds_left
from plaintrain.config.yaml import flatten
from plaintrain.data.catalog import DatasetCatalog, load_class_names
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation.predictions import read_detections
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import read_starts
from plaintrain.utils.logger import silenced
from plaintrain.visualization.curves import group_panels
from plaintrain.visualization.plots import draw_bars, draw_curves, truncate_text

logger = logging.getLogger(__name__)

# Weight of the smoothed line of a curve.
_SMOOTHING = 0.6
_MOST_WARNINGS = 100
# (statistic, title, of what its bars are percentages, remark).
_HISTOGRAMS = (
    ("objects_per_image", "Objects in an image", "images", ""),
    ("box_size", "Size", "objects", "root of the box' area, pixels"),
    ("aspect", "Shape", "objects", "width by height"),
)


class Run:
    """A run's folder, as `run_folder` reads it, and the analysis of its predictions.

    Attributes:
        name, color: what to call it, and its index in every plot.
        problems: {dataset: why its declaration cannot be used here, or why there is no analysis of it}.
        analyses, detections: {test set: what `analyze` returns}, and of the same their `Detections`.
    """

    def __init__(self, folder, name, color=0):
        run_folder.check_run(folder)
        self.folder, self.name, self.color = folder, name, color
        self.metrics = run_folder.read_metrics(folder)
        self.state = run_folder.get_run_state(folder, self.metrics)
        self.config = run_folder.read_config_tree(folder)
        self.starts = read_starts(folder)
        self.warnings = run_folder.read_warnings(folder)
        self.results = run_folder.read_run_results(folder)
        self.test_sets = run_folder.list_test_sets(folder)
        self.train_sets = list(self.config.get("DATASETS", {}).get("TRAIN") or ())
        self.problems, self.analyses, self.detections = {}, {}, {}
        declared = self.config.get("DATASETS", {}).get("DECLARE") or {}
        for dataset in [name for name in (*self.test_sets, *self.train_sets) if name in declared]:
            # A name that means something else here already has no analysis.
            try:
                declare_dataset(dataset, declared[dataset])
            except UserError as e:
                self.problems[dataset] = str(e)
        for dataset in self.test_sets:
            if dataset not in self.problems:
                self._analyze(dataset)

    def _analyze(self, dataset):
        """Analyse a test set's predictions, or note why that cannot be done."""
        sigmas = self.config.get("TEST", {}).get("KEYPOINT_OKS_SIGMAS") or ()
        try:
            path = run_folder.find_predictions(self.folder, dataset)
            # Scoring says what it scores with, which nobody has asked for here.
            with silenced(logging.INFO):
                self.detections[dataset] = read_detections(path, dataset)
                options = {"kpt_oks_sigmas": sigmas, "detections": self.detections[dataset]}
                self.analyses[dataset] = analyze(dataset, path, **options)
        except UserError as e:
            self.problems[dataset] = str(e)
        except Exception as e:
            logger.warning(
                f"the predictions of {self.folder} for {dataset} could not be analysed", exc_info=True
            )
            self.problems[dataset] = (
                f"its predictions could not be analysed: {type(e).__name__}: {get_first_line(e)}"
            )

    @property
    def training_seconds(self):
        """Seconds of all iterations, of the mean time in each line of metrics.json; None without."""
        iterations, times = self.metrics.get("time", ((), ()))
        return np.nansum(np.diff(iterations, prepend=-1) * times).item() if iterations else None

    @property
    def scored_tasks(self):
        """List of (dataset, task, {metric: score}) of the last evaluation."""
        return [(d, task, scores) for d, tasks in self.results.items() for task, scores in tasks.items()]


class Best(float):
    """The highest of several scores."""


def mark_best(values):
    """Return scores, of which the highest is a `Best` if at least two are known."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return [Best(v) if len(known) > 1 and v == max(known) else v for v in values]


def build_summary(runs):
    """Return the few numbers that matter most and the state of each run."""
    if len(runs) > 1:
        tasks = dict.fromkeys((dataset, task) for run in runs for dataset, task, _ in run.scored_tasks)
        metrics = [(name, task, dataset) for dataset, task in tasks for name in ("AP", "AP50")]
        scores = [mark_best([r.results.get(d, {}).get(t, {}).get(n) for r in runs]) for n, t, d in metrics]
        rows = [
            [run, run.state.name, run.state.iteration + 1, run.training_seconds, *of_run]
            for run, *of_run in zip(runs, *scores, strict=True)
        ]
        return {"columns": [f"{name} ({task}, {dataset})" for name, task, dataset in metrics], "rows": rows}
    (run,) = runs
    model = run.config.get("MODEL", {})
    words = [model.get("META_ARCHITECTURE"), model.get("BACKBONE", {}).get("NAME"), model.get("WEIGHTS")]
    return {
        "run": run,
        "model": ", ".join(filter(None, words)),
        "seconds_left": estimate_seconds_left(run.metrics, run.state)
        if run.state.name == "running"
        else None,
    }


def build_run_table(runs):
    """Return the runs, and the config of one or the differences between those of several."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted(set().union(*configs))
    if len(runs) == 1:
        changes = runs[0].starts[-1].get("changes") if runs[0].starts else []
        return {"runs": runs, "changes": changes, "config": [[key, configs[0][key]] for key in keys]}
    rows = [[key, *(config.get(key, "–") for config in configs)] for key in keys if key != "OUTPUT_DIR"]
    return {"runs": runs, "differences": [row for row in rows if any(v != row[1] for v in row[2:])]}


def build_curves(runs):
    """Draw the metrics over the iterations."""
    panels = group_panels({run.name: run.metrics for run in runs})
    return [
        (draw_curves([p], _SMOOTHING, titles=False), p["title"], "logarithmic" if p["log"] else "")
        for p in panels
    ]


def build_scores(runs):
    """Return tables of the scores of the last evaluation, and those by class."""
    tables = []
    for dataset, task in dict.fromkeys((d, task) for run in runs for d, task, _ in run.scored_tasks):
        known = [run.results.get(dataset, {}).get(task, {}) for run in runs]
        names = list(dict.fromkeys(name for of_run in known for name in of_run))
        rows = {name: mark_best([of_run.get(name) for of_run in known]) for name in names}
        main = [[name, *values, name] for name, values in rows.items() if "-" not in name]
        classes = [[n.removeprefix("AP-"), *values] for n, values in rows.items() if n.startswith("AP-")]
        columns, num_empty = [run.name for run in runs] if len(runs) > 1 else ["AP"], 0
        if classes and len(runs) == 1 and dataset in runs[0].analyses:
            per_class = runs[0].analyses[dataset]["per_class"].get(task, [])
            columns = ["objects", "AP", "AP50", "AP75", "APs", "APm", "APl"]
            classes = [[c["name"], *(c[key] for key in columns)] for c in per_class if c["objects"]]
            num_empty = len(per_class) - len(classes)
        table = {"dataset": dataset, "task": task, "main": main}
        tables.append({**table, "columns": columns, "classes": classes, "skipped": num_empty})
    return {"columns": [run.name for run in runs] if len(runs) > 1 else ["score"], "tables": tables}


def build_timing(runs):
    """Return times of an iteration, of the training, and the memory: a row for each run."""
    rows = []
    for run in runs:
        seconds, data = (_median(run.metrics.get(name, ((), ()))[1]) for name in ("time", "data_time"))
        images = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        waiting = round(100 * data / seconds, 2) if seconds and data is not None else None
        speed = images / seconds if seconds and images else None
        memory = max(run.metrics.get("max_mem", ((), ()))[1], default=None)
        rows.append([run, seconds, data, waiting, speed, run.training_seconds, memory])
    return rows if any(run.metrics.get("time") for run in runs) else []


def _median(values):
    finite = [v for v in values if math.isfinite(v)]
    return statistics.median(finite) if finite else None


def build_datasets(runs):
    """Return statistics of the datasets that the runs are trained and tested on."""
    roles, statistics_of, unreadable = {}, {}, {}
    for run in runs:
        for role, names in (("train", run.train_sets), ("test", run.test_sets)):
            for name in names:
                roles.setdefault(name, {})[role] = None
    for name in roles:
        try:
            statistics_of[name] = compute_dataset_statistics(DatasetCatalog.get(name), load_class_names(name))
        except UserError as e:
            unreadable[name] = next((run.problems[name] for run in runs if name in run.problems), e)
    classes = dict.fromkeys(c for s in statistics_of.values() for c in s["classes"])
    counts = ("objects", "images")
    return {
        "datasets": [[name, " and ".join(roles[name]), *_counts(s)] for name, s in statistics_of.items()],
        "unreadable": unreadable,
        "columns": [
            f"{counted}, {name}" for name in statistics_of for counted in ("objects", "images with it")
        ],
        "classes": [
            [c, *(s["classes"].get(c, {}).get(key) for s in statistics_of.values() for key in counts)]
            for c in classes
        ],
        "figures": list(_draw_histograms(statistics_of)),
    }


def _counts(s):
    """Return the counts of a dataset, percentages of its objects by size, and the image sizes."""
    percentages = [round(100 * area, 1) for area in s["areas"]]
    ranges = [f"{a}" if a == b else f"{a} to {b}" for a, b in s["ranges"].values()]
    counts = [s[key] for key in ("images", "empty_images", "objects", "crowds", "mean_objects")]
    return [*counts, *percentages, " x ".join(ranges)]


def build_warnings(runs):
    """Return, for each run, the rows of what was logged as a warning or worse."""
    logged = []
    for run in runs:
        shown = run.warnings[:_MOST_WARNINGS]
        keys = ("count", "first", "last")
        rows = [
            [w["level"], truncate_text(w["text"], 500), *(w[k] for k in keys), ", ".join(w["files"])]
            for w in shown
        ]
        logged.append((run, rows))
    return logged


def _draw_histograms(statistics_of):
    if not statistics_of:
        return
    for key, title, counted, remark in _HISTOGRAMS:
        counts = {name: s[key]["counts"] for name, s in statistics_of.items()}
        names = next(iter(statistics_of.values()))[key]["names"]
        used = [i for i, of_bin in enumerate(zip(*counts.values(), strict=True)) if any(of_bin)]
        series = {n: [100 * c[i] / max(1, sum(c)) for i in used] for n, c in counts.items()}
        if used:
            yield draw_bars([names[i] for i in used], series, f"% of the {counted}"), title, remark
