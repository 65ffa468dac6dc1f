"""plaintrain.engine.run_facts: the report that a training starts at its end, in a process of its own."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from report_helpers import make_run

from plaintrain.config import get_cfg
from plaintrain.engine.run_facts import write_report
from plaintrain.utils import comm
from plaintrain.utils.lock import is_in_use, lock_folder


@pytest.fixture
def cfg(tmp_path):
    """The config of a finished run, whose folder this process holds."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(make_run(tmp_path / "run"))
    (tmp_path / "run" / "model_final.pth").touch()
    lock_folder(cfg.OUTPUT_DIR)
    return cfg


@pytest.fixture
def commands(monkeypatch):
    """The commands that are started; they end well."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize("why_not", ["", "off", "other rank", "stopped"])
def test_report_is_written_once_the_run_has_finished(cfg, tmp_path, commands, monkeypatch, log, why_not):
    cfg.OUTPUT.REPORT = why_not != "off"
    monkeypatch.setattr(comm, "is_main_process", lambda: why_not != "other rank")
    if why_not == "stopped":
        (tmp_path / "run" / "last_checkpoint").write_text("model_0000099.pth")
        (tmp_path / "run" / "model_0000099.pth").touch()
    write_report(cfg)
    command = [sys.executable, "-P", "-m", "plaintrain.report", cfg.OUTPUT_DIR]
    assert commands == ([] if why_not else [command]) and ("report.html" in log.text) == (not why_not)


def test_report_shows_a_finished_run_that_nobody_holds(cfg, tmp_path, log):
    write_report(cfg)
    assert "Finished: " in (tmp_path / "run" / "report.html").read_text()
    assert "the report of this run is in" in log.text
    # Closing the file would have let go of a lock.
    assert is_in_use(cfg.OUTPUT_DIR) is False


def test_report_that_fails_is_a_warning(cfg, tmp_path, log):
    (tmp_path / "run" / "report.html").mkdir()
    write_report(cfg)
    assert "WARNING" in log.text and "cannot write report.html: error: " in log.text


def test_report_without_matplotlib_says_what_to_install(cfg, commands, monkeypatch, log):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_report(cfg)
    assert commands == [] and 'pip install "plaintrain[plot]"' in log.text
