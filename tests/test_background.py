"""Work beside the training loop: plaintrain.utils.background, and checkpoints that are written there."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from plaintrain.utils import checkpoint_files
from plaintrain.utils.background import Background, HostCopy
from plaintrain.utils.errors import UserError


def test_what_is_given_is_done_in_order_in_another_thread():
    background, done = Background(), []
    for i in range(5):
        background.submit(lambda i: done.append((i, threading.current_thread().name)), i)
    background.wait()
    assert [i for i, _ in done] == list(range(5))
    assert {name for _, name in done} != {threading.current_thread().name}


def test_a_failure_is_raised_by_the_next_call_and_ends_what_comes_after():
    def fail(go):
        go.wait(10)
        raise UserError("no disk")

    for call in ("check", "wait", "submit"):
        background, done, go = Background(), [], threading.Event()
        background.submit(fail, go)
        background.submit(done.append, 1)
        go.set()
        time.sleep(0.2)
        with pytest.raises(UserError, match="no disk"):
            getattr(background, call)(*([print] if call == "submit" else []))
        assert done == []
        # It is told once.
        background.wait()


def test_the_process_ends_after_what_was_given_is_done(tmp_path):
    code = f"""
import time
from plaintrain.utils.background import Background
Background().submit(lambda: (time.sleep(0.5), open({str(tmp_path / "done")!r}, "w").close()))
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3
    assert (tmp_path / "done").exists()


def test_a_copy_keeps_values_and_types_and_uses_its_memory_again():
    copy, layer = HostCopy(), nn.BatchNorm1d(3)
    data = {
        "model": layer.state_dict(),
        "list": [torch.ones(2, dtype=torch.bfloat16), ("a", 1, None)],
        "empty": torch.empty(0, 4),
        "part": torch.arange(6).reshape(2, 3).T,
    }
    copied = copy(data)
    assert copied["model"]._metadata == data["model"]._metadata
    assert copied["list"][1] == ("a", 1, None) and copied["empty"].shape == (0, 4)
    assert torch.equal(copied["part"], data["part"]) and torch.equal(copied["list"][0], data["list"][0])
    kept = copied["model"]["running_mean"]
    layer.running_mean += 1
    assert kept.tolist() == [0, 0, 0]
    again = copy(data)["model"]["running_mean"]
    assert again.data_ptr() == kept.data_ptr() and again.tolist() == [1, 1, 1]
    # Another shape or type takes other memory.
    assert copy({"part": torch.ones(7)})["part"].shape == (7,)


@pytest.fixture
def slow_disk(monkeypatch):
    """`slow_disk.go` lets files be written; before, they are not."""

    class Disk:
        go = threading.Event()

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (Disk.go.wait(10), save(*args))[1])
    Disk.go.clear()
    yield Disk
    Disk.go.set()


def test_the_loop_does_not_wait_for_the_disk_and_what_it_changes_is_not_saved(tmp_path, slow_disk):
    model = nn.Linear(2, 2, bias=False)
    nn.init.constant_(model.weight, 1.0)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), asynchronous=True)
    saver = PeriodicCheckpointer(checkpointer, 1, max_to_keep=1)
    saver.step(0)
    assert not (tmp_path / "model_0000000.pth").exists() and not (tmp_path / "last_checkpoint").exists()
    nn.init.constant_(model.weight, 2.0)
    slow_disk.go.set()
    saver.step(1)
    nn.init.constant_(model.weight, 3.0)
    checkpointer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert saved["model"]["weight"].unique().tolist() == [2.0]


def test_the_next_step_raises_what_failed_and_nothing_older_is_removed(tmp_path, monkeypatch):
    checkpointer = DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path), asynchronous=True)
    saver = PeriodicCheckpointer(checkpointer, 2, max_to_keep=1)
    saver.step(1)
    checkpointer.wait()

    go = threading.Event()

    def full(*args):
        go.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    saver.step(3)
    go.set()
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"cannot write .*model_0000003.pth"):
        saver.step(4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


def test_the_end_of_the_block_waits_and_raises(tmp_path, slow_disk, monkeypatch):
    checkpointer = DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path), asynchronous=True)
    with PeriodicCheckpointer(checkpointer, 1, max_iter=1) as saver:
        saver.step(0)
        threading.Timer(0.2, slow_disk.go.set).start()
    names = ["last_checkpoint", "model_0000000.pth", "model_final.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    monkeypatch.setattr(checkpoint_files, "atomic_write", None)
    with pytest.raises(TypeError), PeriodicCheckpointer(checkpointer, 1) as saver:
        saver.step(1)


def test_what_ended_the_block_is_told_before_what_failed_in_the_background(tmp_path, monkeypatch, log):
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    checkpointer = DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path), asynchronous=True)
    with pytest.raises(KeyError), PeriodicCheckpointer(checkpointer, 1) as saver:
        saver.step(0)
        raise KeyError
    assert "cannot write" in log.text
