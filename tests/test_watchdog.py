"""Signs of life: plaintrain.utils.heartbeat and plaintrain.engine.watchdog."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from rank_functions import free_port

from plaintrain.engine import watchdog
from plaintrain.engine.watchdog import FailureWatch, is_felt
from plaintrain.utils import heartbeat


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    yield clock
    heartbeat.set_limit(0)
    heartbeat.rest()


def test_silence_counts_from_the_last_beat_and_only_where_one_is_expected(clock):
    heartbeat.rest()
    heartbeat.set_limit(5)
    clock.now = 200.0
    assert heartbeat.silence() == 0 and heartbeat.allowed() == 5
    heartbeat.beat()
    clock.now = 204.0
    assert heartbeat.silence() == 4
    heartbeat.beat(heartbeat.LONG)
    assert heartbeat.allowed() == 5 + heartbeat.LONG
    clock.now += 50
    heartbeat.forgive(49)
    assert heartbeat.silence() == 1
    heartbeat.beat()
    assert heartbeat.allowed() == 5
    heartbeat.set_limit(0)
    clock.now = 1e9
    assert heartbeat.silence() < heartbeat.allowed()


def test_errors_that_another_ranks_end_causes_are_felt():
    assert is_felt(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert is_felt(RuntimeError("NCCL communicator was aborted"))
    assert not is_felt(RuntimeError("shape mismatch")) and not is_felt(ValueError("connection reset"))


@pytest.fixture
def watch_ranks(monkeypatch):
    """Function (ranks of two machines) -> their watches, in one process, and the codes that ended them."""
    ended, made = [], []
    monkeypatch.setattr(watchdog, "end_at_once", lambda code: ended.append(code) or sys.exit())
    monkeypatch.setattr(watchdog, "_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def start(*ranks):
        made.extend(FailureWatch(("127.0.0.1", port), (rank, 2), (rank, 0)) for rank in ranks)
        return made, ended

    start.port = port
    yield start
    for each in made:
        each.stop()
        for thread in each._threads:
            # One that outlives this block would end the process that runs the tests.
            thread.join(timeout=60)
            assert not thread.is_alive()
    heartbeat.set_limit(0)
    heartbeat.rest()
    del store


def wait_for(condition):
    return any(condition() or threading.Event().wait(0.05) for _ in range(200))


def test_the_first_failure_is_the_one_that_is_shown(watch_ranks, capfd):
    (first, second), ended = watch_ranks(0, 1)
    assert first.report("this was first")
    assert not second.report("this was felt", felt=True)
    assert wait_for(lambda: ended)
    err = capfd.readouterr().err
    assert "rank 0 failed: this was first" in err and "felt" not in err


def test_a_failure_that_was_felt_waits_for_its_cause(watch_ranks, capfd):
    (first, second), _ = watch_ranks(0, 1)
    threading.Timer(0.3, lambda: first.report("the cause")).start()
    assert not second.report("connection closed", felt=True)
    assert "rank 0 failed: the cause" in capfd.readouterr().err


def test_silence_ends_the_job_and_says_where_it_stands(watch_ranks, capfd):
    _, ended = watch_ranks(0, 1)
    heartbeat.set_limit(0.2)
    heartbeat.beat()
    assert wait_for(lambda: ended)
    err = capfd.readouterr().err
    assert "no step was finished within 0.2 s (HANG_TIMEOUT); the ranks stand at rank 0, 1: " in err
    assert "test_watchdog.py, line" in err


def test_a_rank_that_is_frozen_ends_the_job(watch_ranks, capfd):
    _, ended = watch_ranks(0)
    dist.TCPStore("127.0.0.1", watch_ranks.port, is_master=False).set("plaintrain/alive/1", "1 0.2")
    assert wait_for(lambda: ended)
    assert "error: rank 1 gives no sign of life" in capfd.readouterr().err


def test_a_watch_that_was_stopped_ends_nothing(watch_ranks):
    (first,), ended = watch_ranks(0)
    first.stop()
    first._fail("it was too late for that")
    assert not ended and not first._failure()
