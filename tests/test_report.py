"""The HTML report: what it says, what it does without, and that nothing in it is taken for HTML."""

import os
import re
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest
import torch
from report_helpers import EVIL, full_report, make_run
from script_helpers import assert_refused, script_output

from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.report import build, detections, runs
from plaintrain.report.build import SECTIONS, build_report, format_value, load_template

_EMPTY = {"meta", "link", "img"}


class Outline(HTMLParser):
    """The text of each section, the elements by name, and what is not closed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.sections, self.elements, self.wrong = [], {}, [], []
        self.section = ""
        self.feed(content)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in _EMPTY and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] = self.sections.get(self.section, "") + " " + data.strip()

    def named(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def report_of(tmp_path, *folders):
    path, before = tmp_path / "report.html", torch.get_rng_state()
    build_report([str(f) for f in folders], str(path))
    assert torch.equal(torch.get_rng_state(), before)
    return Outline(path.read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Sections without the drawing, which takes seconds."""
    monkeypatch.setattr(build, "convert_to_svg", lambda figure: "<svg></svg>")
    for module in (detections, runs):
        for name in {"draw_bars", "draw_curves", "draw_matrix", "draw_xy"} & set(vars(module)):
            monkeypatch.setattr(module, name, lambda *args, **kwargs: None)


def test_the_report_of_a_run_has_all_sections_fetches_nothing_and_escapes_names():
    content = full_report().read_text()
    found = Outline(content)
    assert not found.wrong and len(content) < 1e6
    assert 'lang="en"' in content and "width=device-width" in content
    assert list(found.sections) == [id_ for id_, *_ in SECTIONS]
    assert not re.search("cannot be|not available|failed", " ".join(found.sections.values()))
    for section, words in {
        "summary": ["200 of 200", "19.9", "20.9", "12 images", "GeneralizedRCNN"],
        "run": ["torch", "9.9", "abc", "my.yaml", "SOLVER.BASE_LR", "1 times; first"],
        "curves": ["learning rate", "AP by class", "loss"],
        "scores": ["AP75", "–"],
        "errors": ["localization", "delta AP50"],
        "confusion": ["prediction", "background"],
        "calibration": ["dashed: ideal"],
        "thresholds": ["all classes"],
        "groups": ["Crowdedness"],
        "gallery": ["F1", "detections"],
        "data": ["report_train", "train", "report_val", "test", "64 x 64", "width / height"],
        "timing": ["0.5", " 2 ", "32", "0:01:40"],
        "warnings": ["3 boxes are odd", "2"],
    }.items():
        for word in words:
            assert word in found.sections[section], (section, word)
    images = found.named("img")
    assert len(images) >= 4 and all(i["src"].startswith("data:image/jpeg;base64,") for i in images)
    assert all(i["alt"] for i in images)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    # Nothing is fetched.
    for name, attributes in found.elements:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (name, attributes[key][:80])
    # Names of classes and files are text.
    assert len(found.named("script")) == 1
    for section in ("run", "curves", "scores", "confusion", "thresholds", "data", "warnings"):
        assert EVIL in found.sections[section], section
    assert "<script>.png" in found.sections["gallery"]
    assert "<script>alert" not in content and "<script>.png" not in content


def test_what_is_missing_is_said_and_the_rest_is_there(tmp_path, undrawn):
    folder = make_run(tmp_path / "run")
    results = [f"inference/report_val/{name}.json" for name in ("results", "coco_instances_results")]
    for name in ("metrics.json", "last_checkpoint", *results):
        (folder / name).unlink()
    for name in ("log.txt", "log.txt.rank1"):
        os.utime(folder / name, (0, 0))
    found = report_of(tmp_path, folder)
    assert "not trained" in found.sections["summary"] and "no scores yet" in found.sections["summary"]
    assert "LOG_PERIOD" in found.sections["curves"]
    assert "TEST.EVAL_PERIOD" in found.sections["scores"]
    for section in ("errors", "confusion", "calibration", "thresholds", "groups", "gallery"):
        assert "holds no predictions for report_val" in found.sections[section]
        assert "scripts/test_net.py" in found.sections[section]
    assert "3 boxes are odd" in found.sections["warnings"]


def test_a_dataset_that_is_not_here_costs_only_its_sections(tmp_path, undrawn):
    folder = make_run(tmp_path / "run")
    missing = "report_val: {FORMAT: voc, ROOT: /nowhere, SPLIT: val}"
    config = re.sub(r"report_val: \{.*?\}", missing, (folder / "config.yaml").read_text(), flags=re.S)
    (folder / "config.yaml").write_text(config)
    DatasetCatalog.remove("report_val")
    MetadataCatalog.remove("report_val")
    found = report_of(tmp_path, folder)
    assert "/nowhere" in found.sections["errors"] and "/nowhere" in found.sections["gallery"]
    assert "19.9" in found.sections["scores"]


