"""The file-system events of a run: record them, and kill the run exactly at one of them."""

import builtins
import io
import os
import re
import signal
from collections import Counter
from functools import partial

# {function of os: the argument that names the file}.
_CALLS = {"replace": 1, "link": 1, "unlink": 0, "fsync": 0, "ftruncate": 0, "mkdir": 0}


def record_events(folder, path):
    """Let the run append each event in `folder` to a file."""

    def record(event, moment):
        if moment == "before":
            with open(path, "a") as f:
                f.write(f"{event}\n")

    _watch(folder, record)


def kill_at(folder, target, count, moment):
    """Kill the run at the `count`-th event `target` of one of its processes: before it, within, or after."""
    seen = Counter()

    def act(*event):
        seen[event] += 1
        if event == (target, moment) and seen[event] == count:
            os.killpg(0, signal.SIGKILL)

    _watch(folder, act)


def _watch(folder, act):
    """Call `act(event, moment)` around everything that changes a file below a folder."""
    folder = os.path.join(os.path.realpath(folder), "")

    def call(operation, function, position, *args, **kwargs):
        path = args[position]
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.realpath(path)
        if not path.startswith(folder):
            return function(*args, **kwargs)
        # The same for each iteration, process and time.
        event = f"{operation} {re.sub('[0-9]+', 'N', path.removeprefix(folder))}"
        act(event, "before")
        result = function(*args, **kwargs)
        if operation == "open":
            result.write = partial(write, event.replace("open", "write", 1), result, result.write)
        act(event, "after")
        return result

    def write(event, f, function, data):
        act(event, "before")
        # What a killed process had written may be any part of it.
        function(data[: len(data) // 2])
        f.flush()
        act(event, "within")
        function(data[len(data) // 2 :])
        act(event, "after")
        return len(data)

    def open_watched(path, mode="r", *args, function=open, **kwargs):
        if mode.startswith("r"):
            return function(path, mode, *args, **kwargs)
        return call("open", function, 0, path, mode, *args, **kwargs)

    for operation, position in _CALLS.items():
        setattr(os, operation, partial(call, operation, getattr(os, operation), position))
    builtins.open = io.open = open_watched
