"""Results for people: the table, the change since the last evaluation, and results.json."""

import json
import math

from plaintrain.evaluation import report_results
from plaintrain.evaluation.predictions import format_results
from plaintrain.utils.files import read_results_file

BEFORE = {"bbox": {"AP": 50.0, "AP50": math.nan, "AP-cat": 1.0}, "segm": {"AP": 3.0}}
NOW = {"bbox": {"AP": 51.25, "AP50": 70.0, "AP-cat": 2.0}, "segm": {"AP": 2.5}}


def test_results_are_shown_with_the_change_since_the_last_of_their_dataset(tmp_path, log):
    folder = str(tmp_path / "new")
    report_results("cells", BEFORE, folder)
    # The console shows them once; only log.txt has the line for spreadsheets.
    assert "results on cells:\n" in log.text and "copypaste" not in log.text
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written == {"cells": {"bbox": {"AP": 50.0, "AP50": None, "AP-cat": 1.0}, "segm": {"AP": 3.0}}}
    report_results("cars", NOW, folder)
    assert "change" not in log.text
    report_results("cars", NOW, folder)
    assert "results on cars, and the change since the last evaluation:" in log.text
    (record,) = [r for r in log.records if "change" in r.getMessage()]
    assert record.getMessage().count("+0.00") == 3


def test_changes_stand_below_their_numbers():
    lines = format_results(NOW, BEFORE).splitlines()
    assert [line.split() for line in lines] == [
        ["AP", "AP50"],
        ["----", "-----", "-----"],
        ["bbox", "51.25", "70.00"],
        ["+1.25"],
        ["AP"],
        ["----", "-----"],
        ["segm", "2.50"],
        ["-0.50"],
    ]
    assert lines[3].index("+1.25") == lines[2].index("51.25")


def test_a_file_that_holds_no_results_is_as_none(tmp_path):
    for text in ("", "{", "[1]", '{"cells": 3}', '{"cells": {"bbox": 1}}', "null"):
        (tmp_path / "results.json").write_text(text)
        assert not any(read_results_file(str(tmp_path)).values())
        report_results("cells", NOW, str(tmp_path))
        assert "cells" in read_results_file(str(tmp_path))


def test_other_ranks_say_and_write_nothing(tmp_path, log, monkeypatch):
    monkeypatch.setattr("plaintrain.utils.comm.get_rank", lambda: 1)
    report_results("cells", NOW, str(tmp_path))
    assert log.text == "" and list(tmp_path.iterdir()) == []
