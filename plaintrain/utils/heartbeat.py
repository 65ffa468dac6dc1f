"""Heartbeats of the main thread, for the watchdog that ends a job in which a rank hangs."""

import math
import time

from plaintrain.utils import comm

# Seconds for a step that may compile, or while rank 0 scores the detections of all ranks.
LONG = 1800.0


class _Heartbeat:
    """The maximum time between two beats, that until the next one, and its deadline, in seconds."""

    limit: float = math.inf
    allowed: float = math.inf
    deadline: float = math.inf


def set_limit(seconds: float) -> None:
    """Set the maximum time after each following beat; 0 for no limit."""
    _Heartbeat.limit = seconds or math.inf


def beat(extra: float = 0.0) -> None:
    """Record that the main thread makes progress; allow `extra` seconds more until the next beat."""
    _Heartbeat.allowed = _Heartbeat.limit + extra
    _Heartbeat.deadline = time.monotonic() + _Heartbeat.allowed


def rest() -> None:
    """Pause the heartbeat until the next beat."""
    _Heartbeat.deadline = math.inf


def end_loop() -> None:
    """Rest in a single process; allow `LONG` to a rank, for which others may wait."""
    if comm.get_world_size() == 1:
        rest()
    else:
        beat(LONG)


def forgive(seconds: float) -> None:
    """Do not count these seconds, in which the whole process was suspended."""
    _Heartbeat.deadline += seconds


def is_overdue() -> bool:
    """Return whether the next beat is overdue."""
    return time.monotonic() > _Heartbeat.deadline


def get_limit() -> float:
    """Return the maximum time until the next beat, in seconds."""
    return _Heartbeat.allowed
