"""Early stopping and the best value of a metric."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from plaintrain.utils.errors import UserError, suggest_similar

logger = logging.getLogger(__name__)


class EarlyStopping:
    """The best `value` of a metric, its `iteration`, and the `num_waited` evaluations since then."""

    def __init__(self, metric: str = "", patience: int = 0):
        """
        Args:
            metric: name of the metric or its end, such as "bbox/AP"; "" for none, "auto" for the first
                metric of an evaluation. Lower is better for losses, higher for other metrics.
            patience: consecutive evaluations without improvement that trigger early stopping; 0 disables it.
        """
        self._metric = metric
        self._patience = patience
        self.value: float | None = None
        self.iteration: int | None = None
        self.num_waited = 0
        # Iteration of the last evaluation; -1 is an evaluation before training.
        self._last_iter = -2

    def _find_name(self, results: Mapping[str, float]) -> str | None:
        """Return the full name of the metric; None if the results contain no metric of its type."""
        if not self._metric:
            return None
        names = [name for name in results if name.startswith("val/") == self._metric.startswith("val/")]
        if self._metric == "auto" or not names:
            return names[0] if names else None
        for name in names:
            if f"/{name}".endswith(f"/{self._metric}"):
                return name
        near = suggest_similar(self._metric, names, num=3)
        raise UserError(
            f"TEST.BEST_METRIC must be a metric of the evaluation, got {self._metric!r}; did you mean {near}?"
        )

    def update(self, iteration: int, results: Mapping[str, float]) -> bool:
        """Record the results of an evaluation; return whether they are strictly better than all before.

        NaN is never the best. Results of another type (validation losses `val/...`, or evaluation metrics)
        are ignored, and so are evaluations that a resumed run repeats.

        `results` must be the same on all ranks. `iteration` is -1 before the first one.
        """
        name = self._find_name(results)
        if name is None or iteration <= self._last_iter:
            return False
        self._last_iter = iteration
        value = float(results[name])
        # Names of datasets and classes may contain "loss" too: lossless/bbox/AP-floss.
        sign = -1 if "loss" in name.rpartition("/")[2].partition("-")[0] else 1
        best = -math.inf if self.value is None else sign * self.value
        if sign * value > best:
            self.value = value
            self.iteration = iteration
            self.num_waited = 0
            logger.info(f"{name} is {value:.4g}, the best so far")
            return True
        self.num_waited += 1
        logger.info(f"{name} is {value:.4g}; the best is {self.value}, of iteration {self.iteration}")
        if self.triggered:
            logger.warning(f"early stopping: {name} has not improved for {self._patience} evaluations")
        return False

    @property
    def triggered(self) -> bool:
        """Return whether the metric has not improved for `patience` evaluations."""
        return 0 < self._patience <= self.num_waited

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._metric,
            "value": self.value,
            "iteration": self.iteration,
            "num_waited": self.num_waited,
            "seen": self._last_iter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; ignore the state of another metric with a warning."""
        if state_dict["metric"] != self._metric:
            if state_dict["metric"]:
                old = state_dict["metric"]
                logger.warning(f"TEST.BEST_METRIC was {old!r} and is {self._metric!r}; reset the best value")
            return
        self.value = state_dict["value"]
        self.iteration = state_dict["iteration"]
        self.num_waited = state_dict["num_waited"]
        self._last_iter = state_dict["seen"]
        if self.triggered:
            logger.warning(
                f"early stopping: {self._metric} had not improved for {self._patience} evaluations; a larger "
                "SOLVER.PATIENCE continues the run"
            )
