"""Checkpoints: whatever is saved is loaded to the bit, and the newest ones are kept."""

import copy
import os
import re
import tempfile

import checkpoint_defects as broken
import numpy as np
import pytest
import torch
from checkpoint_cases import NAMES, SETTINGS, VALUES, Holder, Training, same, tensors
from hypothesis import strategies as st
from property_helpers import assert_caught, checks_of, defects_of, examine, for_all, patched
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from plaintrain.ema import ModelEMA
from plaintrain.solver import LRScheduler


def written(folder, name):
    return os.path.join(folder, f"{name}.pth")


@for_all(VALUES, st.lists(tensors(), max_size=4), VALUES)
def check_values_are_loaded_as_they_were_saved(value, layouts, about):
    """Any nested value, given to `save` or the checkpointer, and a model's tensors; all stay unchanged."""
    before = copy.deepcopy((value, layouts, about))
    target = Holder([torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in layouts])
    with tempfile.TemporaryDirectory() as folder:
        DetectionCheckpointer(Holder(layouts), folder, about={"about": about}).save("any", value=value)
        data = DetectionCheckpointer(target, folder).load(written(folder, "any"))
    assert set(data) == {"value", "about"}
    assert same((data["value"], list(target.buffers()), data["about"]), before)
    assert same((value, layouts, about), before)


NUMPY = st.one_of(
    st.integers(2**53, 2**63 - 1).map(np.int64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.integers(0, 255).map(np.uint8),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
)


@for_all(st.dictionaries(NAMES, NUMPY, max_size=3))
def check_numbers_of_numpy_become_those_of_python(numbers):
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = DetectionCheckpointer(nn.Identity(), folder)
        checkpointer.save("any", numbers=numbers)
        data = checkpointer.load(written(folder, "any"))
    assert same(data["numbers"], {name: number.item() for name, number in numbers.items()})


@for_all(st.lists(tensors(), max_size=3))
def check_later_changes_do_not_reach_what_is_saved(values):
    """Written in the background, a file holds what was there when `save` was called."""
    expected = []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = DetectionCheckpointer(nn.Identity(), folder, asynchronous=True)
        for name in ("one", "two"):
            expected.append((name, copy.deepcopy(values)))
            checkpointer.save(name, values=values)
            for value in values:
                value.untyped_storage().fill_(1)
        checkpointer.wait()
        for name, old in expected:
            assert same(checkpointer.load(written(folder, name))["values"], old)


@for_all(SETTINGS, st.integers(0, 6), st.integers(1, 4), examples=40)
def check_a_training_goes_on_as_if_it_had_not_stopped(settings, done, more):
    """Optimizer, schedule, scaler and averaged weights: all states, and all that follows from them."""
    first, second = Training(settings, seed=0), Training(settings, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        first.run(done)
        DetectionCheckpointer(first.model, folder, **first.parts).save("any", iteration=done - 1)
        before = copy.deepcopy(first.state())
        checkpointer = DetectionCheckpointer(second.model, folder, **second.parts)
        data = checkpointer.resume_or_load("", resume=True)
    second.iteration = data["iteration"] + 1
    assert same(second.state(), before)
    assert second.run(more) == first.run(more)
    assert same(second.state(), first.state())


# From the ten millionth iteration on, names have a digit more.
AT_TEN_MILLION = st.integers(10**7 - 3, 10**7 + 3)
ORDERS = st.lists(st.integers(0, 10**4) | AT_TEN_MILLION, min_size=1, max_size=4, unique=True)


@for_all(ORDERS, st.floats(0, 0.999))
def check_the_last_one_that_is_whole_is_resumed(iterations, share):
    """The last that was written, in whatever order; cut off anywhere, the newest of the others."""

    def resumed():
        model = nn.Linear(1, 1)
        return DetectionCheckpointer(model, folder).resume_or_load("")["iteration"], model.weight.item()

    with tempfile.TemporaryDirectory() as folder:
        for i in iterations:
            model = nn.Linear(1, 1)
            nn.init.constant_(model.weight, i)
            DetectionCheckpointer(model, folder).save(f"model_{i:07d}", iteration=i)
        last = iterations[-1]
        assert resumed() == (last, np.float32(last))
        others = sorted(iterations[:-1])
        if others:
            path = written(folder, f"model_{last:07d}")
            os.truncate(path, int(os.path.getsize(path) * share))
            assert resumed() == (others[-1], np.float32(others[-1]))


@st.composite
def runs(draw):
    """(first iteration, period, last one or None, number to keep, iterations saved in any case)."""
    start = draw(st.sampled_from([10**7 - 3, 0]))
    length, period = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 0]))
    extra = draw(st.sets(st.integers(start, start + length - 1), max_size=2))
    max_iter = start + length if draw(st.booleans()) else None
    return start, period, length, max_iter, draw(st.integers(0, 3)), extra


