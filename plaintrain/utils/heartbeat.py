"""Heartbeats of the main thread, for the watchdog that ends a job in which a rank hangs."""

import math
import time

from plaintrain.utils import comm

# Seconds for a step that may compile, or while rank 0 scores the detections of all ranks.
LONG = 1800.0


class _Heartbeat:
    """The last beat and the allowed seconds until the next; `last` None expects no beat."""

    limit: float = math.inf
    last: float | None = None
    extra: float = 0.0


def set_limit(seconds: float) -> None:
    """Set the maximum time between two beats; 0 for no limit."""
    _Heartbeat.limit = seconds or math.inf


def beat(extra: float = 0.0) -> None:
    """Record that the main thread makes progress; allow `extra` seconds more until the next beat."""
    _Heartbeat.last = time.monotonic()
    _Heartbeat.extra = extra


def rest() -> None:
    """Pause the heartbeat until the next beat."""
    _Heartbeat.last = None
    _Heartbeat.extra = 0.0


def end_loop() -> None:
    """Rest in a single process; allow `LONG` to a rank, for which others may wait."""
    if comm.get_world_size() == 1:
        rest()
    else:
        beat(LONG)


def forgive(seconds: float) -> None:
    """Do not count these seconds, in which the whole process was suspended."""
    if _Heartbeat.last is not None:
        _Heartbeat.last += seconds


def is_overdue() -> bool:
    """Return whether the next beat is overdue."""
    return _Heartbeat.last is not None and time.monotonic() - _Heartbeat.last > get_limit()


def get_limit() -> float:
    """Return the maximum time until the next beat, in seconds."""
    return _Heartbeat.limit + _Heartbeat.extra
