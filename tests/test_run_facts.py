"""run.json: what a run was started with."""

import json
import subprocess
import sys

import pytest

from plaintrain.config import get_cfg
from plaintrain.run_facts import write_run_facts
from plaintrain.run_folder import recorded_starts


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


def test_changes_are_those_from_the_base_files(run):
    write_run_facts(*run)
    (start,) = recorded_starts(run[0].OUTPUT_DIR)
    assert start["changes"] == [
        ["DATASETS.TRAIN", [], ["cells"]],
        ["OUTPUT_DIR", "./output", run[0].OUTPUT_DIR],
        ["SOLVER.BASE_LR", 0.5, 0.25],
    ]
    assert start["command"] == ["python", *sys.argv] and start["world_size"] == 1
    assert start["environment"]["python"] == sys.version.split()[0]
    assert start["git"] is None and start["started"][:2] == "20" and start["config_file"] == run[1]


@pytest.mark.parametrize("name", ["", "gone.yaml"])
def test_without_base_files_they_are_those_from_the_defaults(run, name):
    write_run_facts(run[0], name)
    keys = [key for key, *_ in recorded_starts(run[0].OUTPUT_DIR)[0]["changes"]]
    assert keys == ["DATASETS.TRAIN", "OUTPUT_DIR", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"]


def test_starts_of_a_resumed_run_are_added(run):
    cfg, path = run
    write_run_facts(cfg, path)
    cfg.SOLVER.MAX_ITER = 9
    write_run_facts(cfg, path)
    first, second = recorded_starts(cfg.OUTPUT_DIR)
    assert ["SOLVER.MAX_ITER", 7, 9] in second["changes"] and len(first["changes"]) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": 3}', '{"starts": [3]}'])
def test_a_damaged_file_is_as_none(run, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert recorded_starts(str(tmp_path)) == []
    write_run_facts(*run)
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_the_state_of_the_code_is_that_of_the_folder_of_the_script(run, tmp_path):
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
    state = recorded_starts(run[0].OUTPUT_DIR)[0]["git"]
    assert state["branch"] == "idea" and state["changed_files"] == ["train.py"] and len(state["commit"]) == 40


def test_a_machine_without_git_has_no_state(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    write_run_facts(*run)
    assert recorded_starts(run[0].OUTPUT_DIR)[0]["git"] is None
