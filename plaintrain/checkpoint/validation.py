"""Check the content of a checkpoint, which is untrusted, against the objects that it is loaded into."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plaintrain.checkpoint.files import are_finite, check_plain, reading
from plaintrain.checkpoint.state import NORM_BUFFERS, convert_older_states, set_generators

_COUNT = range(2**31)
# The tensors that an optimizer keeps of a parameter; those of other optimizers are not known.
_MOMENTS = {torch.optim.SGD: ["momentum_buffer"], torch.optim.AdamW: ["step", "exp_avg", "exp_avg_sq"]}
_OPTIONS: dict[str, Any] = {"lr": float, "momentum": float, "betas": (float, float)}
_NOT_NEGATIVE = ("step", "exp_avg_sq", "n_averaged")
_GROUPING_KEYS = (
    "its type is SOLVER.OPTIMIZER, and its parameters are chosen and grouped by MODEL.BACKBONE.FREEZE_AT, "
    "SOLVER.BACKBONE_MULTIPLIER, BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM"
)
_RNG_STATE = {
    "python": (_COUNT, [range(2**32)], lambda gauss: gauss is None or type(gauss) is float),
    "numpy": (str, torch.zeros(624, dtype=torch.int64), range(625), range(2), float),
    "cpu": torch.Generator().get_state(),
}


def _is_optional(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def _is_window(pairs: Any) -> bool:
    """Return whether a value holds the (value, iteration) pairs of a scalar; the value may be NaN."""
    return bool(pairs) and all(
        isinstance(v, int | float) and type(iteration) is int for v, iteration in pairs
    )


def _is_sampler_state(state: Any) -> bool:
    """Return whether each phase (iteration, position, batch size) follows from the one before it."""
    if "size" not in state:  # An empty state, or that of a custom sampler.
        return isinstance(state, dict)
    phases = state["phases"]
    counts = [count for phase in phases for count in [*phase, len(phase) - 3]]
    follows = [b[1] == a[1] + (b[0] - a[0]) * a[2] for a, b in itertools.pairwise(phases)]
    are_valid = all(type(count) is int and count in range(2**53) for count in counts) and all(follows)
    return are_valid and phases[0][:2] == [0, 0] and all(phase[2] for phase in phases)


# The forms of the states in a checkpoint, by their names.
_STATES: dict[str, dict[str, Any]] = {
    "scheduler": {"last_epoch": _COUNT},
    "scaler": dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float)
    | {"growth_interval": _COUNT, "_growth_tracker": _COUNT},
    "nonfinite": {"num_skipped": _COUNT, "num_in_row": _COUNT},
    "early_stopping": {"metric": str, "value": _is_optional, "iteration": _is_optional, "num_waited": _COUNT},
    "storage": {"iteration": range(-1, 2**31), "scalars": {str: (_is_window, bool)}, "unwritten": [str]},
    "data_loader": {"iteration": _COUNT, "num_replaced": _COUNT, "sampler": _is_sampler_state},
}
_STATES["early_stopping"]["seen"] = range(-2, 2**31)


def check_form(value: Any, form: Any, name: str) -> None:
    """Raise a `ValueError` if a value read from a file does not have the expected form.

    `form` is {name: form}, which ignores other names unless all are tensors, or {str: form}; [form] for any
    length, (form, ...) for that length; a tensor for its shape; a range; a type, where floats are finite;
    or a function that returns whether a value is valid.
    """
    if isinstance(form, Tensor):
        check_plain(value, name)
        is_valid = (value.shape, value.is_floating_point()) == (form.shape, form.is_floating_point())
        value = f"{value.dtype} {list(value.shape)}, not {form.dtype} {list(form.shape)}"
    elif isinstance(form, dict):
        is_valid = isinstance(value, dict) and all(type(key) is str for key in value)
        is_exact = str in form or all(isinstance(item, Tensor) for item in form.values())
        keys = (form | value if is_exact else form) if is_valid else {}
        for key in [key for key in keys if key is not str]:
            if key not in value or not (key in form or str in form):
                raise ValueError(f"{name} has {'no' if key in form else 'an unknown'} {key}")
            check_form(value[key], form.get(key, form.get(str)), f"{name}.{key}")
    elif isinstance(form, list | tuple):
        is_valid = isinstance(value, list | tuple) and (isinstance(form, list) or len(value) == len(form))
        for i, item in enumerate(value if is_valid else ()):
            check_form(item, form[0] if isinstance(form, list) else form[i], f"{name}.{i}")
    elif isinstance(form, range):
        is_valid = type(value) is int and value in form
    elif form is float:
        is_valid = type(value) in (int, float) and -1e300 < value < 1e300
    else:
        is_valid = isinstance(value, form) if isinstance(form, type) else form(value)
    if not is_valid:
        shown = value if isinstance(value, str | int | float) else type(value).__name__
        raise ValueError(f"{name} is invalid: {shown!s:.80}")


def check_states(
    path: str, data: dict[str, Any], model: nn.Module, items: Mapping[str, Any], averaged: bool = False
) -> None:
    """Convert the states of older versions, and raise a `DamagedCheckpointError` if anything does not fit."""
    own = model.state_dict()
    names = {"n_averaged", *dict(model.named_parameters())}
    names |= {name for name in own if name.endswith(NORM_BUFFERS)}
    with reading(path):
        convert_older_states(data)
        check_form(data["model"], own, "it holds another model, or a damaged one: model")
        if averaged and data.get("ema"):
            averages = {f"module.{name}": value for name, value in own.items()}
            check_form(data["ema"], averages | {"n_averaged": torch.tensor(0)}, "ema")
        if not items:
            return
        for name in ["iteration", *items]:
            if name not in data:
                raise ValueError(f"it holds no {name}, which is needed to resume from it")
        for name, item in items.items():
            _check_state(data[name], item, name)
        for buffers in data.get("norm_buffers", []):
            form = {name: {key: data[name][key] for key in buffers[name]} for name in ("model", "ema")}
            check_form(buffers, form, "norm_buffers")
        _check_rng_states(data.get("rng_states", []))
        for name in ("model", "ema"):
            tensors = data.get(name, {}).items()
            _check_numbers({k: v for k, v in tensors if k.removeprefix("module.") in names}, name)


def _check_state(saved: Any, item: Any, name: str) -> None:
    """Check a state if its form is known; that of a disabled object is empty."""
    if isinstance(item, torch.optim.Optimizer):
        _check_optimizer(saved, item, name)
        return
    own = item.state_dict()
    form = own if all(isinstance(value, Tensor) for value in own.values()) else _STATES.get(name, {})
    is_disabled = name in ("ema", "scaler") and not saved
    check_form(saved, form if own and form.keys() <= own.keys() and not is_disabled else dict, name)


def _check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    check_form(saved, {"state": dict, "param_groups": [{"params": [_COUNT]}]}, name)
    groups = saved["param_groups"]
    lengths = [len(group["params"]) for group in optimizer.param_groups]
    moments = _MOMENTS.get(type(optimizer), [])
    options = {key: form for key, form in _OPTIONS.items() if key in optimizer.param_groups[0] and moments}
    if [len(group["params"]) for group in groups] != lengths or not options.keys() <= groups[0].keys():
        raise ValueError(f"the {name} does not fit this run; {_GROUPING_KEYS}")
    check_form(groups, [options], f"{name}.param_groups")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [i for group in groups for i in group["params"]]
    if indices != list(range(len(parameters))) or not saved["state"].keys() <= set(indices):
        raise ValueError(f"{name} has an invalid list of parameters")
    num_missing = 0
    for i, parameter in enumerate(parameters):
        state = saved["state"].get(i, {})
        check_form(state, dict, f"{name}.{i}")
        if not state or (len(moments) == 1 and state[moments[0]] is None):
            num_missing += "momentum_buffer" in optimizer.state.get(parameter, {})
            continue
        form = {key: torch.tensor(0.0) if key == "step" else parameter for key in moments}
        check_form({key: state[key] for key in moments}, form, f"{name}.{i}")
        _check_numbers({key: state[key] for key in moments}, f"{name}.{i}")
    if num_missing not in (0, len(parameters)):
        raise ValueError(f"{name} has no momentum of {num_missing} parameters")


def _check_rng_states(states: list[dict[str, Any]]) -> None:
    """Check the random states of all ranks; also load them into other generators."""
    for state in states:
        check_form(state, _RNG_STATE, "rng_states")
        set_generators(state, random.Random(), np.random.RandomState(), torch.Generator().set_state)
        for device in state.keys() & {"cuda", "mps"}:
            check_plain(state[device], f"rng_states.{device}")
            if getattr(torch, device).is_available():
                torch.Generator(device).set_state(state[device])


def _check_numbers(tensors: dict[str, Tensor], name: str) -> None:
    """Raise a `ValueError` for NaN and infinity, and for a negative count or second moment."""
    for key, tensor in tensors.items():
        if not are_finite(tensor) or (key in _NOT_NEGATIVE and (tensor < 0).any()):
            raise ValueError(f"{name}.{key} has an invalid number")
