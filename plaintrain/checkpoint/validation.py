"""Check the content of a checkpoint, which is untrusted, against the objects that it is loaded into."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plaintrain.checkpoint.files import are_finite, check_plain, reading
from plaintrain.checkpoint.state import NORM_BUFFERS, convert_older_states, set_generators

_COUNTS = range(2**31)
# The tensors that an optimizer keeps of a parameter; those of other optimizers are not known.
_MOMENTS = {torch.optim.SGD: ["momentum_buffer"], torch.optim.AdamW: ["step", "exp_avg", "exp_avg_sq"]}
_NOT_NEGATIVE = ("step", "exp_avg_sq", "n_averaged")
_GROUPING_KEYS = (
    "its type is SOLVER.OPTIMIZER, and its parameters are chosen and grouped by MODEL.BACKBONE.FREEZE_AT, "
    "SOLVER.BACKBONE_MULTIPLIER, BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM"
)
_OPTIONS: dict[str, Any] = {
    "lr": float,
    "momentum": float,
    "betas": (float, float),
}
_SCALER_STATE: dict[str, Any] = {"scale": float, "growth_factor": float, "backoff_factor": float}
_SCALER_STATE |= {"growth_interval": int, "_growth_tracker": int}
_RNG_STATE = {
    "python": (int, [range(2**32)], lambda gauss: gauss is None or type(gauss) is float),
    "numpy": (str, torch.zeros(624, dtype=torch.int64), range(625), range(2), float),
    "cpu": torch.Generator().get_state(),
}


def check_form(value: Any, form: Any, name: str) -> None:
    """Raise a `ValueError` if a value read from a file does not have the expected form.

    `form` is {name: form}, which ignores other names unless all are tensors, or {str: form}; [form] for any
    length, (form, ...) for that length; a tensor for its shape; a range; a type, where integers are not
    negative and floats are finite; or a function that returns whether a value is valid.
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
    else:
        is_valid = _is_valid(value, form)
    if not is_valid:
        shown = value if isinstance(value, str | int | float) else type(value).__name__
        raise ValueError(f"{name} is invalid: {shown!s:.80}")


def _is_valid(value: Any, form: Any) -> bool:
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is int:
        return type(value) is int and value in _COUNTS
    if form is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    return isinstance(value, form) if isinstance(form, type) else form(value)


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
    """Check a state if its form is known; the empty one is that of an object that was disabled."""
    form = getattr(item, "state_types", None)
    if isinstance(item, torch.optim.Optimizer):
        _check_optimizer(saved, item, name)
    elif form is not None:
        check_form(saved, form, name)
    else:
        form = _SCALER_STATE if isinstance(item, torch.amp.GradScaler) else item.state_dict()
        is_known = form is _SCALER_STATE or all(isinstance(value, Tensor) for value in form.values())
        check_form(saved, form if saved and is_known and form else dict, name)


def _check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    check_form(saved, {"state": dict, "param_groups": [{"params": [int]}]}, name)
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
