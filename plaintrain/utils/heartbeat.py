"""Signs of life of the main thread, for the watch that ends a job in which a rank hangs."""

import math
import time

# Before a step that may compile, and while one rank scores what all have found.
LONG = 1800.0


class _Pulse:
    """When the main thread last went on, and for how long it may be silent after; None is not expected."""

    limit, last, extra = math.inf, None, 0.0


def set_limit(seconds):
    """How long the main thread may be silent between two beats; 0 for ever."""
    _Pulse.limit = seconds or math.inf


def beat(extra=0.0):
    """The main thread goes on; the next beat may take `extra` seconds longer than usual."""
    _Pulse.last, _Pulse.extra = time.monotonic(), extra


def rest():
    """No beat is expected until the next one."""
    _Pulse.last, _Pulse.extra = None, 0.0


def forgive(seconds):
    """Do not count these seconds, in which the whole process stood still."""
    if _Pulse.last is not None:
        _Pulse.last += seconds


def allowed():
    """Seconds that may pass without a beat."""
    return _Pulse.limit + _Pulse.extra


def silence():
    """Seconds since the last beat; 0 where none is expected."""
    return 0.0 if _Pulse.last is None else time.monotonic() - _Pulse.last
