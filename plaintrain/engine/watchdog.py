"""Watchdog that ends all processes of a job, on all machines, when one of them fails, dies or hangs."""

import contextlib
import datetime
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from plaintrain.utils import heartbeat
from plaintrain.utils.stop import end_at_once, is_requested

# The key of the job's first failure.
_FAILED = "plaintrain/failed"
_POLL_SECONDS = 0.1
_CLOCK_SECONDS = 1.0
# Errors of a rank that lost its connection to a failed rank, and the time to wait for that rank's report.
_CONNECTION_ERROR = re.compile("connection (closed|reset|refused)|broken pipe|gloo|nccl", re.IGNORECASE)
_CONNECTION_SECONDS = 5.0
# Without a network, requests to the store hang.
_STORE_SECONDS = 10.0
_STORE_LOST = {"machine": -1, "rank": 0, "text": "its process or machine has died", "asks": False}
# The position of each rank, which a failure that "asks" requests, and the time to wait for it.
_POSITION = "plaintrain/position/"
_POSITION_SECONDS = 3.0
_FINISHED = "plaintrain/finished"
# Modules of debuggers and interactive shells.
_DEBUGGERS = {"bdb", "code", "debugpy", "pydevd", "IPython"}


def connect(host: str, port: int, prefix: str = "") -> dist.Store:
    """Open a second connection to the job's store, since the process group locks its own while waiting."""
    timeout = datetime.timedelta(seconds=30)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # HANG_TIMEOUT limits the requests.
    store.set_timeout(datetime.timedelta(minutes=30))
    return dist.PrefixStore(prefix, store)


def report_failure(store: dist.Store, failure: dict[str, Any]) -> dict[str, Any]:
    """Store a failure unless the job already has one; return the first failure of the job."""
    return json.loads(store.compare_set(_FAILED, "", json.dumps(failure)))


