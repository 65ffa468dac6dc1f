"""Heartbeats of the main thread, for the watch that ends a job in which a rank hangs."""

import math
import time

# Before a step that may compile, and while one rank scores what all have found.
LONG = 1800.0


class _Pulse:
    """The time of the last beat, and the seconds until the next one; None: no beat is expected."""

    limit, last, extra = math.inf, None, 0.0


def set_limit(seconds):
    """Set the longest time between two beats; 0 for no limit."""
    _Pulse.limit = seconds or math.inf


def beat(extra=0.0):
    """Note that the main thread makes progress; the next beat may take `extra` seconds longer than usual."""
    _Pulse.last, _Pulse.extra = time.monotonic(), extra


def rest():
    """Expect no beat until the next one."""
    _Pulse.last = None
    _Pulse.extra = 0.0


def forgive(seconds):
    """Do not count these seconds, in which the whole process stood still."""
    if _Pulse.last is not None:
        _Pulse.last += seconds


def is_overdue():
    """Return whether the next beat has not come in time."""
    return _Pulse.last is not None and time.monotonic() - _Pulse.last > _Pulse.limit + _Pulse.extra


def get_limit():
    """Return the longest time between two beats, in seconds."""
    return _Pulse.limit + _Pulse.extra
