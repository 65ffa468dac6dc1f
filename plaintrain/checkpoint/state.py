"""States of optimizers, running statistics and random generators, as plain data and back."""

import logging
import numbers
import random

import numpy as np
import torch

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_GROUPED_BY = (
    "its parameters are chosen and grouped by MODEL.BACKBONE.FREEZE_AT, SOLVER.BACKBONE_MULTIPLIER, "
    "BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM"
)
_NORM_BUFFERS = (".running_mean", ".running_var")


def load_state(item, state, name):
    """Call `item.load_state_dict(state)`; `name` is what to call the state in an error."""
    if isinstance(item, torch.amp.GradScaler) and not state:
        # The run had no float16 so far; the scaler begins here, and would reject an empty state.
        return
    is_optimizer = isinstance(item, torch.optim.Optimizer)
    try:
        if is_optimizer:
            _load_optimizer(item, state)
        else:
            item.load_state_dict(state)
    except (ValueError, LookupError, TypeError) as e:
        hint = f"; {_GROUPED_BY}" if is_optimizer else ""
        raise UserError(f"{name} does not fit this run: {e}{hint}") from e


def _load_optimizer(optimizer, state):
    """Load a state; decay and Nesterov's momentum stay those of the config, a schedule sets the rest."""
    groups, kept = optimizer.param_groups, ("weight_decay", "nesterov")
    options = [{key: group[key] for key in kept if key in group} for group in groups]
    # torch itself accepts the state of either.
    for key in ("betas", "momentum"):
        if (key in state["param_groups"][0]) != (key in groups[0]):
            raise ValueError("it is of another type, see SOLVER.OPTIMIZER")
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def convert_older_states(data):
    """Give the states of a checkpoint of plaintrain 0.x the names that they have now, in place."""
    if "best" in data:
        data["early_stopping"] = data.pop("best")
    if "skipped_steps" in data:
        num_skipped, num_in_row = data.pop("skipped_steps")
        data["nonfinite"] = {"num_skipped": num_skipped, "num_in_row": num_in_row}
    if "log_window" in data:
        data["storage"] = {"iteration": data.get("iteration", -1), **data.pop("log_window")}
    # What was to be evaluated: the schedule says it.
    data.pop("due", None)


def convert_to_builtin_types(value, name):
    """Return a value as types that `torch.load(weights_only=True)` reads: NumPy's numbers as Python's."""
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


def average_norm_buffers(state):
    """Replace the running statistics in a model's state dict by their average over ranks.

    All ranks call it. The model keeps its own statistics, which differ between ranks.
    """
    names = [name for name in state if name.endswith(_NORM_BUFFERS)]
    state.update(zip(names, comm.average_tensors(state[name] for name in names), strict=True))


def gather_norm_buffers(states):
    """Average the running statistics in a checkpoint's "model" and "ema"; all ranks call it.

    Returns:
        {"norm_buffers": [each rank's own ones]} on rank 0; {} where there are none, or only one rank.
    """
    if comm.get_world_size() == 1:
        return {}
    own = {}
    for key in ("model", "ema"):
        state = states.get(key, {})
        own[key] = {name: t.cpu() for name, t in state.items() if name.endswith(_NORM_BUFFERS)}
        average_norm_buffers(state)
    return {"norm_buffers": comm.gather(own)} if own["model"] else {}


def restore_norm_buffers(states):
    """Put what `gather_norm_buffers` saved of this rank into the states of the model and its EMA.

    With another number of ranks the averages stay.
    """
    saved = states.pop("norm_buffers", [])
    if len(saved) == comm.get_world_size():
        for key, own in saved[comm.get_rank()].items():
            states.get(key, {}).update(own)


def gather_rng_states():
    """Return [the state of Python's, NumPy's and PyTorch's generators of each rank] on rank 0, else [].

    All ranks call it.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return comm.gather(state)


def load_rng_states(states):
    """Set this rank's generators to what `rng_states` returned; with another number of ranks, only warn."""
    if len(states) != comm.get_world_size():
        logger.warning(
            f"the checkpoint has the random state of {len(states)} processes, and here there are "
            f"{comm.get_world_size()}: from here on, what is drawn in the model is drawn anew"
        )
        return
    state = states[comm.get_rank()]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
