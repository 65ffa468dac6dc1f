"""Collectives over two ranks, and without a process group: plaintrain.utils.comm."""

import pytest
import rank_functions
import torch
from processes import Job
from torch import nn

from plaintrain.utils import comm


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What `rank_functions.collect` returned on rank 0 and on rank 1."""
    job = Job(rank_functions.collect, tmp_path_factory.mktemp("comm"), num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    return job.results()


def test_reduce_dict_averages_and_sums_by_name_in_the_order_of_its_input(ranks):
    assert ranks[0]["mean"] == [["b", 1.5], ["a", 15.0], ["c", 1.5]]
    assert ranks[1]["mean"] == [["a", 15.0], ["b", 1.5], ["c", 1.5]]
    assert [dict(rank["sum"]) for rank in ranks] == [{"a": 30.0, "b": 3.0, "c": 3.0}] * 2
    assert [rank["grad"] for rank in ranks] == [False, False]
    assert [rank["untouched"] for rank in ranks] == [[1.0, True], [2.0, True]]


def test_objects_of_all_ranks_go_to_all_or_to_one(ranks):
    everything = [{"rank": 0, "data": [None, ""]}, {"rank": 1, "data": [None, "x"]}]
    assert [rank["all_gather"] for rank in ranks] == [everything, everything]
    assert [rank["gather"] for rank in ranks] == [[["rank", 0], ["rank", 1]], []]
    assert [rank["gather to 1"] for rank in ranks] == [[], [0, 1]]
    assert [rank["broadcast"] for rank in ranks] == [{"from": 0}] * 2
    assert [rank["broadcast from 1"] for rank in ranks] == [1, 1]


def test_shared_random_seed_is_the_same_on_every_rank(ranks):
    assert ranks[0]["seed"] == ranks[1]["seed"] >= 0


def test_averaged_norm_buffers_averages_running_statistics_only(ranks):
    for number, rank in enumerate(ranks):
        state = rank["state"]
        assert state["1.running_mean"] == [1.5, 1.5] and state["1.running_var"] == [1.5, 2.5]
        for name in ("0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "1.num_batches_tracked"):
            values = torch.tensor(state[name]).flatten().tolist()
            assert values and set(values) == {number + 1}, name


def test_ranks_agree_on_a_flag_and_on_the_statistics_of_several_models(ranks):
    assert [rank["flags"] for rank in ranks] == [[False, True, True, True]] * 2
    assert [rank["means"] for rank in ranks] == [[0.5, 12.0]] * 2
    # They are sent together, and are a rank's own again afterwards.
    assert [rank["averaged"] for rank in ranks] == [[4], [4]]
    assert [rank["own means"] for rank in ranks] == [[0.0, 10.0], [1.0, 14.0]]


def test_a_single_process_is_the_main_one_of_one_whatever_a_scheduler_says(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (comm.get_rank(), comm.get_world_size(), comm.is_main_process()) == (0, 1, True)
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)


def test_collectives_of_a_single_process_return_what_they_get():
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
