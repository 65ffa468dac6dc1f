"""States of optimizers, norm layers and random generators, as plain data and back."""

import logging
import numbers
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Options of an optimizer that do not change during a run.
_OWN_OPTIONS = (
    *("weight_decay", "nesterov", "dampening", "eps", "amsgrad", "decoupled_weight_decay", "maximize"),
    *("fused", "foreach", "capturable", "differentiable"),
)
# Batch norm, and RetinaNet's moving average of foreground anchors.
NORM_BUFFERS = (".running_mean", ".running_var", "loss_normalizer")


def load_state(item: Any, state: dict[str, Any], name: str) -> None:
    """Call `item.load_state_dict(state)`; errors call the state `name`."""
    if isinstance(item, torch.amp.GradScaler) and not state:
        # The run has not used float16 so far, and the scaler would reject an empty state.
        return
    try:
        if isinstance(item, torch.optim.Optimizer):
            _load_optimizer(item, state)
        else:
            item.load_state_dict(state)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{name} does not fit this run: {e}") from e


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, but keep the options of the config and the code; the scheduler sets the rest."""
    options = [{key: group[key] for key in _OWN_OPTIONS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def convert_older_states(data: dict[str, Any]) -> None:
    """Rename the states of a checkpoint of plaintrain 0.x in place."""
    if "best" in data:
        data["early_stopping"] = data.pop("best")
    if "skipped_steps" in data:
        num_skipped, num_in_row = data.pop("skipped_steps")
        data["nonfinite"] = {"num_skipped": num_skipped, "num_in_row": num_in_row}
    if "log_window" in data:
        window = data.pop("log_window")
        window["unwritten"] = list(window["unwritten"])
        data["storage"] = {"iteration": data.get("iteration", -1), **window}
    # What is due now follows from the iteration.
    data.pop("due", None)


def convert_to_builtin_types(value: Any, name: str) -> Any:
    """Convert NumPy numbers to Python numbers, which `torch.load(weights_only=True)` reads."""
    if isinstance(value, bool | str | torch.Tensor | type(None)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, dict):
        return {key: convert_to_builtin_types(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(convert_to_builtin_types(item, name) for item in value)
    raise UserError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


def average_norm_buffers(state: dict[str, Tensor]) -> None:
    """Average the running statistics in a state dict, but not in the model, over ranks; all ranks call it."""
    names = [name for name in state if name.endswith(NORM_BUFFERS)]
    state.update(zip(names, comm.average_tensors(state[name] for name in names), strict=True))


def gather_norm_buffers(states: dict[str, Any]) -> dict[str, Any]:
    """Average the running statistics in the "model" and "ema" of a checkpoint; all ranks call it.

    Return {"norm_buffers": those of each rank} on rank 0, or {}.
    """
    if comm.get_world_size() == 1:
        return {}
    own = {}
    for key in ("model", "ema"):
        state = states.get(key, {})
        own[key] = {name: t.cpu() for name, t in state.items() if name.endswith(NORM_BUFFERS)}
        average_norm_buffers(state)
    return {"norm_buffers": comm.gather(own)} if own["model"] else {}


def restore_norm_buffers(states: dict[str, Any]) -> None:
    """Replace the averages by this rank's own statistics, unless the number of ranks has changed."""
    saved = states.pop("norm_buffers", [])
    if len(saved) == comm.get_world_size():
        for key, own in saved[comm.get_rank()].items():
            states.get(key, {}).update(own)


def gather_rng_states() -> list[dict[str, Any]]:
    """Return the RNG states of all ranks on rank 0, else []; all ranks call it."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return comm.gather(state)


def load_rng_states(states: list[dict[str, Any]]) -> None:
    """Restore this rank's generators; with another number of ranks, only warn."""
    if len(states) != comm.get_world_size():
        logger.warning(
            f"the checkpoint has RNG states of {len(states)} processes, this run has "
            f"{comm.get_world_size()}; random numbers in the model differ from those of an uninterrupted run"
        )
        return
    state = states[comm.get_rank()]
    set_generators(state, random, np.random, torch.set_rng_state)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def set_generators(state: dict[str, Any], python: Any, numpy: Any, set_cpu: Callable[[Tensor], Any]) -> None:
    """Set the state of the modules `random` and `numpy.random`, or objects like these, and of PyTorch."""
    version, words, gauss = state["python"]
    python.setstate((version, tuple(words), gauss))
    name, keys, *position = state["numpy"]
    numpy.set_state((name, keys.numpy().astype(np.uint32), *position))
    set_cpu(state["cpu"])
