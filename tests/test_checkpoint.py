"""Checkpoints and the files under them: plaintrain.checkpoint and plaintrain.utils.files."""

import contextlib
import os
import pickle
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from run_files import load
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from plaintrain.checkpoint.state import restore_norm_buffers
from plaintrain.checkpoint.training_checkpointer import TrainingCheckpointer
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.engine.nonfinite import NonfiniteGuard
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import EventStorage


def make_model(value=0.0, width=2):
    """A linear layer and a batch norm, every parameter of one value."""
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(model):
    """The value that all parameters have; `make_model`'s inverse."""
    (value,) = {v for parameter in model.parameters() for v in parameter.flatten().tolist()}
    return value


def save_run(folder, iterations, final=False):
    """Checkpoints of a run in a folder; the weights of iteration i are all i."""
    for i in iterations:
        checkpointer = DetectionCheckpointer(make_model(float(i)), str(folder))
        checkpointer.save(f"model_{i:07d}", iteration=i)
    if final:
        checkpointer.link(f"model_{i:07d}", "model_final")


def resume(folder, **kwargs):
    """(model, what resume_or_load returns) of a fresh model in a folder."""
    model = make_model(-1.0)
    return model, DetectionCheckpointer(model, str(folder)).resume_or_load("", resume=True, **kwargs)


def sgd(parameters):
    return {"optimizer": torch.optim.SGD(parameters, lr=0.1)}


def names(folder):
    return sorted(os.listdir(folder))


# That all values are loaded as they were saved is a property, see properties/test_checkpoint_properties.py.


def test_save_unwraps_the_model_and_writes_on_one_rank(tmp_path):
    checkpointer = DetectionCheckpointer(nn.DataParallel(make_model(2.0)), str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)
    checkpointer.save_weights("model_best", nn.DataParallel(make_model(3.0)))
    for name in ("model_0000000", "model_best"):
        assert load(tmp_path / f"{name}.pth")["model"].keys() == make_model().state_dict().keys()
    folder = tmp_path / "rank-1"
    checkpointer = DetectionCheckpointer(make_model(), str(folder), save_to_disk=False)
    checkpointer.save_weights("model_best", make_model())
    saver = PeriodicCheckpointer(checkpointer, 1, max_iter=2, max_to_keep=1)
    saver.step(0)
    saver.step(1)
    assert not folder.exists()


def test_checkpoints_of_version_0_1_are_resumed(tmp_path):
    """With their names of the states, and what their storage's window was."""
    scalars = {"loss": [[[2.0, 3], [1.0, 4]], True]}
    window = {"scalars": scalars, "unwritten": ["loss"], "images": [[], []]}
    older = {"log_window": window, "skipped_steps": (4, 1), "due": (False, True)}
    older["best"] = {"metric": "bbox/AP", "value": 5.0, "iteration": 2, "num_waited": 1, "seen": 4}
    DetectionCheckpointer(make_model(), str(tmp_path)).save("model_0000004", iteration=4, **older)
    model, storage = make_model(), EventStorage()
    states = {"early_stopping": EarlyStopping("bbox/AP"), "nonfinite": NonfiniteGuard(model, None, None)}
    checkpointer = DetectionCheckpointer(model, str(tmp_path), storage=storage, **states)
    assert checkpointer.resume_or_load("") == {"iteration": 4}
    assert (storage.iter, storage.start_iter, storage.latest()) == (4, 5, {"loss": (1.0, 4)})
    assert storage.latest_with_smoothing_hint() == {"loss": (1.5, 4)}
    assert (states["early_stopping"].value, states["nonfinite"].num_skipped) == (5.0, 4)


@pytest.mark.parametrize(("world_size", "mean"), [(2, 1), (3, 0)])
def test_running_statistics_of_each_rank_are_restored(monkeypatch, world_size, mean):
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    saved = [{"model": {"bn.running_mean": rank}} for rank in range(2)]
    states = {"model": {"bn.running_mean": 0}, "norm_buffers": saved}
    restore_norm_buffers(states)
    assert states == {"model": {"bn.running_mean": mean}}


class Bomb(str):
    """The path of a file; unpickling it creates the file."""

    def __reduce__(self):
        return open, (str(self), "w")


