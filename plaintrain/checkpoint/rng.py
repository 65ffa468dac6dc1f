"""The state of every rank's random generators, to go on drawing where a run was interrupted."""

import logging
import random

import numpy as np
import torch

from plaintrain.utils import comm

logger = logging.getLogger(__name__)


def _state():
    """This process' generators as plain data: Python's, NumPy's, PyTorch's on the CPU and its device."""
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
    return state


def rng_states():
    """What `_state` gives on each rank, a list on rank 0 and [] elsewhere; all ranks call it."""
    return comm.gather(_state())


def load_rng_states(states):
    """Set this rank's generators to what was saved.

    Args:
        states: what `rng_states` returned on rank 0. Of another number of ranks, nothing is set and the
            log says so: what is drawn is then not what it would have been.
    """
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
