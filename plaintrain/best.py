"""The best model of a run, and when to give up waiting for a better one."""

import logging

from plaintrain.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)

_VAL = "val/"


class BestMetric:
    """The best value of one result so far, and how many evaluations ago it was."""

    def __init__(self, metric="", patience=0):
        """
        Args:
            metric: the result to look at: "" for none, "auto" for the first of an evaluation, or its
                name or the end of it, such as "bbox/AP". The lowest "loss" is the best, the highest of
                anything else.
            patience: evaluations in a row without a new best after which `is_stale`; 0 for never.
        """
        self._metric, self._patience = metric, patience
        self.value, self.iteration, self.num_waited, self._seen = None, None, 0, -2

    def _find(self, results):
        """The name of the metric among results, or None if none of its kind are there."""
        if not self._metric:
            return None
        names = [name for name in results if name.startswith(_VAL) == self._metric.startswith(_VAL)]
        if self._metric == "auto" or not names:
            return names[0] if names else None
        for name in names:
            if f"/{name}".endswith(f"/{self._metric}"):
                return name
        near = nearest(self._metric, names, number=3)
        raise UserError(
            f"TEST.BEST_METRIC is {self._metric!r}, which the evaluation does not give; did you mean {near}?"
        )

    def update(self, iteration, results):
        """Whether the results of an evaluation are strictly the best so far.

        NaN is never the best. Passed over is what holds no result of the metric's kind (validation
        losses `val/...`, or an evaluation), and an evaluation that a resumed run repeats.

        Args:
            iteration: the iteration that was finished, counted from 0; -1 before the first.
            results: {name: number}, the same on every rank.

        Raises:
            UserError: there are results of its kind, but none of the metric's name.
        """
        name = self._find(results)
        if name is None or iteration <= self._seen:
            return False
        self._seen, value = iteration, float(results[name])
        # The name may begin with a dataset's and end with a class's, as in lossless/bbox/AP-floss.
        first, lower = self.value is None, "loss" in name.rpartition("/")[2].partition("-")[0]
        if value == value and (first or (value < self.value if lower else value > self.value)):
            self.value, self.iteration, self.num_waited = value, iteration, 0
            logger.info(f"{name} is {value:.4g}, the best so far")
            return True
        self.num_waited += 1
        best = (
            "nothing was yet" if first else f"the best is {self.value:.4g} after iteration {self.iteration}"
        )
        logger.info(f"{name} is {value:.4g}; {best}")
        if self.is_stale():
            logger.warning(
                f"no better {name} in SOLVER.PATIENCE {self._patience} evaluations: the run ends here"
            )
        return False

    def is_stale(self):
        """Whether the patience is exhausted."""
        return 0 < self._patience <= self.num_waited

    def state_dict(self):
        """Numbers and names only."""
        numbers = {"value": self.value, "iteration": self.iteration, "num_waited": self.num_waited}
        return {"metric": self._metric, "seen": self._seen, **numbers}

    def load_state_dict(self, state_dict):
        """Go on from a saved state; that of another metric is forgotten, with a warning."""
        if state_dict["metric"] != self._metric:
            if state_dict["metric"]:
                logger.warning(
                    f"TEST.BEST_METRIC was {state_dict['metric']!r} and is {self._metric!r}: the best so far "
                    "is forgotten"
                )
            return
        self.value, self.iteration = state_dict["value"], state_dict["iteration"]
        self.num_waited, self._seen = state_dict["num_waited"], state_dict["seen"]
        if self.is_stale():
            logger.warning(
                f"the run ended after SOLVER.PATIENCE {self._patience} evaluations without a better "
                f"{self._metric}; it goes on with a larger SOLVER.PATIENCE"
            )
