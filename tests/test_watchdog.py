"""Failed and hanging ranks: plaintrain.utils.heartbeat and plaintrain.engine.watchdog."""

import sys
import threading
import time
from contextlib import closing

import pytest
import torch.distributed as dist

from plaintrain.engine import watchdog
from plaintrain.engine.watchdog import FailureWatch
from plaintrain.utils import heartbeat


@pytest.fixture(autouse=True)
def no_heartbeat():
    yield
    heartbeat.set_limit(0)
    heartbeat.rest()


def test_heartbeat_is_overdue_after_the_limit_and_only_where_one_is_expected(clock):
    heartbeat.set_limit(5)
    clock.now += 100.0
    assert not heartbeat.is_overdue()
    for extra in (0.0, heartbeat.LONG):
        heartbeat.beat(extra)
        clock.now += 4 + extra
        assert not heartbeat.is_overdue()
        clock.now += 2
        assert heartbeat.is_overdue() and heartbeat.get_limit() == 5 + extra
    heartbeat.forgive(2)
    assert not heartbeat.is_overdue()
    heartbeat.set_limit(0)
    heartbeat.beat()
    clock.now = 1e9
    assert not heartbeat.is_overdue()


@pytest.fixture
def watch_ranks(monkeypatch):
    """Function (ranks of two machines) -> their watches, in one process, and the codes that ended them."""
    ended, made = [], []
    monkeypatch.setattr(watchdog, "end_at_once", lambda code: ended.append(code) or sys.exit())
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "_CLOCK_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "_CONNECTION_SECONDS", 1.0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = ("127.0.0.1", store.port)

    def start(*ranks):
        for rank in ranks:
            job = {"rank": rank, "machine": rank, "local_rank": 0, "world_size": len(ranks)}
            made.append(FailureWatch({**job, "address": address}))
        return made, ended

    yield start
    for each in made:
        each.close()
        for thread in each._threads:
            # One that outlives this block would end the process that runs the tests.
            thread.join(timeout=60)
            assert not thread.is_alive()
    del store


def wait_for(condition):
    return any(condition() or threading.Event().wait(0.05) for _ in range(200))


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ValueError("connection reset"), False),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
    ],
)
def test_first_failure_is_printed_and_what_another_caused_waits_for_it(watch_ranks, capfd, error, waits):
    (first, second), ended = watch_ranks(0, 1)
    other = threading.Timer(0.3, lambda: first.fail(KeyError(), "first"))
    other.start()
    with pytest.raises(SystemExit):
        second.fail(error, "second" if not waits else str(error))
    other.join()
    assert wait_for(lambda: len(ended) >= 2)
    shown = (
        {"rank 0: first", "rank 0 failed: first"} if waits else {"rank 1: second", "rank 1 failed: second"}
    )
    assert set(capfd.readouterr().err.splitlines()) == shown


def test_lost_connection_without_a_report_is_the_failure(watch_ranks, capfd):
    (watch,), _ = watch_ranks(0)
    with pytest.raises(SystemExit):
        watch.fail(RuntimeError("connection closed"), "connection closed")
    first, second, position = capfd.readouterr().err.splitlines()
    assert first == "rank 0: lost the connection to a rank that has reported no failure"
    assert second == "connection closed" and position.startswith("rank 0 failed in")


def test_rank_that_hangs_ends_the_job_and_each_says_where_it_stands(watch_ranks, capfd):
    _, ended = watch_ranks(0, 1)
    heartbeat.set_limit(0.2)
    heartbeat.beat()
    texts = []
    assert wait_for(lambda: texts.append(capfd.readouterr().err) or "rank 1 is in" in "".join(texts))
    assert len(ended) >= 1 and "no step was finished within 0.2 s (HANG_TIMEOUT)" in "".join(texts)
    assert "rank 0 is in" in "".join(texts) and "test_watchdog.py, line" in "".join(texts)


def test_single_process_is_watched_but_not_in_a_debugger(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(watchdog, "end_at_once", lambda code: ended.append(code) or sys.exit())
    monkeypatch.setattr(watchdog, "_CLOCK_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    heartbeat.set_limit(0.2)
    with closing(FailureWatch({"machine": 0, "world_size": 1})):
        with monkeypatch.context() as debugger:
            debugger.setattr(watchdog, "_DEBUGGERS", {__name__})
            heartbeat.beat()
            assert not threading.Event().wait(0.6) and ended == []
        assert wait_for(lambda: ended == [1])
    assert "rank 0: no step was finished within 0.2 s (HANG_TIMEOUT)\nrank 0 is in" in capfd.readouterr().err
    assert not heartbeat.is_overdue()


def test_time_in_which_the_process_was_stopped_does_not_count(watch_ranks, monkeypatch):
    _, ended = watch_ranks(0)
    heartbeat.set_limit(5)
    heartbeat.beat()
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 100)
    threading.Event().wait(0.5)
    assert ended == []


def test_watch_that_was_stopped_ends_nothing(watch_ranks):
    (first, second), ended = watch_ranks(0, 1)
    first.close()
    with pytest.raises(SystemExit):
        second.fail(ValueError(), "it was too late for that")
    assert ended == [1]
