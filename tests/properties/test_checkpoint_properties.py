"""Checkpoints: whatever is saved is loaded to the bit, and the newest ones are kept."""

import copy
import os
import re
import tempfile

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.training_checkpointer import TrainingCheckpointer
from plaintrain.config import get_cfg
from plaintrain.solver import build_lr_scheduler, build_optimizer
from plaintrain.solver.ema import ModelEMA

DTYPES = [torch.int64, torch.bfloat16, torch.float32, torch.bool, torch.float16, torch.float64, torch.uint8]


@st.composite
def tensors(draw):
    """A tensor of any bits and of any layout: empty, 0-d, turned, sliced, spread."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([3, 2, 1, 0]), min_size=draw(st.sampled_from([2, 0])), max_size=3))
    number = int(np.prod(shape, dtype=int))
    size = torch.empty(0, dtype=dtype).element_size()
    # Any bits, or the sign alone: a zero that is negative.
    signs = (bytes(size - 1) + b"\x80") * number
    bits = st.binary(min_size=number * size, max_size=number * size)
    data = bytearray(signs if draw(st.integers(0, 3)) == 3 else draw(bits))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=dtype) if number else torch.empty(0, dtype=dtype)
    value = flat.reshape(shape).clone()
    layout = draw(st.sampled_from(["turned", "sliced", "spread", "plain"]))
    if layout == "turned":
        value = value.permute(list(range(value.dim()))[::-1])
    elif layout == "sliced" and value.dim():
        value = value[::2]
    elif layout == "spread":
        value = value[None].expand(3, *value.shape)
    return value


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), NAMES)
VALUES = st.recursive(
    SCALARS | tensors(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(NAMES | st.integers(-5, 5), inner, max_size=3),
    ),
    max_leaves=8,
)


def same(a, b):
    """Of the same types throughout, and the same to the bit; the layout of a tensor is its own affair."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or (a != a and b != b)
    return a == b


def _bits(tensor):
    packed = torch.empty(tensor.numel(), dtype=tensor.dtype)
    packed.copy_(tensor.detach().reshape(-1))
    return packed.view(torch.uint8).tolist()


class Holder(nn.Module):
    """A module that holds tensors."""

    def __init__(self, values):
        super().__init__()
        for i, value in enumerate(values):
            self.register_buffer(f"value_{i}", value)


# The settings of a training that a checkpoint may be in the middle of.
SETTINGS = st.fixed_dictionaries(
    {
        "SOLVER.OPTIMIZER": st.sampled_from(["SGD", "AdamW"]),
        "SOLVER.MOMENTUM": st.sampled_from([0.0, 0.9]),
        "SOLVER.BASE_LR": st.floats(1e-4, 0.1),
        "SOLVER.WARMUP_ITERS": st.integers(0, 6),
        "SOLVER.MAX_ITER": st.just(12),
        "SOLVER.STEPS": st.lists(st.integers(1, 12), max_size=2).map(sorted).map(tuple),
        "SOLVER.LR_SCHEDULER_NAME": st.sampled_from(["WarmupMultiStepLR", "WarmupCosineLR"]),
        "SOLVER.MOMENTUM_SCHEDULE": st.sampled_from([[], [[0, 0.5], [8, 0.9]]]),
    }
)


class Training:
    """A model with all that a run keeps beside it, trained on noise that the iteration decides."""

    def __init__(self, settings, seed, decay=0.9):
        cfg = get_cfg()
        cfg.merge_from_list([part for pair in settings.items() for part in pair])
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = build_optimizer(cfg, self.model)
        self.parts = {
            "optimizer": optimizer,
            "scheduler": build_lr_scheduler(cfg, optimizer),
            "ema": ModelEMA(self.model, decay=decay),
            "scaler": torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2),
        }
        self.iteration = 0

    def run(self, steps):
        """Train on; returns the losses."""
        optimizer, scaler = self.parts["optimizer"], self.parts["scaler"]
        losses = []
        for _ in range(steps):
            data = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.iteration))
            loss = self.model(data).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            self.parts["scheduler"].step()
            self.parts["ema"].update(self.model)
            losses.append(loss.item())
            self.iteration += 1
        return losses

    def state(self):
        """All of it, as plain data."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.parts["optimizer"].param_groups]
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {"model": dict(self.model.state_dict()), "groups": groups, **states}


def written(folder, name):
    return os.path.join(folder, f"{name}.pth")


@given(VALUES | tensors(), st.lists(tensors(), max_size=4), VALUES)
def test_values_are_loaded_as_saved(value, layouts, about):
    """Any nested value, given to `save` or the checkpointer, and a model's tensors; all stay unchanged."""
    before = copy.deepcopy((value, layouts, about))
    target = Holder([torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in layouts])
    with tempfile.TemporaryDirectory() as folder:
        DetectionCheckpointer(Holder(layouts), folder, metadata={"about": about}).save("any", value=value)
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


@given(st.dictionaries(NAMES, NUMPY, max_size=3))
def test_numpy_numbers_become_python_numbers(numbers):
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = DetectionCheckpointer(nn.Identity(), folder)
        checkpointer.save("any", numbers=numbers)
        data = checkpointer.load(written(folder, "any"))
    assert same(data["numbers"], {name: number.item() for name, number in numbers.items()})


@given(st.lists(tensors(), max_size=3))
def test_later_changes_do_not_affect_a_checkpoint(values):
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


@settings(max_examples=40)
@given(SETTINGS, st.integers(0, 6), st.integers(1, 4))
def test_resumed_training_equals_an_uninterrupted_one(settings, done, more):
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


@given(ORDERS, st.floats(0, 0.999))
def test_last_intact_checkpoint_is_resumed(iterations, share):
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
    """(first iteration, number of iterations, period, number to keep, iterations saved beside the period)."""
    start = draw(st.sampled_from([10**7 - 3, 0]))
    length, period = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 0]))
    extra = draw(st.sets(st.integers(start, start + length - 1), min_size=1, max_size=3))
    return start, length, period, draw(st.integers(0, 3)), extra


@given(runs())
def test_prune_keeps_exactly_the_newest(run):
    """Those of the period, as many as are to be kept, and the newest one, which becomes the final one."""
    start, length, period, keep, extra = run
    of_period = []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = TrainingCheckpointer(nn.Linear(1, 1), folder, period=period, max_to_keep=keep)

        def check(names, newest):
            assert {name for name in os.listdir(folder) if re.fullmatch(r"model_.*\.pth", name)} == names
            for name in names:
                number = re.search(r"\d+", name)
                data = checkpointer.load(os.path.join(folder, name))
                assert data["iteration"] == (int(number.group()) if number else newest)

        for i in range(start, start + length):
            is_due = period > 0 and (i + 1) % period == 0
            if is_due or i in extra:
                checkpointer.save_iteration(i)
                of_period = [*of_period, *([i] * is_due)][-keep:]
                check({f"model_{n:07d}.pth" for n in {*of_period, i}}, i)
                newest = i
        checkpointer.save_final()
        check({"model_final.pth", *(f"model_{n:07d}.pth" for n in of_period)}, newest)
