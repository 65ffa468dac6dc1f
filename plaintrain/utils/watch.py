"""Telling all ranks of a job, on all machines, that one has failed."""

import json
import os
import sys
import threading

import torch.distributed as dist

_FAILED = "plaintrain/failed"
_STORE_GONE = json.dumps({"machine": -1, "text": "its process is gone", "rank": 0})


class FailureWatch:
    """Ends this process within seconds when another rank, on any machine, has failed.

    A rank that waits in a collective for one that is gone would wait for the whole timeout.
    """

    def __init__(self, rank, host, port, machine, local_rank):
        """
        Args:
            rank: this process' rank.
            host, port: where rank 0 holds the job's `TCPStore`.
            machine: this machine's number.
            local_rank: this process' number on it; 0 shows the failures of other machines.
        """
        # A connection of its own: the group's is locked while it waits.
        self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self._rank, self._machine, self._local_rank = rank, machine, local_rank
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def report(self, text):
        """Record this rank's failure; True if it is the job's first, else that one is shown."""
        mine = json.dumps({"machine": self._machine, "text": text, "rank": self._rank})
        try:
            with self._lock:
                first = self._store.compare_set(_FAILED, "", mine).decode()
        except RuntimeError:
            # The store is gone, and rank 0 with it: it failed first.
            first = _STORE_GONE
        if first != mine:
            self._show(json.loads(first))
        return first == mine

    def stop(self):
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self):
        while not self._stopped.wait(1.0):
            try:
                with self._lock:
                    failure = self._store.get(_FAILED) if self._store.check([_FAILED]) else None
            except RuntimeError:
                failure = _STORE_GONE
            if failure and not self._stopped.is_set() and json.loads(failure)["rank"] != self._rank:
                self._show(json.loads(failure))
                os._exit(1)

    def _show(self, failure):
        # The failed rank has printed its error on its own machine.
        if failure["machine"] != self._machine and self._local_rank == 0:
            print(f"rank {failure['rank']} failed: {failure['text']}", file=sys.stderr, flush=True)
