"""Watchdog that ends all ranks of a job, on all machines, when one of them fails, dies or hangs."""

import datetime
import json
import os
import re
import sys
import threading
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from plaintrain.utils import heartbeat
from plaintrain.utils.stop import end_at_once

# The key of the job's first failure.
_FAILED = "plaintrain/failed"
_POLL_SECONDS = 0.1
_CLOCK_SECONDS = 1.0
# Errors of a rank that lost its connection to a failed rank, and the time to wait for that rank's report.
_CONNECTION_ERROR = re.compile("connection (closed|reset|refused)|broken pipe|gloo|nccl", re.IGNORECASE)
_CONNECTION_SECONDS = 5.0
# Without a network, requests to the store hang.
_STORE_SECONDS = 10.0
_STORE_LOST = {"machine": -1, "rank": 0, "text": "its process or machine has died", "hangs": False}


def connect(host: str, port: int, prefix: str = "") -> dist.Store:
    """Open a second connection to the job's store, since the process group locks its own while waiting."""
    timeout = datetime.timedelta(seconds=30)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(prefix, store)


def report_failure(store: dist.Store, failure: dict[str, Any]) -> dict[str, Any]:
    """Store a failure unless the job already has one; return the first failure of the job."""
    return json.loads(store.compare_set(_FAILED, "", json.dumps(failure)))


class FailureWatch:
    """Threads that end this process within seconds when another rank fails or the main thread hangs.

    Without them, ranks wait in collectives for a failed rank until the timeout of the process group.
    """

    def __init__(
        self, job: dict[str, Any], address: tuple[str, int], prefix: str = "", holds_store: bool = False
    ):
        """
        Args:
            job: see `find_job`.
            address: (host, port) of the job's `TCPStore`.
            prefix: prefix of the keys of this start of the job.
            holds_store: whether this process, and not an agent of torchrun, runs the store.
        """
        self._store = connect(*address, prefix)
        self._rank = job["rank"]
        self._machine = job["machine"]
        self._local_rank = job["local_rank"]
        self._holds_store = holds_store
        self._stopped = threading.Event()
        # Held by the thread that ends this process.
        self._ending = threading.Lock()
        targets = (self._watch_store, self._watch_clock)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * _CLOCK_SECONDS)

    def fail(self, error: BaseException, text: str) -> None:
        """Report the exception of this rank as `text`, and end this process.

        The job's first failure is printed by its rank, and once on each other machine.
        """
        if isinstance(error, RuntimeError) and _CONNECTION_ERROR.search(str(error)):
            # The report of the rank that failed first usually ends this process meanwhile.
            time.sleep(_CONNECTION_SECONDS)
            text = f"lost the connection to a rank that has reported no failure\n{text}"
        with self._ending:
            self._report(text, hangs=False)

    def _report(self, text: str, hangs: bool) -> None:
        own = {"machine": self._machine, "rank": self._rank, "text": text, "hangs": hangs}
        first = [own]

        def send():
            try:
                first[0] = report_failure(self._store, own)
            except RuntimeError:
                # The store died with rank 0, which therefore failed first.
                first[0] = _STORE_LOST

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        if first[0] == own:
            print(f"rank {self._rank}: {text}", file=sys.stderr, flush=True)
        self._end(first[0])

    def _end(self, failure: dict[str, Any]) -> None:
        """Print the job's first failure and end this process."""
        if failure["machine"] != self._machine and self._local_rank == 0:
            print(f"rank {failure['rank']} failed: {failure['text']}", file=sys.stderr, flush=True)
        if failure["hangs"]:
            print(f"rank {self._rank} is in {_get_position()}", file=sys.stderr, flush=True)
        if self._holds_store or failure["hangs"]:
            # The other ranks need time to read the failure before they lose their connections.
            time.sleep(3 * _POLL_SECONDS)
        sys.stdout.flush()
        end_at_once(1)

    def _watch_store(self) -> None:
        """End this process when another rank fails."""
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                failure = json.loads(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None
            except RuntimeError:
                failure = _STORE_LOST
            if failure and not self._stopped.is_set():
                with self._ending:
                    self._end(failure)

    def _watch_clock(self) -> None:
        """End all ranks when the main thread hangs."""
        before = time.monotonic()
        while not self._stopped.wait(_CLOCK_SECONDS):
            now = time.monotonic()
            gap = now - before
            before = now
            if gap > 5 * _CLOCK_SECONDS:
                # The process was suspended, by Ctrl-Z or with its machine.
                heartbeat.forgive(gap)
            if heartbeat.is_overdue():
                text = f"no step was finished within {heartbeat.get_limit():g} s (HANG_TIMEOUT)"
                with self._ending:
                    self._report(f"{text}; each rank reports its position", hangs=True)


def _get_position():
    """Return the innermost line of the main thread outside of the standard library and PyTorch."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    libraries = (os.path.dirname(os.__file__), os.path.dirname(torch.__file__))
    own = [frame for frame in stack if not frame.filename.startswith(libraries)]
    frame = (own or stack)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
