"""Collectives over two ranks, and without a process group: plaintrain.utils.comm."""

import pytest
import rank_functions
import torch
from processes import Job
from torch import nn

from plaintrain.utils import comm


@pytest.mark.parametrize("check", [rank_functions.check_collectives, rank_functions.check_averaged_norms])
def test_collectives_of_two_ranks(tmp_path, check):
    Job(check, tmp_path / "job", num_gpus_per_machine=2).wait(code=0)


def test_ranks_of_a_single_process_ignore_the_scheduler(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (comm.get_rank(), comm.get_world_size(), comm.is_main_process()) == (0, 1, True)
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)


def test_collectives_of_a_single_process_return_their_input():
    data, losses = object(), {"loss": torch.tensor(2.0)}
    assert comm.all_gather(data) == [data] and comm.gather(data) == [data]
    assert comm.broadcast(data) is data and comm.reduce_dict(losses) is losses
    comm.synchronize()
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(3.0)
    with comm.averaged_norm_buffers(layer):
        assert layer.running_mean.item() == 3.0
    assert comm.any_rank(torch.tensor(1)) is True and comm.any_rank(0) is False
    seeds = set()
    for _ in range(20):
        torch.manual_seed(0)
        seeds.add(comm.shared_random_seed())
    assert len(seeds) > 15 and all(0 <= seed < 2**31 for seed in seeds)
