"""What a run has left in its folder, and its curves: run_folder, run_facts, curves."""

import json
import math
import os
import subprocess
import sys

import pytest
from report_helpers import make_run

from plaintrain.analysis import run_folder
from plaintrain.config import get_cfg
from plaintrain.engine.run_facts import write_run_facts
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import read_starts
from plaintrain.visualization.curves import group_panels, smooth, wants_log


def test_metrics_are_series_and_what_is_cut_off_is_left_out(tmp_path):
    assert run_folder.read_metrics(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("iteration,a,b\n1,2.5,\n3,,4\n5,6,\n6,6\n7")
    assert run_folder.read_metrics(tmp_path) == {"a": ([1, 5], [2.5, 6.0]), "b": ([3], [4.0])}
    for text in ("a,b\n1,2\n", "iteration,a\0\n\0,1\n", "", f"iteration,a\n{'9' * 5000},{'9' * 400}\n"):
        (tmp_path / "metrics.csv").write_text(text)
        assert run_folder.read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").write_text(f'{{"iteration": 1, "a": {10**400}}}\n{{"iteration": {10**400}}}')
    assert math.isnan(run_folder.read_metrics(tmp_path)["a"][1][0])
    lines = ['{"iteration": 1, "a": 1, "text": "x"}', '{"iteration": 3, "a": null, "b": 2}', "5", "{}"]
    lines += ['{"iteration": 1, "a": 7}', '{"iteration": 5, "a": 1']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    series = run_folder.read_metrics(tmp_path)
    assert set(series) == {"a", "b"} and series["b"] == ([3], [2.0])
    assert series["a"][0] == [1, 3] and series["a"][1][0] == 7 and math.isnan(series["a"][1][1])


def test_a_whole_run_its_warnings_and_the_names_of_it_and_its_results(tmp_path):
    assert run_folder.split_result("bbox/AP") == ("", "bbox", "AP")
    assert run_folder.split_result("my/set/segm/AP-a/b") == ("my/set", "segm", "AP-a/b")
    assert run_folder.split_result("val/total_loss") is None and run_folder.split_result("lr") is None
    folder = make_run(tmp_path / "run")
    metrics = run_folder.read_metrics(folder)
    assert len(metrics["lr"][0]) == 100
    assert run_folder.get_run_state(folder, metrics) == ("finished", 199, 200)
    assert run_folder.read_config(folder).DATASETS.TEST == ("report_val",)
    assert run_folder.list_test_sets(folder) == ["report_val"]
    assert run_folder.find_predictions(folder, "report_val").endswith("coco_instances_results.json")
    scores = run_folder.read_run_results(folder)["report_val"]["bbox"]
    assert scores["AP50"] == 20.9 and scores["APl"] is None
    # Sections that are none count as empty.
    (tmp_path / "run" / "config.yaml").write_text("DATASETS: 3\nSOLVER: [1]\nOUTPUT_DIR: here\n")
    assert run_folder.read_config_tree(folder) == {"OUTPUT_DIR": "here"}
    assert run_folder.list_test_sets(folder) == ["report_val"]
    assert run_folder.get_run_state(folder, metrics).max_iter == 0
    assert run_folder.get_run_names(["/a/x", "/b/y"]) == ["x", "y"]
    assert run_folder.get_run_names(["/a/x", "b/x"]) == ["/a/x", "b/x"]
    for other, words in ((tmp_path / "nowhere", "no folder"), (tmp_path, "not a run folder")):
        with pytest.raises(UserError, match=words):
            run_folder.check_run(other)
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        run_folder.read_config(tmp_path)
    # Warnings that differ in numbers are counted together, over all ranks.
    warning, other = run_folder.read_warnings(folder)
    assert warning["text"] == "3 boxes are odd\nand so on" and warning["level"] == "WARNING"
    assert warning["count"] == 2 and warning["last"] == "11/27 05:46:58" and warning["files"] == ["log.txt"]
    assert other["files"] == ["log.txt.rank1"]


def test_the_state_of_a_run_is_in_its_lock_and_its_log(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    (folder / "last_checkpoint").write_text("model_0000009.pth")

    def state(alive):
        monkeypatch.setattr(run_folder, "is_in_use", lambda folder: alive)
        return run_folder.get_run_state(folder, {}).name

    assert [state(True), state(False)] == ["running", "interrupted"]
    # Of another machine only the age of the log tells.
    assert state(None) == "running"
    for name in ("log.txt", "log.txt.rank1"):
        os.utime(folder / name, (0, 0))
    assert state(None) == "interrupted"


def test_curves_are_smoothed_and_logarithmic():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2, 2, 2])
    assert smooth([0.0, 1.0], 0.5) == pytest.approx([0, 2 / 3])
    assert smooth([1.0, math.nan, 1.0], 0.5) == pytest.approx([1, 1, 1])
    assert smooth([1.0, 5.0], 0) == [1, 5]
    # One that falls far is logarithmic.
    assert wants_log([{"y": [100.0, 10.0, 1.0]}])
    assert not any(wants_log([{"y": y}]) for y in ([2.0, 1.0], [100.0, 0.0], []))


