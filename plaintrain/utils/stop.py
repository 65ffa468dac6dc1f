"""Ending a run before its end, on all ranks together: after a signal, or when its time is over."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

from plaintrain.utils import comm
from plaintrain.utils.heartbeat import rest

logger = logging.getLogger(__name__)

# SIGHUP is sent when the terminal or the ssh session is closed; SIGUSR1 is what Slurm's --signal is usually
# set to, some time before it ends a job.
_SIGNALS = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
# One Ctrl-C may arrive twice: from the terminal, and passed on by the process that started this one.
_SAME_SECONDS = 0.5
# The `StopSignal` whose block is running: a process has one set of signal handlers.
_ACTIVE = []


def get_stop_signals():
    """Return the signals that end a run: not SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return _SIGNALS[1:] if ignored else _SIGNALS


def end_at_once(code):
    """End this process and those that load its images, from any thread and whatever they are doing."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class Stopped(SystemExit):
    """A signal ended the run on all ranks, with a checkpoint; `code` is what a shell reports for it."""


class StopSignal:
    """Tells all ranks together that the run is to end after this step.

    Within its block the signals of `get_stop_signals` only ask for it, and a second SIGINT ends the process
    at once. At the end of the block a run that a signal has stopped raises `Stopped`.
    """

    def __init__(self, max_time=0):
        """max_time: seconds from now after which the run is to end, 0 for no limit."""
        self._max_time = max_time
        self._deadline = time.monotonic() + (max_time or math.inf)
        # The number of the signal that came to this rank, and of that which all ranks know of.
        self.signal = 0
        self._agreed = 0
        self._first_interrupt = math.inf
        self._handlers = {}

    def requested_on_any_rank(self):
        """Return whether a rank has a signal or no time left: an all-reduce on the host, no device sync."""
        # One number for both: a signal of any rank counts for more than the time.
        reason = comm.all_reduce_max(2 * self.signal + (time.monotonic() >= self._deadline))
        self._agreed = reason // 2
        if reason == 1:
            logger.warning(
                f"SOLVER.MAX_TIME of {self._max_time:g} s is over: the run stops after this step, with a "
                "checkpoint; continue with --resume"
            )
        return reason > 0

    def end_evaluation(self):
        """Raise `Stopped` on every rank if one has a signal; all ranks call it at the same point."""
        self._agreed = comm.all_reduce_max(self.signal)
        if self._agreed:
            raise Stopped(128 + self._agreed)

    def _handle(self, number, frame):
        is_first = not self.signal
        self.signal = number
        if number == signal.SIGINT:
            if time.monotonic() - self._first_interrupt > _SAME_SECONDS:
                end_at_once(128 + number)
            self._first_interrupt = min(time.monotonic(), self._first_interrupt)
        if is_first and comm.get_local_rank() == 0:
            name = signal.Signals(number).name
            text = f"\n{name}: the run stops after this step; Ctrl-C again stops it at once\n"
            # The terminal may be gone, and the log in the middle of a line.
            with contextlib.suppress(Exception):
                os.write(sys.stderr.fileno(), text.encode())

    def __enter__(self):
        # Elsewhere Python allows no handlers.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._handle) for number in get_stop_signals()}
        _ACTIVE.append(self)
        return self

    def __exit__(self, error_type, error, traceback):
        _ACTIVE.remove(self)
        rest()
        is_stopped = self._agreed and (error is None or isinstance(error, Stopped))
        if is_stopped:
            name = signal.Signals(self._agreed).name
            logger.warning(f"{name}: the run has stopped, with a checkpoint; continue with --resume")
            # Nobody leaves while another still saves: a launcher ends the rest of a job with its first.
            comm.synchronize()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if is_stopped:
            raise Stopped(128 + self._agreed)


def is_requested():
    """Return whether a signal has asked this process to end its training."""
    return any(request.signal for request in _ACTIVE)


def end_evaluation_if_requested():
    """Wait for every rank, and raise `Stopped` on all of them if a signal has come to one."""
    if _ACTIVE:
        _ACTIVE[-1].end_evaluation()
    else:
        comm.synchronize()