@for_all(runs())
def check_exactly_the_newest_are_kept(run):
    start, period, length, max_iter, keep, extra = run
    saved = []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = DetectionCheckpointer(nn.Linear(1, 1), folder)
        periodic = PeriodicCheckpointer(checkpointer, period, max_iter, keep)
        for i in range(start, start + length):
            periodic.step(i, now=i in extra)
            is_last = max_iter is not None and i == max_iter - 1
            due = i in extra or (period > 0 and (i + 1) % period == 0)
            assert periodic.is_due(i) == (is_last or (period > 0 and (i + 1) % period == 0))
            saved += [i] * due
            names = {f"model_{n:07d}.pth" for n in (saved[-keep:] if keep else saved)}
            names |= {"model_final.pth"} if is_last else set()
            assert {name for name in os.listdir(folder) if re.fullmatch(r"model_.*\.pth", name)} == names
            for name in names:
                number = re.search(r"\d+", name)
                data = checkpointer.load(os.path.join(folder, name))
                assert data["iteration"] == (int(number.group()) if number else i)


CHECKS = checks_of(globals())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check):
    examine(check)


# ---- seeded defects

DEFECTS = {
    check_values_are_loaded_as_they_were_saved: {
        "bfloat16 is widened": broken.saved_tensors(lambda t: t.float() if t.dtype == torch.bfloat16 else t),
        "the sign of zero is lost": broken.saved_tensors(lambda t: t + 0 if t.is_floating_point() else t),
        "a number becomes a list": broken.saved_tensors(lambda t: t.reshape(1) if t.dim() == 0 else t),
        "the layout is not read": broken.saved_tensors(broken.in_storage_order),
        "int64 goes through float": broken.saved_tensors(broken.through_float),
        "tuples become lists": broken.saved(lambda v: list(v) if isinstance(v, tuple) else v),
        "numbers go through float32": broken.saved(
            lambda v: torch.tensor(v).item() if isinstance(v, float) else v
        ),
        "True becomes 1": broken.saved(lambda v: int(v) if isinstance(v, bool) else v),
        "keys become strings": broken.saved(
            lambda v: {str(key): item for key, item in v.items()} if isinstance(v, dict) else v
        ),
        "what is None is left out": broken.saved(
            lambda v: {key: item for key, item in v.items() if item is not None} if isinstance(v, dict) else v
        ),
    },
    check_numbers_of_numpy_become_those_of_python: {
        "numbers become text": broken.saved(lambda v: str(v) if type(v) is float else v),
        "whole numbers go through float": broken.saved(lambda v: int(float(v)) if type(v) is int else v),
    },
    check_later_changes_do_not_reach_what_is_saved: {"no copy is made": broken.nothing_is_copied},
    check_a_training_goes_on_as_if_it_had_not_stopped: {
        "momenta are lost": broken.optimizer_state_lost,
        "the schedule is one step ahead": patched(LRScheduler, "load_state_dict", broken.one_step_ahead),
        "the learning rate is not set again": patched(LRScheduler, "load_state_dict", broken.not_applied),
        "averaged weights start anew": patched(ModelEMA, "load_state_dict", lambda self, state: None),
        "the number of averaged steps is lost": broken.averages_counted_anew,
        "the scale is lost": patched(torch.amp.GradScaler, "load_state_dict", lambda self, state: None),
    },
    check_the_last_one_that_is_whole_is_resumed: {
        "the last one is not noted": broken.last_is_not_noted,
        "names are sorted as text": broken.sorted_as_text,
        "a damaged file counts as empty": broken.damage_is_silent,
    },
    check_exactly_the_newest_are_kept: {
        "one too many is kept": broken.periodic_with(max_to_keep=1),
        "the period is one longer": broken.periodic_with(period=1),
        "counting starts at one": broken.steps_counted_from_one,
        "there is no final one": patched(PeriodicCheckpointer, "finish", lambda self, i, **_: None),
        "names are sorted as text": broken.sorted_as_text,
    },
}


def test_every_property_has_a_seeded_defect():
    assert list(DEFECTS) == CHECKS


@pytest.mark.long
@pytest.mark.parametrize(("check", "defect"), defects_of(DEFECTS))
def test_a_seeded_defect_is_caught(check, defect, monkeypatch):
    defect(monkeypatch)
    assert_caught(check)