class FailureWatch:
    """Threads that end this process within seconds when another rank fails or the main thread hangs.

    Without them, ranks wait in collectives for a failed rank until the timeout of the process group. A job of
    one process has no store, and only its clock is watched.
    """

    def __init__(self, job: dict[str, Any], prefix: str = "", holds_store: bool = False):
        """
        Args:
            job: see `find_job`; `address` is that of its `TCPStore`.
            prefix: prefix of the keys of this start of the job.
            holds_store: whether this process, and no agent or parent, runs the store.
        """
        self._rank = job.get("rank", 0)
        self._world_size = job["world_size"]
        self._machine = job["machine"]
        self._local_rank = job.get("local_rank", 0)
        self._holds_store = holds_store
        # What the main thread has done, if it is at its end.
        self._end_position = ""
        self._stopped = threading.Event()
        # Held by the thread that ends this process.
        self._ending = threading.Lock()
        targets = [self._watch_clock]
        if self._world_size > 1:
            # The store prints an error of 25 lines when it has died, a socket is silent.
            host, port = job["address"]
            self._socket = socket.create_connection((host, port))
            self._store = connect(host, port, prefix)
            targets.append(self._watch_store)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads."""
        self._stopped.set()
        heartbeat.rest()
        for thread in self._threads:
            thread.join(timeout=2 * _CLOCK_SECONDS)

    def finish(self, seconds: float, position: str) -> bool:
        """Report that this rank has finished; return whether all ranks finish within `seconds`."""
        heartbeat.rest()
        self._end_position = position
        deadline = time.monotonic() + seconds
        num_finished = self._store.add(_FINISHED, 1)
        while num_finished < self._world_size and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            num_finished = self._store.add(_FINISHED, 0)
        return num_finished == self._world_size

    def fail(self, error: BaseException, text: str) -> None:
        """Report the exception of this rank as `text`, and end this process.

        The job's first failure is printed by its rank, and once on each other machine.
        """
        self._end_position = f"failed in {describe_position(traceback.extract_tb(error.__traceback__))}"
        # Without the traceback.
        message = text.rpartition("Error: ")[2]
        is_lost = isinstance(error, RuntimeError) and _CONNECTION_ERROR.search(message)
        if is_lost:
            # The report of the rank that failed first usually ends this process meanwhile.
            time.sleep(_CONNECTION_SECONDS)
            text = f"lost the connection to a rank that has reported no failure\n{message}"
        code = error.__cause__.code if isinstance(error.__cause__, SystemExit) else 1
        self._report(text, asks=bool(is_lost), code=code if isinstance(code, int) and code else 1)

    def _report(self, text: str, asks: bool, code: int = 1) -> None:
        """Print a failure with, if it `asks`, the positions of all ranks, unless another came first; end."""
        own = {"machine": self._machine, "rank": self._rank, "text": text, "asks": asks}
        first = own
        positions = [f"rank {self._rank} {self._get_position()}"] if asks else []
        with self._ending:
            if self._world_size > 1:
                try:
                    first, positions = ThreadPoolExecutor(1).submit(self._share, own).result(_STORE_SECONDS)
                except TimeoutError:
                    positions.append("rank 0, or the network, does not respond")
                except RuntimeError:
                    # The store died with rank 0, which therefore failed first.
                    first = _STORE_LOST
            if first == own:
                print("\n".join([f"rank {self._rank}: {text}", *positions]), file=sys.stderr, flush=True)
            self._end(first, code)

    def _share(self, own):
        """Store a failure; return the job's first one and, if that is `own`, the position of each rank."""
        self._store.set(f"{_POSITION}{self._rank}", self._get_position())
        first = report_failure(self._store, own)
        deadline = time.monotonic() + _POSITION_SECONDS
        positions = []
        for rank in range(self._world_size if first == own and own["asks"] else 0):
            key = f"{_POSITION}{rank}"
            while not (is_known := self._store.check([key])) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            text = self._store.get(key).decode() if is_known else "is frozen or has died"
            positions.append(f"rank {rank} {text}")
        return first, positions

    def _get_position(self):
        position = describe_position(traceback.extract_stack(_get_main_frame()))
        action = "waits for its data loader" if f"data{os.sep}loader.py" in position else "is"
        return self._end_position or f"{action} in {position}"

    def _end(self, failure: dict[str, Any], code: int = 1) -> None:
        """Print the job's first failure, unless a process of this machine does, and end this process."""
        # Without rank 0, the next rank of its machine prints.
        first_rank = int(failure == _STORE_LOST and self._machine == 0)
        if failure["machine"] != self._machine and self._local_rank == first_rank:
            print(f"rank {failure['rank']} failed: {failure['text']}", file=sys.stderr, flush=True)
        if self._holds_store:
            # The other ranks need time to read the failure before they lose their connections.
            time.sleep(3 * _POLL_SECONDS + _POSITION_SECONDS * failure["asks"])
        sys.stdout.flush()
        end_at_once(code)

    def _watch_store(self) -> None:
        """End this process when another rank fails."""
        failure: dict[str, Any] = {}
        while not (failure or self._stopped.is_set()):
            # The store sends nothing here: the socket is ready when the connection ends.
            if wait([self._socket], _POLL_SECONDS):
                failure = _STORE_LOST
            with contextlib.suppress(RuntimeError):
                if not failure and self._store.check([_FAILED]):
                    failure = json.loads(self._store.get(_FAILED))
        if failure is _STORE_LOST:
            # The death of the launcher, which holds the store, also sends a signal to stop with a checkpoint.
            time.sleep(_CLOCK_SECONDS)
            if is_requested():
                return
        # At the end of the job, rank 0 may be faster.
        if self._stopped.is_set() or (failure is _STORE_LOST and self._end_position):
            return
        with self._ending:
            if failure["asks"]:
                self._store.set(f"{_POSITION}{self._rank}", self._get_position())
            self._end(failure)

    def _watch_clock(self) -> None:
        """End all ranks when the main thread hangs."""
        before = time.monotonic()
        while not self._stopped.wait(_CLOCK_SECONDS):
            now = time.monotonic()
            gap = now - before
            before = now
            if gap > 5 * _CLOCK_SECONDS or _is_debugged():
                # The process was suspended, by Ctrl-Z or with its machine, or waits for a person.
                heartbeat.forgive(gap)
            if heartbeat.is_overdue():
                text = f"no step was finished within {heartbeat.get_limit():g} s (HANG_TIMEOUT)"
                self._report(text, asks=True)


def _get_main_frame():
    return sys._current_frames()[threading.main_thread().ident]


def _is_debugged():
    """Return whether the main thread is in a debugger or an interactive shell."""
    frame = _get_main_frame()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] not in _DEBUGGERS:
        frame = frame.f_back
    return frame is not None


def describe_position(stack: traceback.StackSummary) -> str:
    """Return the innermost line of a stack outside of the standard library and PyTorch."""
    libraries = (os.path.dirname(os.__file__), os.path.dirname(torch.__file__))
    own = [frame for frame in stack if not frame.filename.startswith(libraries)]
    frames = [f"{frame.filename}, line {frame.lineno}, in {frame.name}" for frame in own or stack]
    return frames[-1] if frames else "an unknown line"
