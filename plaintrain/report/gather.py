"""What a report is made of: the facts of each run, and what there is to know about its detections."""

import logging
from dataclasses import dataclass, field

from plaintrain.analysis import run_folder, run_log
from plaintrain.analysis.analyze import analyze
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation.predictions import read_detections
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.logger import silenced

logger = logging.getLogger(__name__)


@dataclass
class RunFacts:
    """One run.

    Attributes:
        name, folder: what to call it, and where it is.
        color: its number in every picture.
        metrics, state, config, starts, warnings, results: what `run_folder` and `run_log` read.
        test_sets: names.
        unreadable: {dataset: why its declaration cannot be used here}.
        problems: {test set: why there is no analysis of it}.
        analyses: {test set: what `analysis.analyze.analyze` gives}, of those that could be analysed.
        detections: {test set: the `Detections` of its predictions}, of the same.
    """

    name: str
    folder: str
    color: int
    metrics: dict
    state: run_folder.RunState
    config: dict
    starts: list
    warnings: list
    results: dict
    test_sets: list
    unreadable: dict = field(default_factory=dict)
    problems: dict = field(default_factory=dict)
    analyses: dict = field(default_factory=dict)
    detections: dict = field(default_factory=dict)

    @property
    def train_sets(self):
        """Names of the datasets it is trained on."""
        return list(self.config.get("DATASETS", {}).get("TRAIN") or ())


def gather(folder, name, color=0):
    """The `RunFacts` of a folder.

    Raises:
        UserError: it is no run's folder.
    """
    run_folder.check_run(folder)
    metrics = run_folder.read_metrics(folder)
    run = RunFacts(
        name=name,
        folder=folder,
        color=color,
        metrics=metrics,
        state=run_folder.run_state(folder, metrics),
        config=run_folder.read_config_tree(folder),
        starts=run_folder.read_starts(folder),
        warnings=run_log.read_warnings(folder),
        results=run_folder.read_results(folder, metrics),
        test_sets=run_folder.test_sets(folder),
    )
    _declare(run)
    for dataset in run.test_sets:
        if dataset not in run.problems:
            _analyze(run, dataset)
    return run


def _declare(run):
    """Make the run's datasets known; one that means something else here already has no analysis."""
    declared = run.config.get("DATASETS", {}).get("DECLARE") or {}
    for name in dict.fromkeys([*run.test_sets, *run.train_sets]):
        if name in declared:
            try:
                declare_dataset(name, declared[name])
            except UserError as e:
                run.unreadable[name] = run.problems[name] = str(e)


def _analyze(run, dataset):
    """Analyse a test set's predictions, or note why that cannot be done."""
    path = run_folder.predictions_path(run.folder, dataset)
    if path is None:
        run.problems[dataset] = (
            f"{run.folder} holds no predictions for {dataset}; the next evaluation writes them, also that of "
            f"scripts/test_net.py --config-file {run.folder}/config.yaml --resume"
        )
        return
    sigmas = run.config.get("TEST", {}).get("KEYPOINT_OKS_SIGMAS") or ()
    try:
        # Scoring says what it scores with, which nobody has asked for here.
        with silenced(logging.INFO):
            found = read_detections(path, dataset)
            run.analyses[dataset] = analyze(dataset, path, kpt_oks_sigmas=sigmas, detections=found)
            run.detections[dataset] = found
    except UserError as e:
        run.problems[dataset] = str(e)
    except Exception as e:
        logger.warning(f"the predictions of {run.folder} for {dataset} could not be analysed", exc_info=True)
        run.problems[dataset] = f"its predictions could not be analysed: {type(e).__name__}: {first_line(e)}"
