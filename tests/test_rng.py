"""Random generators that go on where a run was interrupted."""

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


def test_every_generator_goes_on_from_a_checkpoint(tmp_path):
    np.random.randn()
    random.gauss(0, 1)
    model = nn.Linear(1, 1)
    parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with EventStorage():
        DetectionCheckpointer(model, str(tmp_path), **parts).save("model_0000000", iteration=0)
    expected = [draw(), draw()]
    # Elsewhere, something else is drawn in between.
    draw()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load("")
    assert [draw(), draw()] == expected
    assert "rng_states" not in state


def test_loading_weights_moves_no_generator(tmp_path):
    with EventStorage():
        DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("model_0000000", iteration=0)
    torch.manual_seed(7)
    expected = torch.rand(2).tolist()
    torch.manual_seed(7)
    model = nn.Linear(1, 1)
    torch.manual_seed(7)
    DetectionCheckpointer(model).resume_or_load(str(tmp_path / "model_0000000.pth"), resume=False)
    assert torch.rand(2).tolist() == expected


@pytest.mark.parametrize("number", [0, 2])
def test_states_of_another_number_of_processes_are_left_with_a_warning(number, log):
    states = rng_states() * number
    torch.manual_seed(5)
    load_rng_states(states)
    assert torch.initial_seed() == 5
    assert f"the random state of {number} processes, and here there are 1" in log.text
