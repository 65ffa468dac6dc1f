"""Work beside the training loop: plaintrain.checkpoint.async_writer, and checkpoints written there."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from processes import Process
from torch import nn

from plaintrain.checkpoint.async_writer import AsyncWriter, copy_to_host
from plaintrain.checkpoint.training_checkpointer import TrainingCheckpointer
from plaintrain.utils.errors import UserError
from plaintrain.utils.stop import Stopped


@pytest.mark.parametrize("call", ["copy", "wait", "submit"])
def test_failure_is_raised_by_the_next_call_and_skips_later_functions(call):
    background, done, go, failed = AsyncWriter(), [], threading.Event(), threading.Event()

    def fail():
        go.wait(10)
        failed.set()
        raise UserError("no disk")

    background.submit(fail)
    background.submit(done.append, 1)
    go.set()
    failed.wait(10)
    time.sleep(0.1)
    with pytest.raises(UserError, match="no disk"):
        getattr(background, call)(*([] if call == "wait" else [print]))
    assert done == []
    # It is told once.
    background.wait()


def end_while_a_file_is_written(path):
    def write():
        time.sleep(0.3)
        open(path, "w").close()

    AsyncWriter().submit(write)
    raise SystemExit(3)


def test_process_ends_after_its_writes(tmp_path):
    process = Process(tmp_path / "log", end_while_a_file_is_written, str(tmp_path / "done")).wait()
    assert process.code == 3 and (tmp_path / "done").exists()


def test_copy_to_host_keeps_the_versions_of_modules():
    layer = nn.BatchNorm1d(3)
    copied = copy_to_host(layer.state_dict())
    assert copied._metadata == layer.state_dict()._metadata
    layer.running_mean += 1
    assert copied["running_mean"].tolist() == [0, 0, 0]


@pytest.fixture
def disk(monkeypatch):
    """`disk.go` lets files be written, which wait for it; where `disk.full` is true, they fail then."""

    disk = SimpleNamespace(go=threading.Event(), full=False)
    save = torch.save

    def wait_and_save(*args):
        disk.go.wait(10)
        if disk.full:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(torch, "save", wait_and_save)
    yield disk
    disk.go.set()


def make_saver(folder, **kwargs):
    """(model, saver) of a run that writes in the background."""
    model = nn.Linear(2, 2, bias=False)
    return model, TrainingCheckpointer(model, str(folder), asynchronous=True, **kwargs)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_asynchronous_save_does_not_block_and_ignores_later_changes(tmp_path, disk):
    model, saver = make_saver(tmp_path, period=1)
    for i in range(2):
        nn.init.constant_(model.weight, float(i))
        saver.save_iteration(i)
        if i == 0:
            assert not (tmp_path / "model_0000000.pth").exists()
            # Before the second one is copied, the first is written.
            threading.Timer(0.2, disk.go.set).start()
    assert (tmp_path / "model_0000000.pth").exists()
    nn.init.constant_(model.weight, 3.0)
    saver.wait()
    assert names(tmp_path) == ["last_checkpoint", "model_0000000.pth", "model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    for i in range(2):
        saved = torch.load(tmp_path / f"model_{i:07d}.pth", weights_only=True)
        assert saved["model"]["weight"].unique().tolist() == [i]


def test_end_of_the_block_waits_for_the_last_file(tmp_path, disk):
    _, saver = make_saver(tmp_path, period=1)
    with saver:
        saver.save_iteration(0)
        saver.save_final()
        threading.Timer(0.2, disk.go.set).start()
    assert names(tmp_path) == ["last_checkpoint", "model_0000000.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(("ends", "told"), [(None, UserError), (Stopped, UserError), (KeyError, KeyError)])
def test_end_of_the_block_raises_thread_errors_unless_another_came_first(tmp_path, disk, log, ends, told):
    _, saver = make_saver(tmp_path, period=1)
    disk.full = True
    disk.go.set()
    with pytest.raises(told), saver:
        saver.save_iteration(0)
        if ends:
            raise ends
    assert ("cannot write" in log.text) == (told is KeyError)
