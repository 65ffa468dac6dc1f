"""The time that a run may take: plaintrain.utils.timing."""

import pytest

from plaintrain.utils import comm, timing
from plaintrain.utils.timing import TimeLimit


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is what time.monotonic() says."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(timing.time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_time_counts_from_when_the_limit_is_made(clock, log):
    limit = TimeLimit(5.0)
    found = []
    for clock.now in (1000.0, 1004.9, 1005.0, 1100.0):
        found.append(limit.is_over())
    assert found == [False, False, True, True]
    assert log.text.count("SOLVER.MAX_TIME of 5 s is over") == 2 and "--resume" in log.text


def test_nothing_is_said_before_the_time_is_over(clock, log):
    assert not TimeLimit(5.0).is_over()
    assert log.text == ""


def test_without_a_limit_the_time_is_never_over_and_the_ranks_need_not_agree(clock, log, monkeypatch):
    monkeypatch.setattr(comm, "any_rank", lambda flag: pytest.fail("asked the other ranks"))
    limit = TimeLimit()
    clock.now = 1e12
    assert not limit.is_over() and not TimeLimit(0.0).is_over()
    assert log.text == ""


def test_the_time_is_over_when_it_is_over_on_any_rank(clock, monkeypatch):
    limit, asked = TimeLimit(5.0), []
    monkeypatch.setattr(comm, "any_rank", lambda flag: asked.append(flag) or True)
    assert limit.is_over()
    clock.now = 1006.0
    assert limit.is_over()
    assert asked == [False, True]
