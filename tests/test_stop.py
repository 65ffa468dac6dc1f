"""Ending a run before its end: plaintrain.utils.stop."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from plaintrain.utils import comm
from plaintrain.utils.stop import Stopped, StopSignal, end_evaluation_if_requested, is_requested


def send(number):
    os.kill(os.getpid(), number)


def test_stop_signal_ends_a_run_after_max_time_or_a_signal_on_any_rank(clock, log, monkeypatch):
    made, endless = [], StopSignal()
    with StopSignal(5.0) as stop_signal:
        for clock.now in (1000.0, 1004.9, 1005.0, 1100.0):
            made.append(stop_signal.requested_on_any_rank())
    assert made == [False, False, True, True] and not endless.requested_on_any_rank()
    assert log.text.count("SOLVER.MAX_TIME of 5 s is over") == 2 and "--resume" in log.text
    stop_signal, asked = StopSignal(5.0), []
    # The other rank has SIGHUP, which is 1.
    monkeypatch.setattr(
        comm, "all_reduce_max", lambda number: asked.append(number) or max(number, 2 * signal.SIGHUP)
    )
    with pytest.raises(Stopped) as stopped, stop_signal:
        assert stop_signal.requested_on_any_rank()
        clock.now += 6.0
        assert stop_signal.requested_on_any_rank()
    assert asked == [0, 1] and stopped.value.code == 129


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_only_sets_a_request_and_logs_how_to_continue(number, log, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, StopSignal() as stop_signal:
        assert not stop_signal.requested_on_any_rank() and not is_requested()
        send(number)
        assert is_requested() and stop_signal.requested_on_any_rank() and stop_signal.requested_on_any_rank()
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert f"{number.name}: stopped with a checkpoint; continue with --resume" in log.text
    assert capfd.readouterr().err.count("stopping after this step") == 1
    assert not is_requested()


def test_stop_signal_works_without_a_console(monkeypatch):
    def broken():
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(fileno=broken))
    with pytest.raises(Stopped), StopSignal() as stop_signal:
        send(signal.SIGINT)
        assert stop_signal.requested_on_any_rank()


def test_stop_signal_ignores_sighup_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop_signal:
            send(signal.SIGHUP)
            assert not stop_signal.requested_on_any_rank()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_end_evaluation_if_requested_stops_only_after_a_signal(log):
    end_evaluation_if_requested()
    with pytest.raises(Stopped) as stopped, StopSignal():
        end_evaluation_if_requested()
        send(signal.SIGUSR1)
        end_evaluation_if_requested()
        pytest.fail("continued")
    assert stopped.value.code == 138 and "--resume" in log.text
    with StopSignal():
        send(signal.SIGTERM)
    with pytest.raises(KeyError), StopSignal() as stop_signal:
        send(signal.SIGTERM)
        assert stop_signal.requested_on_any_rank()
        raise KeyError


def test_second_sigint_ends_at_once_but_not_a_duplicate_of_the_first(clock, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignal():
        send(signal.SIGINT)
        clock.now += 0.3
        send(signal.SIGINT)
        clock.now += 1.0
        send(signal.SIGTERM)
        assert codes == []
        send(signal.SIGINT)
    assert codes == [130]