def test_panels_group_the_metrics_of_one_run_and_the_runs_of_each_metric():
    series = ([1, 3], [1.0, 2.0])
    names = ["total_loss", "loss_cls", "val/total_loss", "d/bbox/AP", "d/bbox/AP50", "d/bbox/APs"]
    names += ["d/bbox/AP-dog", "lr", "time", "data_time", "epoch"]
    metrics = dict.fromkeys(names, series)
    assert {p["title"]: [line["label"] for line in p["lines"]] for p in group_panels({"a": metrics})} == {
        "loss": ["total_loss", "loss_cls"],
        "validation loss": ["total_loss"],
        "AP, bbox on d": ["AP", "AP50"],
        "AP by class, bbox on d": ["dog"],
        "learning rate": ["lr"],
        "seconds per iteration": ["time", "data_time"],
    }
    (lr,) = (p for p in group_panels({"a": metrics, "b": {"lr": series}}) if p["title"] == "lr")
    assert [(line["label"], line["color"]) for line in lr["lines"]] == [("a", 0), ("b", 1)]
    chosen = group_panels({"a": metrics}, ["*/APs", "loss_*"])
    assert [p["title"] for p in chosen] == ["loss", "AP, bbox on d"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(config, config file) of a run whose script is in a folder of its own."""
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\n")
    (tmp_path / "my.yaml").write_text("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25}\n")
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "code" / "train.py"), "--config-file", "my.yaml"])
    cfg = get_cfg()
    cfg.merge_from_file(tmp_path / "my.yaml")
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", ("cells",)])
    return cfg, str(tmp_path / "my.yaml")


def test_starts_are_added_with_their_changes_from_the_base_files_or_the_defaults(run, tmp_path):
    cfg, path = run
    write_run_facts(cfg, path)
    cfg.SOLVER.MAX_ITER = 9
    for name in (path, "", "gone.yaml"):
        write_run_facts(cfg, name)
    first, second, *without = read_starts(cfg.OUTPUT_DIR)
    assert first["changes"] == [
        ["DATASETS.TRAIN", [], ["cells"]],
        ["OUTPUT_DIR", "./output", cfg.OUTPUT_DIR],
        ["SOLVER.BASE_LR", 0.5, 0.25],
    ]
    assert first["command"] == ["python", *sys.argv] and first["world_size"] == 1
    assert first["environment"]["python"] == sys.version.split()[0]
    assert first["git"] is None and first["started"][:2] == "20" and first["config_file"] == path
    assert second["changes"] == [*first["changes"], ["SOLVER.MAX_ITER", 7, 9]]
    for start in without:
        keys = [key for key, *_ in start["changes"]]
        assert keys == ["DATASETS.TRAIN", "OUTPUT_DIR", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"]
    # A damaged file is as none.
    for text in ("", "{", "[]", '{"starts": 3}', '{"starts": [3]}', '{"starts": [[]]}'):
        (tmp_path / "run.json").write_text(text)
        assert read_starts(str(tmp_path)) == []
        write_run_facts(*run)
        assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_the_state_of_the_code_is_that_of_the_folder_of_the_script(run, tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path / "code"), *who, *words], check=True, capture_output=True)

    git("init", "-q", "-b", "idea")
    (tmp_path / "code" / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "code" / "train.py").write_text("2")
    (tmp_path / "code" / "notes.txt").write_text("mine")
    write_run_facts(*run)
    # Of a machine without git nothing is known.
    monkeypatch.setenv("PATH", "")
    write_run_facts(*run)
    state, unknown = (start["git"] for start in read_starts(run[0].OUTPUT_DIR))
    assert state["branch"] == "idea" and state["changed_files"] == ["train.py"] and len(state["commit"]) == 40
    assert unknown is None
