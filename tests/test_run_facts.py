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


def test_starts_are_added_with_their_changes_from_the_base_files_or_the_defaults(run):
    cfg, path = run
    write_run_facts(cfg, path)
    cfg.SOLVER.MAX_ITER = 9
    for name in (path, "", "gone.yaml"):
        write_run_facts(cfg, name)
    first, second, *without = recorded_starts(cfg.OUTPUT_DIR)
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


def test_a_damaged_file_is_as_none(run, tmp_path):
    for text in ("", "{", "[]", '{"starts": 3}', '{"starts": [3]}'):
        (tmp_path / "run.json").write_text(text)
        assert recorded_starts(str(tmp_path)) == []
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
    state, unknown = (start["git"] for start in recorded_starts(run[0].OUTPUT_DIR))
    assert state["branch"] == "idea" and state["changed_files"] == ["train.py"] and len(state["commit"]) == 40
    assert unknown is None
