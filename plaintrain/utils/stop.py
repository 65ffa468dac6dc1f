"""Stop a run early, on all ranks: after a signal, or at SOLVER.MAX_TIME."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

from plaintrain.utils import comm
from plaintrain.utils.heartbeat import rest

logger = logging.getLogger(__name__)

# SIGHUP is sent when the terminal is closed; SIGUSR1 is the usual --signal of Slurm before a job ends.
_SIGNALS = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
# One Ctrl-C may arrive twice: from the terminal, and from the parent process.
_SAME_SECONDS = 0.5
# The `StopSignal` whose block is running: a process has one set of signal handlers.
_ACTIVE: list["StopSignal"] = []


def get_stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a run, without SIGHUP if it is ignored (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return _SIGNALS[1:] if ignored else _SIGNALS


def end_at_once(code: int) -> None:
    """Kill the child processes and exit immediately, from any thread."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class Stopped(SystemExit):
    """Exit of all ranks, with a checkpoint, after a signal; `code` is 128 + the signal, as in a shell."""


class StopSignal:
    """Request to stop all ranks, set by a signal or after `max_time` seconds (0: no limit).

    Within the block, signals only set the request, but a second SIGINT ends the process at once. The end of
    the block raises `Stopped` if a signal has stopped the run.
    """

    def __init__(self, max_time: float = 0) -> None:
        self._max_time = max_time
        self._deadline = time.monotonic() + (max_time or math.inf)
        # Signal received by this rank, and the one that all ranks stop for; 0 without.
        self.signal = 0
        self.agreed_signal = 0
        self._first_interrupt = math.inf
        self._handlers: dict[int, Any] = {}

    def requested_on_any_rank(self) -> bool:
        """Return whether any rank has a signal or no time left; an all-reduce over gloo, no device sync."""
        # One integer for both; a signal on any rank outweighs the time limit.
        reason = comm.all_reduce_max(2 * self.signal + (time.monotonic() >= self._deadline))
        self.agreed_signal = reason // 2
        if reason == 1:
            hint = "stopping after this step with a checkpoint; continue with --resume"
            logger.warning(f"SOLVER.MAX_TIME of {self._max_time:g} s is over: {hint}")
        return reason > 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_first = not self.signal
        self.signal = signum
        if signum == signal.SIGINT:
            if time.monotonic() - self._first_interrupt > _SAME_SECONDS:
                end_at_once(128 + signum)
            self._first_interrupt = min(time.monotonic(), self._first_interrupt)
        if is_first and comm.get_local_rank() == 0:
            name = signal.Signals(signum).name
            text = f"\n{name}: stopping after this step; press Ctrl-C again to stop at once\n"
            # The terminal may be closed, and logging is not allowed in a signal handler.
            with contextlib.suppress(Exception):
                os.write(sys.stderr.fileno(), text.encode())

    def __enter__(self) -> Self:
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signum: signal.signal(signum, self._handle) for signum in get_stop_signals()}
        _ACTIVE.append(self)
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        _ACTIVE.remove(self)
        rest()
        is_stopped = self.agreed_signal and (error is None or isinstance(error, Stopped))
        if is_stopped:
            name = signal.Signals(self.agreed_signal).name
            logger.warning(f"{name}: stopped with a checkpoint; continue with --resume")
            # Launchers kill all processes when the first exits, so wait until all ranks have saved.
            comm.synchronize()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        if is_stopped:
            raise Stopped(128 + self.agreed_signal)


def is_requested() -> bool:
    """Return whether this process has received a signal to stop."""
    return any(stop.signal for stop in _ACTIVE)


def end_evaluation_if_requested() -> None:
    """Wait for all ranks, and raise `Stopped` on all of them if any has a signal."""
    for stop in _ACTIVE:
        stop.agreed_signal = comm.all_reduce_max(stop.signal)  # all ranks
        if stop.agreed_signal:
            raise Stopped(128 + stop.agreed_signal)
    if not _ACTIVE:
        comm.synchronize()
