"""Early stopping, and the best value of a metric so far."""

import logging
import math

from plaintrain.utils.errors import UserError, suggest_similar

logger = logging.getLogger(__name__)

_VAL = "val/"


class EarlyStopping:
    """Keeps the best value of one metric, and ends a run that has not improved it for a while.

    Attributes:
        value, iteration: the best value so far and the iteration it was measured after; None before.
        num_waited: evaluations since then.
    """

    def __init__(self, metric="", patience=0):
        """
        Args:
            metric: "" for none, "auto" for the first of an evaluation, or its name or the end of it, such
                as "bbox/AP". The lowest "loss" is the best, the highest of anything else.
            patience: evaluations in a row without a new best that trigger the end; 0 for never.
        """
        self._metric = metric
        self._patience = patience
        self.value = None
        self.iteration = None
        self.num_waited = 0
        # The iteration of the last evaluation; -1 is one before the first iteration.
        self._seen = -2

    def _find_name(self, results):
        """Return the name of the metric among results, or None if none of its type is there."""
        if not self._metric:
            return None
        names = [name for name in results if name.startswith(_VAL) == self._metric.startswith(_VAL)]
        if self._metric == "auto" or not names:
            return names[0] if names else None
        for name in names:
            if f"/{name}".endswith(f"/{self._metric}"):
                return name
        near = suggest_similar(self._metric, names, num=3)
        raise UserError(
            f"TEST.BEST_METRIC is {self._metric!r}, which the evaluation does not give; did you mean {near}?"
        )

    def update(self, iteration, results):
        """Take in the results of an evaluation; returns whether they are strictly the best so far.

        NaN is never the best. Results without any of the metric's type (validation losses `val/...`, or
        an evaluation) are ignored, and so is an evaluation that a resumed run repeats.

        Args:
            iteration: the iteration that was finished, counted from 0; -1 before the first.
            results: {name: number}, the same on every rank.
        """
        name = self._find_name(results)
        if name is None or iteration <= self._seen:
            return False
        self._seen = iteration
        value = float(results[name])
        # The name may begin with a dataset's and end with a class's, as in lossless/bbox/AP-floss.
        sign = -1 if "loss" in name.rpartition("/")[2].partition("-")[0] else 1
        best = -math.inf if self.value is None else sign * self.value
        if sign * value > best:
            self.value = value
            self.iteration = iteration
            self.num_waited = 0
            logger.info(f"{name} is {value:.4g}, the best so far")
            return True
        self.num_waited += 1
        logger.info(f"{name} is {value:.4g}; best: {self.value} after iteration {self.iteration}")
        if self.triggered:
            logger.warning(f"early stopping: {name} has not improved for {self._patience} evaluations")
        return False

    @property
    def triggered(self):
        """Return whether the metric has not improved for `patience` evaluations."""
        return 0 < self._patience <= self.num_waited

    def state_dict(self):
        return {
            "metric": self._metric,
            "value": self.value,
            "iteration": self.iteration,
            "num_waited": self.num_waited,
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict):
        """Restore a saved state; that of another metric is dropped with a warning."""
        if state_dict["metric"] != self._metric:
            if state_dict["metric"]:
                logger.warning(
                    f"TEST.BEST_METRIC was {state_dict['metric']!r} and is {self._metric!r}: the best value "
                    "so far is dropped"
                )
            return
        self.value = state_dict["value"]
        self.iteration = state_dict["iteration"]
        self.num_waited = state_dict["num_waited"]
        self._seen = state_dict["seen"]
        if self.triggered:
            logger.warning(
                f"early stopping: {self._metric} had not improved for {self._patience} evaluations; a larger "
                "SOLVER.PATIENCE continues the run"
            )
