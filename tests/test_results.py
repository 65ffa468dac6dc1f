"""Results for people: the table, the change since the last evaluation, and results.json."""

import json
import math

import pytest

from plaintrain.evaluation import report_results
from plaintrain.evaluation.results import read_results_file, results_table

BEFORE = {"bbox": {"AP": 50.0, "AP50": math.nan, "AP-cat": 1.0}, "segm": {"AP": 3.0}}
NOW = {"bbox": {"AP": 51.25, "AP50": 70.0, "AP-cat": 2.0}, "segm": {"AP": 2.5}}


def test_the_first_results_have_no_changes(tmp_path, log):
    report_results("cells", BEFORE, str(tmp_path / "new"))
    assert "results on cells:\n" in log.text and "change" not in log.text
    assert "copypaste: 50.0000,nan" in log.text
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written == {"cells": {"bbox": {"AP": 50.0, "AP50": None, "AP-cat": 1.0}, "segm": {"AP": 3.0}}}


def test_later_results_have_the_change_since_the_last(tmp_path, log):
    folder = str(tmp_path)
    report_results("cells", BEFORE, folder)
    log.clear()
    report_results("cells", NOW, folder)
    assert "results on cells, and the change since the last evaluation:" in log.text
    assert results_table(NOW, read_results_file(folder)["cells"]).count("+0.00") == 3
    lines = results_table(NOW, BEFORE).splitlines()
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
    # Below the number that has changed.
    assert lines[3].index("+1.25") == lines[2].index("51.25")
    (record,) = [r for r in log.records if "change" in r.getMessage()]
    assert "\033[32m+1.25\033[0m" in record.colored and "\033" not in record.getMessage()
    assert "\033[31m--" not in record.colored


def test_results_of_another_dataset_are_no_earlier_ones(tmp_path, log):
    report_results("cells", BEFORE, str(tmp_path))
    log.clear()
    report_results("cars", NOW, str(tmp_path))
    assert "change" not in log.text


@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", '{"cells": 3}', '{"cells": {"bbox": 1}}', "null"])
def test_a_file_that_holds_no_results_is_as_none(tmp_path, log, text):
    (tmp_path / "results.json").write_text(text)
    assert read_results_file(str(tmp_path)) == {}
    report_results("cells", NOW, str(tmp_path))
    assert "cells" in read_results_file(str(tmp_path))


def test_other_ranks_say_and_write_nothing(tmp_path, log, monkeypatch):
    monkeypatch.setattr("plaintrain.utils.comm.get_rank", lambda: 1)
    report_results("cells", NOW, str(tmp_path))
    assert log.text == "" and list(tmp_path.iterdir()) == []
