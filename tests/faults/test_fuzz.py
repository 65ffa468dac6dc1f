"""A short run of the fuzzer, and that it finds what it is there to find."""

import pytest
from fuzz_readers import READERS, fuzz, why_unclear

from plaintrain.utils.errors import UserError

# A smoke test has few inputs.
SIZES = [*((name, 60) for name in READERS), *(pytest.param(n, 300, marks=pytest.mark.long) for n in READERS)]


@pytest.mark.parametrize(("name", "inputs"), SIZES)
def test_readers_give_records_or_a_clear_error_whatever_a_file_holds(name, inputs):
    report = fuzz(name, inputs, seed=7)
    assert report.foreign + report.unclear == []
    assert report.counts.total() == inputs and report.slowest < 5
    # Both happen often enough for the run to mean something.
    assert report.counts["refused"] >= 0.3 * inputs and (inputs < 300 or report.counts["ok"] >= 5)


def test_unchanged_files_are_accepted(monkeypatch):
    monkeypatch.setattr("fuzz_readers.mutate", lambda path, data, rng: data)
    for name in READERS:
        assert fuzz(name, 2).counts == {"ok": 2}, name


@pytest.mark.parametrize(
    ("name", "function", "error"),
    [
        ("config", "plaintrain.config.config._describe_wrong_type", KeyError),
        ("coco", "plaintrain.data.datasets.coco.image_mistake", MemoryError),
        ("image", "plaintrain.data.images.ImageOps.exif_transpose", KeyError),
    ],
)
def test_errors_of_other_types_are_reported_with_the_input_to_repeat(monkeypatch, name, function, error):
    def broken(*_, **__):
        raise error("seeded")

    monkeypatch.setattr(function, broken)
    line = fuzz(name, 30).foreign[0]
    assert "seeded" in line and error.__name__ in line and f"--reader {name} --first " in line
    number = int(line.split("--first ")[1].split(":")[0])
    assert len(fuzz(name, 1, first=number).foreign) == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [("it is wrong", "names neither"), ("a.json\nand more", "one line"), ("", "one line")],
)
def test_unclear_errors_are_reported(monkeypatch, tmp_path, message, words):
    class PlainError(UserError):
        def __init__(self):
            ValueError.__init__(self, message)

    def broken(*_):
        raise PlainError

    monkeypatch.setattr("plaintrain.data.datasets.voc._record", broken)
    report = fuzz("voc", 20)
    assert report.unclear and words in report.unclear[0] and not report.foreign
    assert "1501 characters" in why_unclear("x" * 1501, tmp_path)


def test_readers_that_hang_are_reported(monkeypatch):
    def endless(*_):
        while True:
            pass

    monkeypatch.setattr("fuzz_readers.MAX_SECONDS", 0.1)
    monkeypatch.setattr("plaintrain.data.datasets.yolo._class_names", endless)
    report = fuzz("yolo", 2)
    assert len(report.foreign) == 2 and "TimeoutError" in report.foreign[0]
