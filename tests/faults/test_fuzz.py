"""A short run of the fuzzer, and that it finds what it is there to find."""

import pytest
from fuzz_readers import READERS, fuzz, why_unclear
from mutations import mutate

from plaintrain.utils.errors import UserError


@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_a_reader_gives_records_or_a_clear_error(name):
    report = fuzz(name, 200, seed=7)
    assert report.foreign + report.unclear == []
    assert report.counts.total() == 200
    # Both happen often enough for the run to mean something.
    assert report.counts["ok"] >= 5 and report.counts["refused"] >= 60
    assert report.slowest < 5


def test_files_that_are_not_changed_are_accepted(monkeypatch):
    monkeypatch.setattr("fuzz_readers.mutate", lambda path, data, rng: data)
    for name in READERS:
        assert fuzz(name, 2).counts == {"ok": 2}, name


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("config", "plaintrain.config._wrong_type"),
        ("coco", "plaintrain.data.coco.image_mistake"),
        ("results", "plaintrain.data.coco._complete"),
        ("voc", "plaintrain.data.voc._annotation"),
        ("yolo", "plaintrain.data.yolo._in_pixels"),
        ("image", "plaintrain.data.images.ImageOps.exif_transpose"),
    ],
)
@pytest.mark.parametrize("error", [KeyError, MemoryError])
def test_a_reader_that_raises_something_else_is_reported(monkeypatch, name, function, error):
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise error("seeded")

    monkeypatch.setattr(function, broken)
    report = fuzz(name, 30)
    assert calls and report.foreign and "seeded" in report.foreign[0] and error.__name__ in report.foreign[0]
    # The line says how to repeat it.
    assert f"--reader {name} --first " in report.foreign[0]
    number = int(report.foreign[0].split("--first ")[1].split(":")[0])
    assert len(fuzz(name, 1, first=number).foreign) == 1


@pytest.mark.parametrize(
    ("message", "word"), [("it is wrong", "names neither"), ("a.json\n", "one line"), ("", "one line")]
)
def test_an_error_that_says_nothing_is_reported(monkeypatch, tmp_path, message, word):
    class PlainError(UserError):
        def __init__(self):
            ValueError.__init__(self, f"{message}\nand more" if message.endswith("\n") else message)

    def broken(*_):
        raise PlainError

    monkeypatch.setattr("plaintrain.data.voc._record", broken)
    report = fuzz("voc", 20)
    assert report.unclear and word in report.unclear[0] and not report.foreign
    assert "1501 characters" in why_unclear("x" * 1501, tmp_path)


def test_a_reader_that_hangs_is_reported(monkeypatch):
    def endless(*_):
        while True:
            pass

    monkeypatch.setattr("fuzz_readers.MAX_SECONDS", 0.1)
    monkeypatch.setattr("plaintrain.data.yolo._class_names", endless)
    report = fuzz("yolo", 2)
    assert len(report.foreign) == 2 and "TimeoutError" in report.foreign[0]


def test_the_inputs_are_the_same_each_time_and_differ(monkeypatch):
    made = []

    def note(path, data, rng):
        made[-1].append(mutate(path, data, rng))
        return made[-1][-1]

    monkeypatch.setattr("fuzz_readers.mutate", note)
    for seed in (1, 1, 2):
        made.append([])
        fuzz("yolo", 40, seed)
    assert made[0] == made[1] != made[2]
    assert len(set(made[0])) > 0.8 * len(made[0])