def test_a_section_that_fails_says_so_and_the_others_are_made(tmp_path, monkeypatch, log):
    broken = Mock(side_effect=ZeroDivisionError("by <b>nothing</b>"))
    sections = (("run", "A", broken), ("summary", "B", runs.build_summary))
    monkeypatch.setattr("plaintrain.report.build.SECTIONS", sections)
    found = report_of(tmp_path, make_run(tmp_path / "run"))
    assert "This section failed: ZeroDivisionError: by <b>nothing</b>" in found.sections["run"]
    assert "Finished" in found.sections["summary"]
    assert "the section 'A' of the report failed" in log.text


def test_several_runs_are_compared(tmp_path, undrawn):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", offset=5.0, seed=1, SOLVER__BASE_LR=0.25)
    found = report_of(tmp_path, one, two)
    assert not found.wrong
    assert "gallery" not in found.sections
    assert "SOLVER.BASE_LR" in found.sections["run"] and "0.25" in found.sections["run"]
    assert "OUTPUT_DIR" not in found.sections["run"].split("Starts")[0]
    for section in ("summary", "errors", "calibration", "thresholds", "timing", "warnings"):
        assert "one" in found.sections[section] and "two" in found.sections[section], section
    content = (tmp_path / "report.html").read_text()
    # The better of both is marked.
    lower, higher = '"number" data-value="19.9">19.9</td>', '"number best" data-value="24.9">'
    assert f"<td class={lower}<td class={higher}" in content[content.index('id="scores"') :]


def test_cells_of_a_table_are_escaped_and_sortable_and_numbers_short():
    template = load_template()
    shown = template.table(["n<", "x", "y"], [["a<", 1.5, runs.Best(10)], [None, None, float("nan")]], "<c>")
    assert '<th scope="col" class="number" aria-sort="none"><button type="button">x</button></th>' in shown
    assert "<td>a&lt;</td>" in shown and "<td>–</td>" in shown and '<td class="number">–</td>' in shown
    assert '<td class="number best" data-value="10.0">10</td>' in shown
    assert "<caption>&lt;c&gt;</caption>" in shown and 'aria-label="&lt;c&gt;"' in shown
    assert "<button" not in template.table(["a"], [["b"]], sortable=False)
    values = {1234567.0: "1,234,567", 0.00012346: "0.0001235", 12.0: "12", None: "–", float("inf"): "–"}
    assert [format_value(value) for value in values] == [*values.values()]
    assert [template.score(v) for v in (12.345, None, float("nan"))] == ["12.3", "–", "–"]
    assert [type(v) is runs.Best for v in runs.mark_best([1.0, 2.0, None])] == [False, True, False]


def test_script_reports_on_a_folder_with_only_a_log_and_refuses_what_is_no_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("")
    assert str(folder / "report.html") in script_output("report.py", folder, folder=tmp_path)
    found = Outline((folder / "report.html").read_text())
    assert not found.wrong and "no config.yaml" in found.sections["run"]
    assert "There is no test set" in found.sections["errors"]
    assert_refused("report.py", [folder, tmp_path], "is not a run folder", tmp_path, codes=[1])


def test_busiest_classes_are_those_of_most_confusions(monkeypatch):
    monkeypatch.setattr(detections, "_MAX_MATRIX_CLASSES", 1)
    counts = [[9, 0, 0, 0, 0], [0, 2, 1, 0, 0], [0, 0, 3, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    confusion = {"labels": ["a", "b", "c", "other error", "background"], "counts": counts}
    labels, counts, _ = detections._select_confused(confusion)
    assert labels == ["b", "other error", "background"]
    assert counts.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_calibration_draws_the_precision_over_the_score(monkeypatch):
    draw = Mock()
    monkeypatch.setattr(detections, "draw_xy", draw)
    monkeypatch.setattr(detections, "draw_bars", Mock())
    keys = ("low", "high", "score", "precision", "count")
    bins = [dict(zip(keys, values, strict=True)) for values in ((0, 0.5, 0.2, 0.1, 3), (0.5, 1, 0.7, 0.9, 0))]
    analysis = {"calibration": {"bins": bins, "expected_error": 0.1}}
    run = Mock(color=0, test_sets=["cells"], analyses={"cells": analysis}, problems={})
    run.name = "a"
    detections.build_calibration([run])
    (line,) = draw.call_args.args[0]
    assert (line["x"], line["y"]) == ([0.2], [0.1])