LEGACY = partial(torch.save, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(("save", "key"), [(torch.save, "model"), (LEGACY, "extra"), (pickle.dump, "extra")])
def test_file_that_would_run_code_is_rejected_and_does_not_run(tmp_path, save, key):
    evil, marker = tmp_path / "model_0000001.pth", tmp_path / "ran"
    with evil.open("wb") as f:
        save({"model": make_model().state_dict(), "iteration": 1, key: Bomb(marker)}, f)
    with pytest.raises(UserError, match=r"model_0000001\.pth.*could run code"):
        resume(tmp_path)
    assert not marker.exists()
    # The file is as evil as meant.
    with contextlib.suppress(RuntimeError):
        torch.load(evil, weights_only=False)
    assert marker.exists()


# Without an error the disk is full.
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt(), None])
def test_failed_save_keeps_older_files_and_nothing_else(tmp_path, monkeypatch, error):
    resource = pytest.importorskip("resource")
    save_run(tmp_path, [1, 3])
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def save_half(data, file):
        file.write(b"half of a file")
        file.flush()
        raise error

    if error:
        monkeypatch.setattr(torch, "save", save_half)
    checkpointer = DetectionCheckpointer(nn.Linear(300, 300), str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        for name in ("model_0000003", "model_0000005"):
            with pytest.raises((KeyboardInterrupt, UserError)) as raised:
                checkpointer.save(name, iteration=5)
            if not isinstance(error, KeyboardInterrupt):
                raised.match(rf"cannot write .*{name}\.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_atomic_write_replaces_a_file_only_when_its_block_succeeds(tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with atomic_write(path, "wb") as f:
        f.write(b"old\xff")
        assert not path.exists()
    # Its content is on the disk before it has its name.
    assert calls[:2] == ["fsync", "replace"]
    for error in (ZeroDivisionError(), KeyboardInterrupt(), OSError(28, "No space left on device")):
        expected = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as raised, atomic_write(str(path)) as f:
            f.write("half of")
            raise error
        assert names(tmp_path) == ["file"] and path.read_bytes() == b"old\xff"
    assert str(path) in str(raised.value) and "No space left" in str(raised.value)
    # Who has the old file open goes on reading the old file.
    with open(path, "rb") as reader:
        with atomic_write(str(path)) as f:
            f.write("neu, größer")
            f.flush()
            assert path.read_bytes() == b"old\xff"
        assert reader.read() == b"old\xff"
    assert names(tmp_path) == ["file"] and path.read_text(encoding="utf-8") == "neu, größer"
    with pytest.raises(UserError, match="below"), atomic_write(str(path / "below" / "file")) as f:
        f.write("")


@pytest.fixture(scope="module")
def extended_run(tmp_path_factory):
    """A run of 4 iterations, model_final is of the last, that was resumed with a larger MAX_ITER."""
    folder = tmp_path_factory.mktemp("extended")
    save_run(folder, [1, 3], final=True)
    save_run(folder, [5, 7])
    return folder


def tag(content):
    return lambda folder: (folder / "last_checkpoint").write_bytes(content)


def damage_two(folder):
    os.truncate(folder / "model_0000007.pth", 1000)
    (folder / "model_0000005.pth").write_bytes(b"")


def flip_bit(folder):
    path = folder / "model_0000007.pth"
    content = bytearray(path.read_bytes())
    content[content.index(np.full(3, 7.0, np.float32).tobytes())] ^= 1
    path.write_bytes(content)


def damage_final(folder):
    tag(b"model_final.pth")(folder)
    os.truncate(folder / "model_final.pth", 1000)


@pytest.mark.parametrize(
    ("change", "iteration", "warned"),
    [
        (tag(b"model_0000003.pth\n"), 3, []),
        (tag(b"/no/such/folder/model_0000001.pth"), 1, []),
        (tag(b"model_0000009.pth"), 7, ["model_0000009.pth"]),
        (tag(b"\n"), 7, []),
        (tag(b"\xff\xfe\x00"), 7, []),
        (lambda folder: (folder / "last_checkpoint").unlink(), 7, []),
        (damage_two, 3, ["model_0000007.pth", "model_0000005.pth"]),
        (damage_final, 7, ["model_final.pth"]),
        (flip_bit, 5, ["model_0000007.pth", "Bad CRC"]),
    ],
)
def test_resume_loads_the_tagged_or_the_newest_intact_checkpoint(
    tmp_path, log, extended_run, change, iteration, warned
):
    # Copied, so a run can be moved too.
    folder = shutil.copytree(extended_run, tmp_path / "run")
    assert resume(folder)[1] == {"iteration": 7}
    log.clear()
    change(folder)
    model, data = resume(folder)
    assert data == {"iteration": iteration} and value_of(model) == iteration
    warnings = "\n".join(r.getMessage() for r in log.records if r.levelname == "WARNING")
    assert all(name in warnings for name in warned)


def test_checkpoints_are_listed_and_only_resume_loads_their_iteration(tmp_path, log, extended_run):
    for folder in (tmp_path, tmp_path / "missing"):
        checkpointer = DetectionCheckpointer(make_model(), str(folder))
        assert not checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == ""
    files = ["model_0000001.pth", "model_0000003.pth", "model_final.pth", "model_0000005.pth"]
    files = [str(extended_run / name) for name in [*files, "model_0000007.pth"]]
    weights = files[0]
    model = make_model(-1.0)
    checkpointer = DetectionCheckpointer(model, str(extended_run))
    assert checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == files[-1]
    assert checkpointer.get_all_checkpoint_files() == files
    assert checkpointer.resume_or_load("", resume=False) == {} and value_of(model) == -1.0
    assert checkpointer.resume_or_load(weights, resume=True) == {"iteration": 7} and value_of(model) == 7.0
    # Fine-tuning from a run's own model: the optimizer, which the file lacks, begins anew too.
    checkpointer = DetectionCheckpointer(model, str(extended_run), **sgd(model.parameters()))
    assert checkpointer.resume_or_load(weights, resume=False) == {} and value_of(model) == 1.0
    # With nothing there, also where a tag is left, it begins.
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    assert resume(tmp_path)[1] == {} and value_of(resume(tmp_path)[0]) == -1.0
    assert any(r.levelname == "WARNING" and str(tmp_path) in r.getMessage() for r in log.records)
    model = make_model()
    assert DetectionCheckpointer(model, str(tmp_path)).resume_or_load(weights, resume=True) == {}
    assert value_of(model) == 1.0


# As after a change of the model, of SOLVER.OPTIMIZER, of FREEZE_AT.
@pytest.mark.parametrize(
    ("make", "checkpointables_of", "words"),
    [
        (lambda: make_model(width=5), lambda m: {}, r"3\.pth.*another model.*0\.weight"),
        (lambda: make_model()[:1], lambda m: {}, r"3\.pth.*another model.*1\.weight"),
        (make_model, lambda m: {"optimizer": torch.optim.AdamW(m.parameters())}, "optimizer.*does not fit"),
        (make_model, lambda m: sgd(m[0].parameters()), "optimizer.*does not fit"),
        (make_model, lambda m: sgd(m.parameters()) | {"scheduler": m}, "holds no scheduler, which is needed"),
    ],
)
def test_checkpoint_of_another_run_is_rejected(tmp_path, make, checkpointables_of, words):
    model = make_model()
    DetectionCheckpointer(model, str(tmp_path), **sgd(model.parameters())).save("model_0000003", iteration=3)
    other = make()
    with pytest.raises(UserError, match=words):
        DetectionCheckpointer(other, str(tmp_path), **checkpointables_of(other)).resume_or_load("")


def test_unreadable_and_unwritable_files_are_clear_errors(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    for name in ("a.pth", "b.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            DetectionCheckpointer(make_model(), str(tmp_path)).load(str(tmp_path / name))
    with pytest.raises(UserError, match=r"cannot write .*a\.pth"):
        DetectionCheckpointer(make_model(), str(tmp_path / "a.pth")).save("model_0000000", iteration=0)
    save_run(tmp_path, [1, 3])
    for i in (1, 3):
        os.truncate(tmp_path / f"model_{i:07d}.pth", 1000)
    with pytest.raises(UserError, match=r"cannot read .*model_0000003\.pth"):
        resume(tmp_path)


# Which checkpoints are saved and kept is a property too.


@pytest.fixture
def saves(monkeypatch):
    """How often a file of tensors was written."""
    calls, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *args: calls.append(1) or save(*args))
    return calls


def make_saver(folder, value=0.0, final=None, **kwargs):
    """A `TrainingCheckpointer` that saves every 2 iterations; `final` is the value of the final weights."""
    model = make_model(value)
    final_model = None if final is None else lambda: nn.DataParallel(make_model(final))
    kwargs |= sgd(model.parameters())
    return TrainingCheckpointer(model, str(folder), period=2, final_model=final_model, **kwargs)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("iteration", [4, 5])
def test_final_model_is_the_last_checkpoint(tmp_path, monkeypatch, saves, links, iteration):
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(1, "Operation not permitted")))
    saver = make_saver(tmp_path)
    # Also where it replaces one of a shorter run.
    (tmp_path / "model_final.pth").write_text("old")
    saver.save_iteration(iteration)
    numbered = tmp_path / f"model_000000{iteration}.pth"
    content = numbered.read_bytes()
    saver.save_final()
    assert len(saves) == 1 and (tmp_path / "model_final.pth").read_bytes() == content
    # Under its number too, if the period has it.
    kept = [numbered.name] if iteration == 5 else []
    assert names(tmp_path) == ["last_checkpoint", *kept, "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # A finished run that is resumed leaves it as it is.
    again = make_saver(tmp_path)
    assert again.resume_or_load("")["iteration"] == iteration
    again.save_final()
    assert len(saves) == 1 and "model_final.pth" in names(tmp_path)
    # One that is extended gets another.
    again.save_iteration(8)
    again.save_final()
    assert load(tmp_path / "model_final.pth")["iteration"] == 8


def test_pruning_leaves_other_files_and_the_checkpoint_just_saved(tmp_path):
    others = ["model_best.pth", "model_0000001.pth.bak", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text(name)
    # A run is taken back to an earlier point, so files of later iterations lie there.
    save_run(tmp_path, [3, 7, 9])
    make_saver(tmp_path, max_to_keep=2).save_iteration(1)
    files = {"last_checkpoint", "model_0000001.pth", "model_0000009.pth"}
    assert set(names(tmp_path)) == {*others, *files}
    assert resume(tmp_path)[1]["iteration"] == 1


def test_periodic_checkpointer_saves_as_in_detectron2(tmp_path, saves):
    checkpointer = DetectionCheckpointer(make_model(), str(tmp_path))
    for max_iter, files in ((7, ["model_0000003", "model_0000005", "model_final"]), (8, ["model_0000007"])):
        other = PeriodicCheckpointer(checkpointer, 2, max_iter, 1, file_prefix="my_net")
        for iteration in range(max_iter):
            other.step(iteration)
        mine = {name for name in names(tmp_path) if name.startswith("my")}
        assert mine == {f"my_net_000000{max_iter // 2 * 2 - 1}.pth", "my_net_final.pth"}
        saver = PeriodicCheckpointer(checkpointer, 2, max_iter, max_to_keep=2)
        saves.clear()
        for iteration in range(max_iter):
            saver.step(iteration, reason="period")
        assert set(files) <= {name.removesuffix(".pth") for name in names(tmp_path)}
        assert len(saves) == 4 and resume(tmp_path)[1] == {"iteration": max_iter - 1, "reason": "period"}


def test_best_and_final_weights_are_not_resumed_from_and_every_file_has_the_metadata(tmp_path):
    metadata = {"class_names": ["cat", "dog"], "config": "A: text"}
    saver = make_saver(tmp_path, value=1.0, final=7.0, metadata=metadata)
    saver.save_iteration(4)
    saver.save_weights("model_best", make_model(9.0), iteration=5, config="mine")
    saver.save_final()
    best, final = (load(tmp_path / f"model_{name}.pth") for name in ("best", "final"))
    assert set(best) == {"model", "iteration", *metadata} and set(final) == {"model", *metadata}
    # What is given for one file goes before.
    assert (best["iteration"], best["class_names"], best["config"]) == (5, metadata["class_names"], "mine")
    for name in ("last_checkpoint", "model_0000004.pth"):
        assert saver.resume_or_load("", resume=True) == {"iteration": 4, **metadata}
        assert value_of(saver.model) == 1.0
        (tmp_path / name).unlink()
    # Another training may start from them.
    for name, value in (("best", 9.0), ("final", 7.0)):
        assert saver.resume_or_load(str(tmp_path / f"model_{name}.pth"), resume=False) == {}
        assert value_of(saver.model) == value
    (tmp_path / "model_final.pth").unlink()
    assert not saver.has_checkpoint() and names(tmp_path) == ["model_best.pth"]
