"""Telling all ranks of a job, on all machines, that one has failed, is gone, or hangs."""

import contextlib
import datetime
import json
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

from plaintrain.utils import heartbeat
from plaintrain.utils.stop import end_at_once

_FAILED = "failed"
_STORE_GONE = json.dumps({"machine": -1, "text": "its process is gone, or its machine", "rank": 0})
_SECONDS = 1.0
# What a rank says that lost its connection to one that failed; that one's own word is waited for.
_FELT = ("connection closed", "connection reset", "connection refused", "broken pipe", "gloo", "nccl")
_FELT_SECONDS = 5.0
# Where the network is gone, a question to the store is never answered.
_STORE_SECONDS = 10.0


def report_failure(store, failure, prefix=""):
    """Record a failure as the job's first; returns the first, which may be another."""
    mine = json.dumps(failure)
    return json.loads(store.compare_set(f"{prefix}plaintrain/{_FAILED}", "", mine).decode())


def connect(host, port):
    """A connection of one's own to the job's store: the group's is locked while it waits."""
    return dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=30)
    )


class FailureWatch:
    """Ends this process within seconds when another rank, on any machine, has failed.

    A rank that waits in a collective for one that is gone would wait for the whole timeout. One that gives
    no sign of life for as long as `plaintrain.utils.heartbeat` allows has failed too: its main thread
    hangs, its process is frozen, or its machine is gone.
    """

    def __init__(self, address, ranks, place, prefix="", lingers=False):
        """
        Args:
            address: (host, port) where rank 0, or an agent, holds the job's `TCPStore`.
            ranks: (this process' rank, number of ranks).
            place: (this machine's number, this process' number on it); 0 of a machine shows the failures
                of others.
            prefix: of the keys in the store, where jobs before have used it.
            lingers: other machines lose the store with this process: when it ends because of a failure, it
                gives them time to read what happened.
        """
        self._store = connect(*address)
        (self._rank, self._world_size), (self._machine, self._local_rank) = ranks, place
        self._prefix, self._lingers, self._has_shown = prefix, lingers, False
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._answered, self._alive = time.monotonic(), {}
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._talk, self._look_at_clock)]
        for thread in self._threads:
            thread.start()

    def report(self, text, felt=False):
        """Record this rank's failure; True if it is the job's first, else that one is shown.

        Args:
            text: what is to be told.
            felt: it looks as if another rank had failed, whose report is waited for.
        """
        mine = {"machine": self._machine, "text": text, "rank": self._rank}
        silence = ""
        try:
            if felt:
                silence = self._wait_for_the_cause()
                mine["text"] = silence + text
            with self._store_alone() as store:
                first = report_failure(store, mine, self._prefix)
        except RuntimeError:
            # The store is gone, and rank 0 with it: it failed first.
            first = json.loads(_STORE_GONE)
        if first != mine:
            self._show(first)
        elif silence:
            print(silence, end="", file=sys.stderr, flush=True)
        return first == mine

    def _wait_for_the_cause(self):
        """Wait for the report of the rank that failed first; if none comes, say which ranks are silent."""
        before, end = self._signs(), time.monotonic() + _FELT_SECONDS
        while time.monotonic() < end:
            if self._failure():
                return ""
            time.sleep(0.1)
        silent = [str(rank) for rank, sign in self._signs().items() if sign == before[rank]]
        return f"there is no sign of life of rank {', '.join(silent)}\n" if silent else ""

    def _signs(self):
        """The last sign of life of every other rank."""
        return {rank: self._read(f"alive/{rank}") for rank in range(self._world_size) if rank != self._rank}

    def linger(self):
        """Give the other machines time to read what was reported."""
        if self._lingers:
            time.sleep(2 * _SECONDS)

    def stop(self):
        """Stop watching."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * _SECONDS)

    @contextlib.contextmanager
    def _store_alone(self):
        """The store, for one question; a RuntimeError if another thread waits for an answer for too long."""
        if not self._lock.acquire(timeout=_STORE_SECONDS):
            raise RuntimeError("the store does not answer")
        try:
            yield self._store
        finally:
            self._lock.release()

    def _key(self, name):
        return f"{self._prefix}plaintrain/{name}"

    def _read(self, name):
        """What is in the store under a name, or ""."""
        with self._store_alone() as store:
            key = self._key(name)
            return store.get(key).decode() if store.check([key]) else ""

    def _failure(self):
        """What was reported first, or ""."""
        return self._read(_FAILED)

    def _talk(self):
        """Say that this process lives, and look whether another has failed."""
        count = 0
        while not self._stopped.wait(_SECONDS):
            try:
                failure, count = self._failure(), count + 1
                with self._store_alone() as store:
                    store.set(self._key(f"alive/{self._rank}"), f"{count} {heartbeat.allowed()}")
                if self._rank == 0 and count % 5 == 0:
                    self._look_at_others()
            except RuntimeError:
                failure = _STORE_GONE
            self._answered = time.monotonic()
            if failure and not self._stopped.is_set() and json.loads(failure)["rank"] != self._rank:
                self._end(json.loads(failure))

    def _look_at_others(self):
        for rank in range(1, self._world_size):
            sign = self._read(f"alive/{rank}") or "0 inf"
            since = self._alive.setdefault(rank, (sign, time.monotonic()))
            if since[0] != sign:
                self._alive[rank] = sign, time.monotonic()
            elif time.monotonic() - since[1] > float(sign.split()[1]):
                self._fail(f"rank {rank} gives no sign of life: its process is frozen, or its machine gone")

    def _look_at_clock(self):
        """See whether the main thread still beats, and the store still answers."""
        before = time.monotonic()
        while not self._stopped.wait(_SECONDS):
            gap, before = time.monotonic() - before, time.monotonic()
            if gap > 5 * _SECONDS:
                # This process was stopped, by Ctrl-Z or with its whole machine.
                heartbeat.forgive(gap)
                self._answered += gap
                self._alive = {rank: (sign, before) for rank, (sign, _) in self._alive.items()}
            limit = heartbeat.allowed()
            if heartbeat.silence() > limit:
                self._fail(self._stuck())
            elif time.monotonic() - self._answered > max(limit, 60.0):
                self._end({"machine": -1, "rank": 0, "text": "it gives no sign of life"})

    def _stuck(self):
        """Where the main threads of all ranks stand that are silent too."""
        places, ranks = {}, range(self._world_size)
        try:
            with self._store_alone() as store:
                store.set(self._key(f"stuck/{self._rank}"), _position())
            before = [self._read(f"alive/{rank}") for rank in ranks]
            # The others find it out at the same time.
            time.sleep(3 * _SECONDS)
            for rank in ranks:
                lives = self._read(f"alive/{rank}") != before[rank]
                place = self._read(f"stuck/{rank}") or ("at work" if lives else "no sign of life")
                places.setdefault(place, []).append(str(rank))
        except RuntimeError:
            places = {_position(): [str(self._rank)]}
        stand = "; ".join(f"rank {', '.join(ranks)}: {place}" for place, ranks in places.items())
        limit = heartbeat.allowed()
        return f"no step was finished within {limit:g} s (HANG_TIMEOUT); the ranks stand at {stand}"

    def _fail(self, text):
        if self._stopped.is_set():
            # The run has ended meanwhile.
            return
        if self.report(text):
            print(f"error: {text}", file=sys.stderr, flush=True)
            # Rank 0 takes the store with it: let the others read what happened.
            time.sleep(3 * _SECONDS)
        end_at_once(1)

    def _end(self, failure):
        self._show(failure)
        self.linger()
        end_at_once(1)

    def _show(self, failure):
        # The failed rank has printed its error on its own machine.
        if failure["machine"] != self._machine and self._local_rank == 0 and not self._has_shown:
            self._has_shown = True
            print(f"rank {failure['rank']} failed: {failure['text']}", file=sys.stderr, flush=True)


def is_felt(error):
    """Whether an exception looks as if another rank had gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _FELT)


def _position():
    """Where the main thread stands: its innermost line outside of Python's and PyTorch's own files."""
    frame = innermost = sys._current_frames()[threading.main_thread().ident]
    own = os.path.dirname(os.__file__), os.path.dirname(torch.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    if frame.f_back is None:
        frame = innermost
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"
