"""What a checkpoint may hold, and a small training whose state one holds."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from plaintrain.config import get_cfg
from plaintrain.ema import ModelEMA
from plaintrain.solver import build_lr_scheduler, build_optimizer

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
        "SOLVER.NESTEROV": st.just(False),
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
            self.parts["ema"].update()
            losses.append(loss.item())
            self.iteration += 1
        return losses

    def state(self):
        """All of it, as plain data."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.parts["optimizer"].param_groups]
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {"model": dict(self.model.state_dict()), "groups": groups, **states}
