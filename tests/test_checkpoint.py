"""Checkpoints and the files under them: plaintrain.checkpoint and plaintrain.utils.files."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from plaintrain.checkpoint import (
    DetectionCheckpointer,
    PeriodicCheckpointer,
    build_periodic_checkpointer,
)
from plaintrain.config import get_cfg
from plaintrain.ema import build_ema
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write, move_old_run
from plaintrain.utils.stop import Stopped

torch.set_num_threads(1)


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
    model = make_model()
    checkpointer = DetectionCheckpointer(model, str(folder))
    for i in iterations:
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(i))
        checkpointer.save(f"model_{i:07d}", iteration=i)
    if final:
        checkpointer.link(f"model_{i:07d}", "model_final")


def resume(folder, **kwargs):
    """(model, what resume_or_load returns) of a fresh model in a folder."""
    model = make_model(-1.0)
    return model, DetectionCheckpointer(model, str(folder)).resume_or_load("", resume=True, **kwargs)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def names(folder):
    return sorted(os.listdir(folder))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ---- saving and loading ------------------------------------------------------------------------


def test_everything_saved_is_loaded_again(tmp_path):
    model = make_model(1.5)
    model[1].running_mean.fill_(7.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    extra = {
        "best": 12.5,
        "config": "text",
        "nested": {"list": [1, 2.0, "x", None]},
        "rng": torch.get_rng_state(),
    }
    checkpointer.save("model_0000004", iteration=4, **extra)

    other = make_model(0.0)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    found = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer).resume_or_load("")
    assert found.pop("rng").equal(extra.pop("rng"))
    assert found == {"iteration": 4, **extra}
    for name, tensor in model.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name
    before, after = optimizer.state_dict(), other_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys() != set()
    for key, state in before["state"].items():
        assert state["momentum_buffer"].equal(after["state"][key]["momentum_buffer"])


def test_load_can_leave_checkpointables_out(tmp_path):
    model = make_model(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    checkpointer.save("model_0000000", iteration=0)
    optimizer.param_groups[0]["lr"] = 0.7
    found = checkpointer.load(checkpointer.get_checkpoint_file(), checkpointables=[])
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert found["iteration"] == 0
    checkpointer.load(checkpointer.get_checkpoint_file())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_wrapped_model_is_saved_under_its_own_names(tmp_path):
    DetectionCheckpointer(nn.DataParallel(make_model(2.0)), str(tmp_path)).save("model_0000000", iteration=0)
    model, found = resume(tmp_path)
    assert value_of(model) == 2.0
    assert found == {"iteration": 0}


def test_only_the_process_that_saves_to_disk_writes(tmp_path):
    folder = tmp_path / "run"
    checkpointer = DetectionCheckpointer(make_model(), str(folder), save_to_disk=False)
    saver = PeriodicCheckpointer(checkpointer, 1, max_iter=2, max_to_keep=1)
    saver.step(0)
    saver.step(1)
    assert not folder.exists()


def test_what_save_accepts_can_be_loaded(tmp_path):
    save_run(tmp_path, [0])
    checkpointer = DetectionCheckpointer(make_model(3.0), str(tmp_path))
    try:
        # A metric as NumPy computes it: an instance of float.
        checkpointer.save("model_0000001", iteration=1, best=np.mean([0.25, 0.75]))
    except UserError:
        assert resume(tmp_path)[1] == {"iteration": 0}
    else:
        assert resume(tmp_path)[1] == {"iteration": 1, "best": 0.5}


# ---- loading runs no code ----------------------------------------------------------------------


@pytest.mark.parametrize("style", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["model", "extra"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, style, place):
    save_run(tmp_path, [0])
    evil, marker = tmp_path / "model_0000001.pth", tmp_path / "ran"
    content = {"model": make_model().state_dict(), "iteration": 1}
    content[place] = Bomb(marker)
    if style == "pickle":
        evil.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=style == "zip")
    model = make_model(-1.0)
    with pytest.raises(UserError, match=r"model_0000001\.pth"):
        DetectionCheckpointer(model, str(tmp_path)).load(str(evil))
    assert not marker.exists()
    assert value_of(model) == -1.0
    # The file is as evil as meant.
    if style == "pickle":
        pickle.loads(evil.read_bytes())  # noqa: S301 - its own bytes
    else:
        torch.load(evil, weights_only=False)
    assert marker.exists()


# ---- files are whole or not there --------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("out of luck"), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_a_failing_save_leaves_the_older_files_and_nothing_else(tmp_path, monkeypatch, error):
    save_run(tmp_path, [1, 3])
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def save_half(data, file):
        file.write(b"half of a file")
        file.flush()
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    checkpointer = DetectionCheckpointer(make_model(9.0), str(tmp_path))
    for name in ("model_0000003", "model_0000005"):
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
            checkpointer.save(name, iteration=5)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert resume(tmp_path)[1] == {"iteration": 3}


def test_a_full_disk_is_one_clear_error_and_costs_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    save_run(tmp_path, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = nn.Linear(300, 300)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*model_0000003\.pth"):
            checkpointer.save("model_0000003", iteration=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert resume(tmp_path)[1] == {"iteration": 1}


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpointer = DetectionCheckpointer(make_model(), str(tmp_path / "file"))
    with pytest.raises(UserError, match="file"):
        checkpointer.save("model_0000000", iteration=0)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old", "neu, größer"), ("wb", b"old", b"\0new")])
def test_atomic_write_replaces_a_file_only_when_its_block_succeeds(tmp_path, mode, old, new):
    path = tmp_path / "file"

    def read():
        return path.read_bytes() if mode == "wb" else path.read_text(encoding="utf-8")

    with atomic_write(str(path), mode) as f:
        f.write(old)
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(str(path), mode) as f:
        f.write(new)
        raise ZeroDivisionError
    assert read() == old
    # Who has the old file open goes on reading the old file.
    with open(path, mode.replace("w", "r"), encoding=None if mode == "wb" else "utf-8") as reader:
        with atomic_write(str(path), mode) as f:
            f.write(new)
            f.flush()
            assert read() == old
        assert reader.read() == old
    assert read() == new
    assert names(tmp_path) == ["file"]


def test_atomic_write_into_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="missing"), atomic_write(str(tmp_path / "missing" / "file")) as f:
        f.write("")


def test_the_old_run_moves_aside_and_what_is_not_its_own_stays(tmp_path):
    own = ["config.yaml", "config-1.yaml", "events.out.tfevents.17.host", "last_checkpoint", "log.txt"]
    own += ["log.txt.rank1", "metrics.json", "model_0000019.pth", "model_best.pth", "model_final.pth"]
    others = ["dataset.json", "model_of_mine.pth", "notes.txt"]
    for name in own + others:
        (tmp_path / name).write_text(name)
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "results.json").write_text("results")

    assert move_old_run(str(tmp_path)) == str(tmp_path / "old-1")
    assert names(tmp_path) == [*others, "old-1"]
    assert names(tmp_path / "old-1") == sorted([*own, "inference"])
    assert (tmp_path / "old-1" / "inference" / "results.json").read_text() == "results"

    assert move_old_run(str(tmp_path)) is None
    (tmp_path / "metrics.json").write_text("second")
    assert move_old_run(str(tmp_path)) == str(tmp_path / "old-2")
    assert (tmp_path / "old-1" / "metrics.json").read_text() == "metrics.json"
    assert (tmp_path / "old-2" / "metrics.json").read_text() == "second"


# ---- which checkpoint a resumed run starts from ------------------------------------------------


def test_the_last_checkpoint_is_resumed(tmp_path):
    save_run(tmp_path, [1, 3, 5])
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    model, found = resume(tmp_path)
    assert found == {"iteration": 5}
    assert value_of(model) == 5.0


def test_last_checkpoint_may_name_an_older_one(tmp_path):
    save_run(tmp_path, [1, 3, 5])
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth\n")
    assert resume(tmp_path)[1] == {"iteration": 3}


def test_a_run_can_be_moved_and_resumed(tmp_path):
    save_run(tmp_path / "here", [1, 3])
    shutil.move(tmp_path / "here", tmp_path / "there")
    model, found = resume(tmp_path / "there")
    assert found == {"iteration": 3}
    assert value_of(model) == 3.0


def test_last_checkpoint_with_a_path_of_another_machine_names_the_file_beside_it(tmp_path):
    save_run(tmp_path, [1, 3])
    (tmp_path / "last_checkpoint").write_text("/no/such/folder/model_0000001.pth")
    assert resume(tmp_path)[1] == {"iteration": 1}


def test_has_checkpoint_and_get_checkpoint_file(tmp_path):
    checkpointer = DetectionCheckpointer(make_model(), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == ""
    assert not DetectionCheckpointer(make_model(), str(tmp_path / "missing")).has_checkpoint()
    save_run(tmp_path, [1, 3], final=True)
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    files = ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / name) for name in files]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, log):
    save_run(tmp_path, [1, 3, 5, 7])
    truncate(tmp_path / "model_0000007.pth")
    (tmp_path / "model_0000005.pth").write_bytes(b"")
    model, found = resume(tmp_path)
    assert found == {"iteration": 3}
    assert value_of(model) == 3.0
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert any("model_0000007.pth" in line for line in warnings)
    assert any("model_0000005.pth" in line for line in warnings)


def test_a_damaged_final_checkpoint_falls_back_to_a_numbered_one(tmp_path):
    save_run(tmp_path, [1, 3], final=False)
    DetectionCheckpointer(make_model(5.0), str(tmp_path)).save("model_final", iteration=5)
    assert resume(tmp_path)[1] == {"iteration": 5}
    truncate(tmp_path / "model_final.pth")
    assert resume(tmp_path)[1] == {"iteration": 3}


def test_falling_back_passes_over_the_final_checkpoint_of_a_shorter_run(tmp_path):
    # 4 iterations, then resumed with a larger MAX_ITER; the newest file is damaged.
    save_run(tmp_path, [1, 3], final=True)
    save_run(tmp_path, [5, 7])
    truncate(tmp_path / "model_0000007.pth")
    assert resume(tmp_path)[1] == {"iteration": 5}


def test_falling_back_goes_by_iteration_also_in_a_copied_folder(tmp_path):
    save_run(tmp_path, [1, 3, 5, 7])
    # A plain copy gives the files new times, in any order.
    for i in (7, 5, 3, 1):
        os.utime(tmp_path / f"model_{i:07d}.pth", (2_000_000_000 - i, 2_000_000_000 - i))
    truncate(tmp_path / "model_0000007.pth")
    assert resume(tmp_path)[1] == {"iteration": 5}


def test_an_extended_run_whose_last_checkpoint_is_lost_resumes_from_the_newest(tmp_path):
    save_run(tmp_path, [1, 3], final=True)
    save_run(tmp_path, [5, 7])
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path)[1] == {"iteration": 7}


@pytest.mark.parametrize("content", ["", "\n", "model_0000009.pth", None, b"\xff\xfe\x00"])
def test_a_last_checkpoint_that_leads_nowhere_falls_back_to_the_newest_file(tmp_path, content):
    save_run(tmp_path, [1, 3])
    if content is None:
        (tmp_path / "last_checkpoint").unlink()
    elif isinstance(content, bytes):
        (tmp_path / "last_checkpoint").write_bytes(content)
    else:
        (tmp_path / "last_checkpoint").write_text(content)
    assert resume(tmp_path)[1] == {"iteration": 3}


def test_a_last_checkpoint_that_names_a_missing_file_is_warned_about(tmp_path, log):
    save_run(tmp_path, [1])
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    resume(tmp_path)
    assert any(r.levelname == "WARNING" and "model_0000009.pth" in r.getMessage() for r in log.records)


@pytest.mark.parametrize("content", [None, "", "model_0000009.pth"])
def test_resuming_with_nothing_there_warns_and_starts_fresh(tmp_path, log, content):
    if content is not None:
        (tmp_path / "last_checkpoint").write_text(content)
    model, found = resume(tmp_path)
    assert found == {}
    assert value_of(model) == -1.0
    assert any(r.levelname == "WARNING" and str(tmp_path) in r.getMessage() for r in log.records)


def test_resuming_with_nothing_there_starts_from_the_weights(tmp_path):
    save_run(tmp_path / "other", [9])
    model = make_model()
    checkpointer = DetectionCheckpointer(model, str(tmp_path / "new"))
    assert checkpointer.resume_or_load(str(tmp_path / "other" / "model_0000009.pth"), resume=True) == {}
    assert value_of(model) == 9.0


def test_resuming_prefers_the_checkpoint_to_the_weights(tmp_path):
    save_run(tmp_path / "other", [9])
    save_run(tmp_path / "run", [1])
    model = make_model()
    checkpointer = DetectionCheckpointer(model, str(tmp_path / "run"))
    weights = str(tmp_path / "other" / "model_0000009.pth")
    assert checkpointer.resume_or_load(weights, resume=True) == {"iteration": 1}
    assert value_of(model) == 1.0


def test_fine_tuning_from_ones_own_final_model_starts_at_iteration_0(tmp_path):
    save_run(tmp_path, [1, 3], final=True)
    model = make_model(-1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    found = checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert found.get("iteration", -1) + 1 == 0
    assert value_of(model) == 3.0
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_without_resume_and_weights_the_model_stays_as_it_is(tmp_path):
    save_run(tmp_path, [1])
    model = make_model(-1.0)
    assert DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=False) == {}
    assert value_of(model) == -1.0


def test_a_run_whose_every_checkpoint_is_damaged_is_an_error(tmp_path):
    save_run(tmp_path, [1, 3])
    truncate(tmp_path / "model_0000001.pth")
    truncate(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match=r"cannot read .*model_0000001\.pth"):
        resume(tmp_path)


def test_a_file_that_is_no_checkpoint_is_a_clear_error(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    checkpointer = DetectionCheckpointer(make_model(), str(tmp_path))
    for name in ("a.pth", "b.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            checkpointer.load(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["shape", "name"])
def test_the_checkpoint_of_another_model_is_refused(tmp_path, kind):
    save_run(tmp_path, [1, 3])
    model = make_model(width=5) if kind == "shape" else nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"model_0000003\.pth.*another model.*[01]\.weight"):
        DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_a_checkpoint_without_what_is_needed_to_resume_is_refused(tmp_path):
    save_run(tmp_path, [1])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    with pytest.raises(UserError, match="optimizer"):
        checkpointer.resume_or_load("", resume=True)


def test_resuming_with_other_parameter_groups_is_a_clear_error(tmp_path):
    # As after a change of MODEL.BACKBONE.FREEZE_AT.
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000001", iteration=1)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(UserError, match="optimizer"):
        DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)


def test_resuming_with_another_optimizer_is_a_clear_error(tmp_path):
    # As after a change of SOLVER.OPTIMIZER.
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000001", iteration=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="optimizer"):
        DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)


# ---- periodic checkpoints ----------------------------------------------------------------------


def run(folder, period, max_iter, start=0, **kwargs):
    """Train for nothing: the weights after iteration i are all i. Returns the iterations due."""
    model = make_model()
    saver = PeriodicCheckpointer(DetectionCheckpointer(model, str(folder)), period, max_iter, **kwargs)
    due = []
    for i in range(start, max_iter):
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(i))
        due += [i] if saver.is_due(i) else []
        saver.step(i)
    return due


@pytest.mark.parametrize(
    ("period", "max_iter", "expected"),
    [
        (2, 6, ["model_0000001", "model_0000003", "model_0000005", "model_final"]),
        (2, 5, ["model_0000001", "model_0000003", "model_final"]),
        (0, 3, ["model_final"]),
        (100, 3, ["model_final"]),
        (1, 1, ["model_0000000", "model_final"]),
    ],
)
def test_periodic_checkpoints_come_after_each_period_and_at_the_end(tmp_path, period, max_iter, expected):
    due = run(tmp_path, period, max_iter)
    assert names(tmp_path) == ["last_checkpoint", *[name + ".pth" for name in expected]]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    numbered = [int(name[-7:]) for name in expected[:-1]]
    assert due == sorted({*numbered, max_iter - 1})
    for i in numbered:
        assert torch.load(tmp_path / f"model_{i:07d}.pth", weights_only=True)["iteration"] == i
    model, found = resume(tmp_path)
    assert found == {"iteration": max_iter - 1}
    assert value_of(model) == max_iter - 1


def test_without_an_end_there_is_no_final_checkpoint(tmp_path):
    saver = PeriodicCheckpointer(DetectionCheckpointer(make_model(), str(tmp_path)), 2)
    assert [i for i in range(6) if saver.is_due(i)] == [1, 3, 5]
    for i in range(6):
        saver.step(i)
    assert "model_final.pth" not in names(tmp_path)


def test_what_step_is_given_is_saved(tmp_path):
    saver = PeriodicCheckpointer(DetectionCheckpointer(make_model(), str(tmp_path)), 1, max_iter=5)
    saver.step(0, config="yaml", best=3.0)
    assert resume(tmp_path)[1] == {"iteration": 0, "config": "yaml", "best": 3.0}


def test_the_last_checkpoint_is_written_once_under_two_names(tmp_path, monkeypatch):
    saved = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: saved.append(1) or save(*args))
    run(tmp_path, period=2, max_iter=4)
    assert len(saved) == 2
    assert os.path.samefile(tmp_path / "model_0000003.pth", tmp_path / "model_final.pth")


def test_where_there_are_no_hard_links_the_final_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path, period=2, max_iter=4)
    final, numbered = tmp_path / "model_final.pth", tmp_path / "model_0000003.pth"
    assert not os.path.samefile(final, numbered)
    assert final.read_bytes() == numbered.read_bytes()
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", numbered.name, final.name]


def test_the_final_checkpoint_of_a_shorter_run_is_replaced(tmp_path):
    run(tmp_path, period=2, max_iter=4)
    run(tmp_path, period=2, max_iter=8, start=4)
    assert resume(tmp_path)[1] == {"iteration": 7}
    assert torch.load(tmp_path / "model_0000003.pth", weights_only=True)["iteration"] == 3
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 7


def test_linking_twice_leaves_no_temporary_file(tmp_path):
    save_run(tmp_path, [1], final=True)
    DetectionCheckpointer(make_model(), str(tmp_path)).link("model_0000001", "model_final")
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_final.pth"]


@pytest.mark.parametrize(
    ("keep", "expected"), [(0, [1, 3, 5, 7]), (1, [7]), (2, [5, 7]), (3, [3, 5, 7]), (5, [1, 3, 5, 7])]
)
def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path, keep, expected):
    run(tmp_path, period=2, max_iter=9, max_to_keep=keep)
    files = [f"model_{i:07d}.pth" for i in expected]
    assert names(tmp_path) == ["last_checkpoint", *files, "model_final.pth"]
    assert resume(tmp_path)[1] == {"iteration": 8}


def test_checkpoints_of_before_a_resume_count_among_those_kept(tmp_path):
    run(tmp_path, period=2, max_iter=6)
    run(tmp_path, period=2, max_iter=10, start=6, max_to_keep=2)
    assert names(tmp_path) == ["last_checkpoint", "model_0000007.pth", "model_0000009.pth", "model_final.pth"]


def test_pruning_leaves_other_files_and_the_final_checkpoint_alone(tmp_path):
    others = ["model_best.pth", "model_0000001.pth.bak", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text(name)
    run(tmp_path, period=1, max_iter=4, max_to_keep=1)
    assert set(names(tmp_path)) == {*others, "last_checkpoint", "model_0000003.pth", "model_final.pth"}


def test_pruning_never_removes_the_checkpoint_just_saved(tmp_path):
    # A run is taken back to an earlier point, so files of later iterations lie there.
    run(tmp_path, period=2, max_iter=20)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    model = make_model()
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 3}
    PeriodicCheckpointer(checkpointer, 2, max_iter=20, max_to_keep=2).step(5)
    assert resume(tmp_path)[1] == {"iteration": 5}


def test_the_config_says_when_checkpoints_come_and_how_many_are_kept(tmp_path):
    cfg, model = get_cfg(), make_model()
    cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 7])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_MAX_TO_KEEP", 1])
    cfg.OUTPUT_DIR = str(tmp_path)
    saver = build_periodic_checkpointer(cfg, model, {})
    assert [i for i in range(7) if saver.is_due(i)] == [1, 3, 5, 6]
    for i in range(7):
        saver.step(i)
    assert names(tmp_path) == ["last_checkpoint", "model_0000005.pth", "model_final.pth"]
    cfg.MODEL.EMA.ENABLED = True
    saver = build_periodic_checkpointer(cfg, model, {"ema": build_ema(cfg, model)})
    saver.step(6)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"


# ---- a checkpoint out of turn, and the end of a run ----------------------------------------------


@pytest.fixture
def saves(monkeypatch):
    """How often a file of tensors was written."""
    calls, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *args: calls.append(1) or save(*args))
    return calls


def read(path):
    return torch.load(path, weights_only=True)


def make_saver(folder, value=0.0, final=None, about=None, **kwargs):
    """A `PeriodicCheckpointer` of a run of 6 iterations; `final` is the value of the final weights."""
    model = make_model(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(folder), about=about, optimizer=optimizer)
    final_model = None if final is None else lambda: nn.DataParallel(make_model(final))
    return PeriodicCheckpointer(checkpointer, 4, max_iter=6, final_model=final_model, **kwargs)


def test_a_checkpoint_may_come_before_its_time(tmp_path, saves):
    saver = make_saver(tmp_path, value=1.0)
    saver.step(0)
    saver.step(1, now=True, reason="time")
    saver.step(2)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"] and len(saves) == 1
    found = read(tmp_path / "model_0000001.pth")
    assert (found["iteration"], found["reason"]) == (1, "time") and "optimizer" in found


def test_what_is_due_anyway_is_not_saved_twice(tmp_path, saves):
    saver = make_saver(tmp_path)
    saver.step(3, now=True)
    assert len(saves) == 1
    saver.step(5, now=True)
    assert len(saves) == 2
    assert os.path.samefile(tmp_path / "model_0000005.pth", tmp_path / "model_final.pth")


def test_a_run_that_ends_early_has_its_final_model(tmp_path, saves):
    saver = make_saver(tmp_path, value=2.0)
    saver.step(2)
    saver.finish(2, reason="patience")
    assert names(tmp_path) == ["last_checkpoint", "model_final.pth"] and len(saves) == 1
    model, found = resume(tmp_path)
    assert (found["iteration"], found["reason"], value_of(model)) == (2, "patience", 2.0)


def test_a_run_that_ends_early_where_it_was_saved_links_its_final_model(tmp_path, saves):
    saver = make_saver(tmp_path)
    saver.step(3)
    saver.finish(3)
    assert len(saves) == 1 and resume(tmp_path)[1]["iteration"] == 3
    assert os.path.samefile(tmp_path / "model_0000003.pth", tmp_path / "model_final.pth")


@pytest.mark.parametrize("early", [False, True])
def test_other_final_weights_leave_a_numbered_checkpoint_to_resume_from(tmp_path, saves, early):
    saver = make_saver(tmp_path, value=2.0, final=7.0, about={"class_names": ["a"]})
    saver.step(3)
    last = 4 if early else 5
    if early:
        saver.finish(4, reason="patience")
    else:
        saver.step(5, reason="patience")
    numbered = f"model_{last:07d}.pth"
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth", numbered, "model_final.pth"]
    assert len(saves) == 3
    assert (tmp_path / "last_checkpoint").read_text() == numbered
    final = read(tmp_path / "model_final.pth")
    assert set(final) == {"model", "class_names", "reason"}
    model = make_model()
    model.load_state_dict(final["model"])
    assert value_of(model) == 7.0

    again = make_saver(tmp_path).checkpointer
    found = again.resume_or_load("", resume=True)
    assert found == {"iteration": last, "class_names": ["a"], "reason": "patience"}
    assert value_of(again.model) == 2.0
    # And by whoever lost the tag.
    (tmp_path / "last_checkpoint").unlink()
    assert again.resume_or_load("", resume=True)["iteration"] == last
    assert again.get_checkpoint_file() == str(tmp_path / numbered)
    # Another training may start from them.
    assert again.resume_or_load(str(tmp_path / "model_final.pth"), resume=False) == {}
    assert value_of(again.model) == 7.0


def test_other_final_weights_cost_no_second_checkpoint_where_one_is_due(tmp_path, saves):
    saver = make_saver(tmp_path, final=7.0)
    saver.max_iter = 4
    saver.step(3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth", "model_final.pth"]
    assert len(saves) == 2


def test_the_final_weights_are_asked_for_when_they_are_saved(tmp_path):
    values = iter([1.0, 2.0])
    saver = make_saver(tmp_path)
    saver.final_model = lambda: make_model(next(values))
    saver.step(3)
    saver.step(5)
    final = make_model()
    final.load_state_dict(read(tmp_path / "model_final.pth")["model"])
    assert value_of(final) == 1.0


def test_the_best_weights_are_never_resumed_from(tmp_path):
    saver = make_saver(tmp_path, value=1.0)
    saver.step(3)
    saver.checkpointer.save_weights("model_best", make_model(9.0), iteration=4, AP=12.5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    best = read(tmp_path / "model_best.pth")
    assert set(best) == {"model", "iteration", "AP"} and (best["iteration"], best["AP"]) == (4, 12.5)
    for name in ("last_checkpoint", "model_0000003.pth"):
        found = saver.checkpointer.resume_or_load("", resume=True)
        assert found["iteration"] == 3 and value_of(saver.checkpointer.model) == 1.0
        (tmp_path / name).unlink()
    assert not saver.checkpointer.has_checkpoint()
    assert saver.checkpointer.resume_or_load(str(tmp_path / "model_best.pth"), resume=False) == {}
    assert value_of(saver.checkpointer.model) == 9.0


def test_weights_are_saved_under_the_models_own_names_and_only_by_who_writes(tmp_path):
    checkpointer = DetectionCheckpointer(make_model(), str(tmp_path))
    checkpointer.save_weights("model_best", nn.DataParallel(make_model(3.0)))
    assert read(tmp_path / "model_best.pth")["model"].keys() == make_model().state_dict().keys()
    folder = tmp_path / "rank-1"
    checkpointer = DetectionCheckpointer(make_model(), str(folder), save_to_disk=False)
    checkpointer.save_weights("model_best", make_model())
    saver = PeriodicCheckpointer(checkpointer, 2, max_iter=2, final_model=lambda: make_model(1.0))
    saver.step(0, now=True)
    saver.step(1)
    assert not folder.exists()


# ---- what every file says about its run ----------------------------------------------------------


def test_every_file_holds_what_is_to_be_known_about_its_run(tmp_path):
    about = {"class_names": ["cat", "dog"], "config": "text"}
    saver = make_saver(tmp_path, final=1.0, about=about)
    saver.step(5)
    saver.checkpointer.save_weights("model_best", make_model(), config="mine")
    for name in ("model_0000005", "model_final"):
        found = read(tmp_path / f"{name}.pth")
        assert {key: found[key] for key in about} == about
    # What is given for one file goes before.
    assert read(tmp_path / "model_best.pth")["config"] == "mine"
    assert resume(tmp_path)[1].items() >= about.items()


@pytest.mark.parametrize(("given", "warns"), [(None, True), (["cat", "dog"], False)])
def test_the_class_names_of_the_run_are_those_that_weights_are_taken_for(tmp_path, log, given, warns):
    make_saver(tmp_path, about={"class_names": ["cat", "dog"]}).save("model_0000001", iteration=1)
    checkpointer = DetectionCheckpointer(make_model(), about={"class_names": ["ant", "bee"]})
    checkpointer.resume_or_load(str(tmp_path / "model_0000001.pth"), resume=False, class_names=given)
    assert ("was trained for the classes ['cat', 'dog'], here they are ['ant', 'bee']" in log.text) == warns


def test_a_run_that_is_stopped_in_an_evaluation_saves_what_its_last_step_was_given(tmp_path):
    saver = PeriodicCheckpointer(DetectionCheckpointer(make_model(), str(tmp_path)), 0)
    saver.step(6, due=(False, True), skipped_steps=(3, 1))
    with pytest.raises(Stopped), saver.saving_if_stopped(6, due=(False, False)):
        raise Stopped
    data = torch.load(tmp_path / "model_0000006.pth", weights_only=True)
    assert (data["iteration"], data["skipped_steps"], data["due"]) == (6, (3, 1), (False, False))
    (tmp_path / "model_0000006.pth").unlink()
    # Once is enough, and before the first step there is nothing.
    for iteration in (6, -1):
        with pytest.raises(Stopped), saver.saving_if_stopped(iteration):
            raise Stopped
    assert names(tmp_path) == ["last_checkpoint"]
