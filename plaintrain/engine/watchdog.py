"""End all ranks of a job, on all machines, when one of them has failed, is gone, or hangs."""

import datetime
import json
import os
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from plaintrain.utils import heartbeat
from plaintrain.utils.stop import end_at_once

# The key of the job's first failure.
_FAILED = "plaintrain/failed"
_POLL_SECONDS = 0.1
_CLOCK_SECONDS = 1.0
# Words of the errors of a rank that lost its connection to one that failed, whose own report is waited for.
_FELT = ("connection closed", "connection reset", "connection refused", "broken pipe", "gloo", "nccl")
_FELT_SECONDS = 5.0
# Without a network the store never answers.
_STORE_SECONDS = 10.0
_STORE_GONE = {"machine": -1, "rank": 0, "text": "its process is gone, or its machine", "hangs": False}


def connect(host, port, prefix=""):
    """Open another connection to the job's store: that of the process group is locked while it waits."""
    timeout = datetime.timedelta(seconds=30)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(prefix, store)


def report_failure(store, failure):
    """Record a failure as the job's first; returns the first, which may be another."""
    return json.loads(store.compare_set(_FAILED, "", json.dumps(failure)))


class FailureWatch:
    """Ends this process within seconds when another rank has failed, or when the main thread hangs.

    Without it, a rank that waits in a collective for one that is gone would wait for the whole timeout.
    """

    def __init__(self, address, rank, machine, local_rank, prefix="", holds_store=False):
        """
        Args:
            address: (host, port) of the job's `TCPStore`.
            rank, machine, local_rank: of this process.
            prefix: of the keys in the store, where jobs before have used it.
            holds_store: the store ends with this process, and not with an agent of torchrun.
        """
        self._store = connect(*address, prefix)
        self._rank, self._machine, self._local_rank = rank, machine, local_rank
        self._holds_store = holds_store
        self._stopped = threading.Event()
        # Held by the thread that ends this process.
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._watch_store, self._watch_clock)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self):
        """Stop watching."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * _CLOCK_SECONDS)

    def fail(self, error, text):
        """Report the exception of this rank as `text`, and end this process.

        The job's first failure is printed by its rank, and once on each other machine.
        """
        if _is_felt(error):
            # Meanwhile the report of the rank that failed first ends this process.
            time.sleep(_FELT_SECONDS)
            text = f"the connection to a rank that has reported no failure is lost\n{text}"
        with self._ending:
            self._report(text, hangs=False)

    def _report(self, text, hangs):
        mine = {"machine": self._machine, "rank": self._rank, "text": text, "hangs": hangs}
        first = [mine]

        def record():
            try:
                first[0] = report_failure(self._store, mine)
            except RuntimeError:
                # Rank 0 took the store with it: it failed first.
                first[0] = _STORE_GONE

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        if first[0] == mine:
            print(f"rank {self._rank}: {text}", file=sys.stderr, flush=True)
        self._end(first[0])

    def _end(self, failure):
        """Show the job's first failure, and end this process."""
        if failure["machine"] != self._machine and self._local_rank == 0:
            print(f"rank {failure['rank']} failed: {failure['text']}", file=sys.stderr, flush=True)
        if failure["hangs"]:
            print(f"rank {self._rank} is in {_position()}", file=sys.stderr, flush=True)
        if self._holds_store or failure["hangs"]:
            # The others read what happened before they lose the store, or the connection to this process.
            time.sleep(3 * _POLL_SECONDS)
        sys.stdout.flush()
        end_at_once(1)

    def _watch_store(self):
        """Look whether another rank has failed."""
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                failure = json.loads(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None
            except RuntimeError:
                failure = _STORE_GONE
            if failure and not self._stopped.is_set():
                with self._ending:
                    self._end(failure)

    def _watch_clock(self):
        """Look whether the main thread still makes progress."""
        before = time.monotonic()
        while not self._stopped.wait(_CLOCK_SECONDS):
            gap, before = time.monotonic() - before, time.monotonic()
            if gap > 5 * _CLOCK_SECONDS:
                # This process was stopped, by Ctrl-Z or with its whole machine.
                heartbeat.forgive(gap)
            if heartbeat.is_overdue():
                text = f"no step was finished within {heartbeat.get_limit():g} s (HANG_TIMEOUT)"
                with self._ending:
                    self._report(f"{text}; each rank that is alive says where it stands", hangs=True)


def _is_felt(error):
    """Return whether an exception looks as if another rank were gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _FELT)


def _position():
    """Return the innermost line of the main thread outside of Python's and PyTorch's own files."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    libraries = os.path.dirname(os.__file__), os.path.dirname(torch.__file__)
    own = [frame for frame in stack if not frame.filename.startswith(libraries)]
    frame = (own or stack)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
