"""A short run of the fuzzer, and that it finds what it is there to find."""

import time
from unittest.mock import Mock

import pytest
from fuzz_readers import READERS, fuzz

from plaintrain.utils.errors import UserError

# A smoke test has few inputs.
SIZES = [*((name, 60) for name in READERS), *(pytest.param(n, 300, marks=pytest.mark.long) for n in READERS)]


@pytest.mark.parametrize(("name", "inputs"), SIZES)
def test_readers_give_records_or_a_clear_error_whatever_a_file_holds(name, inputs):
    report = fuzz(name, inputs, seed=7)
    assert report.foreign + report.unclear == []
    assert report.counts.total() == inputs and report.slowest < 5
    # Both happen often enough for the run to mean something; of a report, only sections are missing.
    assert report.counts["refused"] >= 0.3 * inputs or name == "report"
    assert inputs < 300 or report.counts["ok"] >= 5


def test_unchanged_files_are_accepted(monkeypatch):
    monkeypatch.setattr("fuzz_readers.mutate", lambda path, data, rng: data)
    for name in READERS:
        assert fuzz(name, 2).counts == {"ok": 2}, name


def test_errors_of_other_types_unclear_ones_and_readers_that_hang_are_reported(monkeypatch):
    class_names = Mock(side_effect=KeyError("seeded"))
    monkeypatch.setattr("plaintrain.data.datasets.yolo._get_class_names", class_names)
    line = fuzz("yolo", 20).foreign[0]
    assert "seeded" in line and "KeyError" in line and "--reader yolo --first " in line
    number = int(line.split("--first ")[1].split(":")[0])
    assert len(fuzz("yolo", 1, first=number).foreign) == 1
    class_names.side_effect = UserError("it is wrong")
    report = fuzz("yolo", 20)
    assert "names neither" in report.unclear[0] and not report.foreign
    monkeypatch.setattr("fuzz_readers.MAX_SECONDS", 0.1)
    class_names.side_effect = lambda *_: time.sleep(100)
    assert "TimeoutError" in fuzz("yolo", 2).foreign[0]
