"""A short run of the fuzzer, and that it finds what it is there to find."""

import copy
import functools
import io
import time
from unittest.mock import Mock

import pytest
import torch
from fuzz_readers import READERS, fuzz
from seed_files import FILES, build_run

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.files import DamagedCheckpointError
from plaintrain.utils.errors import UserError

# A smoke test has few inputs.
SIZES = [*((name, 60) for name in READERS), *(pytest.param(n, 300, marks=pytest.mark.long) for n in READERS)]


@pytest.mark.parametrize(("name", "inputs"), SIZES)
def test_readers_give_records_or_a_clear_error_whatever_a_file_holds(name, inputs):
    report = fuzz(name, inputs, seed=7)
    assert report.foreign + report.unclear == []
    assert report.counts.total() == inputs and report.slowest < 5
    # Both happen often enough for the run to mean something; of a report, only sections are missing.
    assert report.counts["refused"] >= 0.3 * inputs or name == "report"
    assert inputs < 300 or report.counts["ok"] >= 5


# Of each entry of a checkpoint, what it must not be; ... is a missing one.
_NO_COUNT = (True, -9, 2**62, 10**400, 1.0, "1", None, torch.tensor(1), ...)
_NO_STATE = ([], [{}], None, 1, "x", torch.zeros(2), ...)
_NO_FLOATS = (None, [1.0], torch.zeros(2), torch.ones(4, 3).to_sparse(), torch.ones(4, 3, device="meta"))
_NO_FLOATS += (torch.ones(4, 3).long(), torch.ones(4, 3) + 1j, torch.full((4, 3), torch.nan), ...)
MALFORMED = {
    ("iteration",): _NO_COUNT,
    ("config",): ("a: [", "- a", "!!python/object/apply:os.system [x]"),
    ("class_names",): (5, "a, b", [1], {"a": 1}),
    ("data_hashes",): (5, "ab", [1], [[1, "a"]], [[1, 2, 3]], {"a": 1}, torch.ones(2)),
    ("model",): (*_NO_STATE, {}, {1: torch.zeros(2)}),
    ("model", "0.weight"): (*_NO_FLOATS, torch.zeros(1).expand(2**45)),
    ("model", "1.running_var"): (torch.full((4,), torch.inf), ...),
    ("model", "extra"): (torch.zeros(1),),
    ("optimizer",): (*_NO_STATE, {}, {"state": {}}),
    ("optimizer", "state"): (None, {9: {}}, {"0": {}}, {0: []}, {0: {"step": None}}),
    ("optimizer", "state", 0, "exp_avg"): _NO_FLOATS,
    ("optimizer", "state", 0, "step"): (torch.tensor(-1.0), torch.tensor(torch.nan), torch.ones(2), 1, ...),
    ("optimizer", "state", 0, "exp_avg_sq"): (-torch.ones(4, 3), ...),
    ("optimizer", "param_groups"): ([], {}, [1], [{"params": [0]}] * 2),
    ("optimizer", "param_groups", 0, "params"): ([], [0, 0], [1, 0], [0, True], ["0", "1"], ...),
    ("optimizer", "param_groups", 0, "lr"): ("0.1", torch.nan, True, None, ...),
    ("optimizer", "param_groups", 0, "betas"): (0.9, (0.9,), ("a", "b"), ...),
    ("scheduler",): _NO_STATE,
    ("scheduler", "last_epoch"): _NO_COUNT,
    ("scaler", "scale"): (torch.nan, "1", None, ...),
    ("scaler", "_growth_tracker"): _NO_COUNT,
    ("ema", "module.0.weight"): _NO_FLOATS,
    ("ema", "n_averaged"): (torch.tensor(-10), torch.tensor(1.0), torch.ones(2), 1, ...),
    ("early_stopping",): _NO_STATE,
    ("early_stopping", "value"): (torch.nan, "x", [1.0], ...),
    ("early_stopping", "num_waited"): _NO_COUNT,
    ("nonfinite", "num_skipped"): _NO_COUNT,
    ("storage", "scalars"): ([], {"loss": []}, {"loss": [[], True]}, {"loss": [[[1, 2, 3]], True]}, {1: []}),
    ("storage", "scalars", "loss", 1): ("x", 1, None),
    ("storage", "unwritten"): (None, [1], "ab", ...),
    ("data_loader", "iteration"): _NO_COUNT,
    ("data_loader", "sampler"): ([1], {"size": 10}, {"size": 10, "phases": []}),
    ("data_loader", "sampler", "phases"): ([[0, 0, 0]], [[1, 0, 2]], [[0, 0, 2], [1, 9, 2]], [[0, 0]], None),
    ("rng_states",): (None, 1, [1], [{}]),
    ("rng_states", 0, "python"): ([3, [1] * 624, None], [3, [-1] * 625, None], [2, [1] * 625, "x"], None),
    ("rng_states", 0, "numpy", 2): (10**6, -1, 1.0, None),
    ("rng_states", 0, "cpu"): (torch.zeros(5056).byte(), torch.zeros(8).byte(), torch.zeros(5056), ...),
    ("norm_buffers",): (1, [1], [{"model": {"0.weight": 1}, "ema": {}}], [{"model": {"new": 1}, "ema": {}}]),
}


@pytest.mark.parametrize(("path", "values"), MALFORMED.items(), ids=map(str, MALFORMED))
def test_malformed_checkpoint_changes_nothing_and_the_one_before_it_is_resumed(tmp_path, path, values):
    newest, older = tmp_path / "model_0000007.pth", tmp_path / "model_0000001.pth"
    good = FILES["checkpoint"][older.name]
    for value in values:
        older.unlink(missing_ok=True)
        data = torch.load(io.BytesIO(good), weights_only=True)
        node = functools.reduce(lambda node, key: node[key], path[:-1], data)
        if value is ...:
            del node[path[-1]]
        else:
            node[path[-1]] = value
        torch.save(data, newest)
        model, states, step = build_run()
        before = copy.deepcopy([model.state_dict(), *(state.state_dict() for state in states.values())])
        checkpointer = DetectionCheckpointer(model, str(tmp_path), **states)
        with pytest.raises(DamagedCheckpointError, match=r"model_0000007\.pth"):
            checkpointer.resume_or_load("")
        after = [model.state_dict(), *(state.state_dict() for state in states.values())]
        assert str(before) == str(after)
        older.write_bytes(good)
        assert checkpointer.resume_or_load("")["iteration"] == 1
        step(2)


def test_unchanged_files_are_accepted(monkeypatch):
    monkeypatch.setattr("fuzz_readers.mutate", lambda path, data, rng: data)
    for name in READERS:
        assert fuzz(name, 2).counts == {"ok": 2}, name


def test_errors_of_other_types_unclear_ones_and_readers_that_hang_are_reported(monkeypatch):
    class_names = Mock(side_effect=KeyError("seeded"))
    monkeypatch.setattr("plaintrain.data.datasets.yolo._get_class_names", class_names)
    line = fuzz("yolo", 20).foreign[0]
    assert "seeded" in line and "KeyError" in line and "--reader yolo --first " in line
    number = int(line.split("--first ")[1].split(":")[0])
    assert len(fuzz("yolo", 1, first=number).foreign) == 1
    class_names.side_effect = UserError("it is wrong")
    report = fuzz("yolo", 20)
    assert "names neither" in report.unclear[0] and not report.foreign
    monkeypatch.setattr("fuzz_readers.MAX_SECONDS", 0.1)
    class_names.side_effect = lambda *_: time.sleep(100)
    assert "TimeoutError" in fuzz("yolo", 2).foreign[0]
