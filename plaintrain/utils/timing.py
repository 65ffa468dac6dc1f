"""The time that a run may take."""

import logging
import time

from plaintrain.utils import comm

logger = logging.getLogger(__name__)


class TimeLimit:
    """Tells all ranks together when a time is over."""

    def __init__(self, seconds=0):
        """seconds: from now; 0 for no limit."""
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def is_over(self):
        """Whether it is over on any rank. The ranks' hosts agree; no device is waited for."""
        if not self._seconds or not comm.any_rank(time.monotonic() >= self._deadline):
            return False
        logger.warning(
            f"SOLVER.MAX_TIME of {self._seconds:g} s is over: the run stops after this step, with a "
            "checkpoint; go on with --resume"
        )
        return True
