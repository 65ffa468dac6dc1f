"""One run at a time in a folder: plaintrain.utils.lock."""

import fcntl
import os
import shutil
import socket
import time
from unittest.mock import Mock

import pytest
from processes import Process

from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write
from plaintrain.utils.lock import is_in_use, lock_folder


def hold(folder):
    """Hold the lock of a folder until the end of the process, or say why not."""
    try:
        print(f"alive before: {is_in_use(folder)}")
        lock_folder(folder)
        print("held", flush=True)
        time.sleep(100)
    except UserError as e:
        print(e, flush=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def start(tmp_path):
    """Function (folder) -> a process that holds its lock, or has said why not."""
    processes = []

    def start(folder):
        process = Process(tmp_path / f"{len(processes)}.out", hold, str(folder))
        processes.append(process)
        process.wait_for(lambda: process.output.count("\n") == 2)
        return process

    yield start
    for process in processes:
        process.kill()


def test_lock_rejects_a_second_run_until_the_first_has_ended_or_was_killed(tmp_path, folder, start):
    first = start(folder)
    assert "held" in first.output and is_in_use(folder)
    with pytest.raises(UserError, match=rf"another run \(pid {first.pid} on {socket.gethostname()}, since"):
        lock_folder(str(folder))
    # By another name of the folder too.
    os.symlink(folder, tmp_path / "link")
    assert "another run" in start(tmp_path / "link").output
    (folder / "run.lock").write_text("")
    with pytest.raises(UserError, match="owner unknown"):
        lock_folder(str(folder))
    first.kill()
    lock_folder(str(folder))
    # A look at the own run keeps its lock.
    assert is_in_use(folder) is False
    # Not read here: this process would let go of the lock with the handle.
    words = f"alive before: True\n{folder} is in use by another run (pid {os.getpid()} on"
    assert words in start(folder).output


# Whether a run of another machine is alive is unknown.
@pytest.mark.parametrize(("host", "in_use"), [("elsewhere", None), (socket.gethostname(), False)])
def test_lock_file_of_a_dead_run_is_ignored(tmp_path, host, in_use):
    (tmp_path / "run.lock").write_text(f"pid 1 on {host}, since long ago")
    assert is_in_use(tmp_path) is in_use
    lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))
    assert f"pid {os.getpid()} on" in (tmp_path / "run.lock").read_text()


def test_lock_warns_on_a_file_system_without_locks(tmp_path, monkeypatch, log):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(37, "No locks available")))
    lock_folder(str(tmp_path))
    assert "run.lock (No locks available)" in log.text
    assert f"pid {os.getpid()} on" in (tmp_path / "run.lock").read_text()


def test_a_deleted_folder_is_created_and_locked_again_by_the_next_write(folder, start, log):
    lock_folder(str(folder))
    shutil.rmtree(folder)
    for _ in range(2):
        with atomic_write(folder / "inference" / "a.json") as f:
            f.write("1")
    assert log.text.count("deleted during the run") == 1
    assert "in use by another run" in start(folder).output
    # Another run may be faster.
    shutil.rmtree(folder)
    folder.mkdir()
    start(folder)
    with pytest.raises(UserError, match="in use by another run"), atomic_write(folder / "a.json") as f:
        f.write("1")
    assert not (folder / "a.json").exists()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path.parent.parent / "x", path)]
)
def test_lock_file_must_be_a_regular_file(folder, make):
    (folder.parent / "x").write_text("precious")
    make(folder / "run.lock")
    assert is_in_use(folder) is None
    with pytest.raises(UserError, match=r"run\.lock must be a regular file"):
        lock_folder(str(folder))
    assert (folder.parent / "x").read_text() == "precious"
