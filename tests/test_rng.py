"""Random generators that continue where a run was interrupted: plaintrain.utils.rng."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.utils.events import EventStorage
from plaintrain.utils.rng import load_rng_states, rng_states


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(2).tolist()


def test_generators_continue_from_a_checkpoint_that_is_resumed_only(tmp_path):
    np.random.randn()
    random.gauss(0, 1)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    with EventStorage():
        checkpointer.save("model_0000000", iteration=0)
    expected = [draw(), draw()]
    state = checkpointer.resume_or_load("")
    assert [draw(), draw()] == expected and "rng_states" not in state
    # Loading weights moves no generator.
    path = str(tmp_path / "model_0000000.pth")
    DetectionCheckpointer(model).resume_or_load(path, resume=False)
    assert draw() not in expected


@pytest.mark.parametrize("number", [0, 2])
def test_states_of_another_number_of_processes_are_ignored_with_a_warning(number, log):
    states = rng_states() * number
    torch.manual_seed(5)
    load_rng_states(states)
    assert torch.initial_seed() == 5
    assert f"the random state of {number} processes, and here there are 1" in log.text
