"""One run at a time in a folder: plaintrain.utils.lock."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from plaintrain.utils.errors import UserError
from plaintrain.utils.lock import lock_folder

HOLD = """
import sys, time
from plaintrain.utils.errors import UserError
from plaintrain.utils.lock import lock_folder
try:
    lock_folder(sys.argv[1])
    print("held", flush=True)
    time.sleep(100)
except UserError as e:
    print(e)
"""


@pytest.fixture
def hold():
    """Function (folder) -> a process that holds its lock, or has said why not."""
    started = []

    def start(folder):
        started.append(
            subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
        )
        return started[-1], started[-1].stdout.readline()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_while_the_first_is_alive_however_that_ends(tmp_path, hold):
    first, said = hold(tmp_path)
    assert said == "held\n"
    owner = json.loads((tmp_path / "run.lock").read_text())
    assert (owner["pid"], owner["host"]) == (first.pid, socket.gethostname())
    with pytest.raises(
        UserError, match=f"another run is at work .*: process {first.pid} on {owner['host']}, since"
    ):
        lock_folder(str(tmp_path))
    # By another name of the folder too.
    os.symlink(tmp_path, tmp_path.parent / "link")
    assert "another run" in hold(tmp_path.parent / "link")[1]
    first.send_signal(signal.SIGKILL)
    first.wait()
    lock_folder(str(tmp_path))
    # Not read here: this process would let go of the lock with the handle.
    assert f"process {os.getpid()} on" in hold(tmp_path)[1]


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1, "host": "elsewhere", "started": "long ago"}', "[]"])
def test_what_a_dead_run_has_left_is_no_lock(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_was_made_anew_is_locked_anew(tmp_path, hold):
    folder = tmp_path / "run"
    folder.mkdir()
    lock_folder(str(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    assert hold(folder)[1] == "held\n"
    with pytest.raises(UserError, match="another run"):
        lock_folder(str(folder))


def test_a_lock_whose_owner_cannot_be_read_is_one_still(tmp_path, hold):
    hold(tmp_path)
    (tmp_path / "run.lock").write_text("")
    with pytest.raises(UserError, match="not yet written its number"):
        lock_folder(str(tmp_path))


def test_where_there_are_no_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, log):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock_folder(str(tmp_path))
    assert "run.lock cannot be locked (No locks available)" in log.text
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
