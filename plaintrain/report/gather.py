"""What a report is made of: the facts of each run, and what there is to know about its detections."""

import logging
from dataclasses import dataclass, field

from plaintrain import run_folder, run_log
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class RunFacts:
    """One run.

    Attributes:
        name, folder: what to call it, and where it is.
        color: its number in every picture.
        metrics, state, config, starts, ends, warnings, results: what `run_folder` reads.
        test_sets: names.
        problems: {dataset: why it cannot be read here}.
    """

    name: str
    folder: str
    color: int
    metrics: dict
    state: run_folder.RunState
    config: dict
    starts: list
    ends: list
    warnings: list
    results: dict
    test_sets: list
    problems: dict = field(default_factory=dict)

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
        ends=run_folder.read_ends(folder),
        warnings=run_log.read_warnings(folder),
        results=run_folder.read_results(folder, metrics),
        test_sets=run_folder.test_sets(folder),
    )
    _declare(run)
    return run


def _declare(run):
    """Make the run's datasets known; one that means something else here already has no analysis."""
    from plaintrain.data.builtin import declare_dataset

    declared = run.config.get("DATASETS", {}).get("DECLARE") or {}
    for name in dict.fromkeys([*run.test_sets, *run.train_sets]):
        if name in declared:
            try:
                declare_dataset(name, declared[name])
            except UserError as e:
                run.problems[name] = str(e)
