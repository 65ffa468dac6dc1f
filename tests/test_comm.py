"""Collectives over two ranks, and without a process group."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from processes import Job

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What `rank_functions.collect` found on rank 0 and on rank 1."""
    folder = tmp_path_factory.mktemp("comm") / "job"
    job = Job(rank_functions.collect, folder, num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    results = job.results()
    assert len(results) == 2
    return results


# ---- two ranks -------------------------------------------------------------------------------


def test_reduce_dict_averages_by_name_on_every_rank(ranks):
    assert [dict(rank["mean"]) for rank in ranks] == [{"a": 15.0, "b": 1.5, "c": 1.5}] * 2


def test_reduce_dict_sums_by_name_on_every_rank(ranks):
    assert [dict(rank["sum"]) for rank in ranks] == [{"a": 30.0, "b": 3.0, "c": 3.0}] * 2


def test_reduce_dict_keeps_the_order_of_its_input(ranks):
    assert [name for name, _ in ranks[0]["mean"]] == ["b", "a", "c"]
    assert [name for name, _ in ranks[1]["mean"]] == ["a", "b", "c"]


def test_reduce_dict_returns_no_graph_and_leaves_its_input_alone(ranks):
    assert [rank["grad"] for rank in ranks] == [False, False]
    assert [rank["untouched"] for rank in ranks] == [[1.0, True], [2.0, True]]


def test_all_gather_gives_every_rank_all_objects_in_order(ranks):
    expected = [{"rank": 0, "data": [None, ""]}, {"rank": 1, "data": [None, "x"]}]
    assert [rank["all_gather"] for rank in ranks] == [expected, expected]


def test_gather_gives_the_objects_to_one_rank_only(ranks):
    assert [rank["gather"] for rank in ranks] == [[["rank", 0], ["rank", 1]], []]
    assert [rank["gather to 1"] for rank in ranks] == [[], [0, 1]]


def test_broadcast_gives_every_rank_the_object_of_one(ranks):
    assert [rank["broadcast"] for rank in ranks] == [{"from": 0}] * 2
    assert [rank["broadcast from 1"] for rank in ranks] == [1, 1]


def test_shared_random_seed_is_the_same_on_every_rank(ranks):
    assert ranks[0]["seed"] == ranks[1]["seed"] >= 0


def test_average_buffers_averages_running_statistics_only(ranks):
    for number, rank in enumerate(ranks):
        state = rank["state"]
        assert state["1.running_mean"] == [1.5, 1.5] and state["1.running_var"] == [1.5, 2.5]
        for name in ("0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "1.num_batches_tracked"):
            values = torch.tensor(state[name]).flatten().tolist()
            assert values and set(values) == {number + 1}, name


def test_ranks_agree_on_a_flag_on_names_and_on_the_statistics_of_several_models(tmp_path):
    job = Job(rank_functions.agree, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    # One sends less if a model that is given twice is sent once, and all of them together.
    expected = {"flags": [False, True, True, True], "means": [0.5, 12.0], "averaged": [4]}
    assert job.results() == [expected, expected]


# ---- one process -----------------------------------------------------------------------------


def test_a_single_process_is_the_main_one_of_one():
    assert (comm.get_rank(), comm.get_world_size(), comm.is_main_process()) == (0, 1, True)
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)


def test_local_rank_of_a_scheduler_does_not_count_without_a_process_group(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)


def test_collectives_of_a_single_process_return_what_they_get():
    data, losses = object(), {"loss": torch.tensor(2.0)}
    assert comm.all_gather(data) == [data] and comm.gather(data) == [data]
    assert comm.broadcast(data) is data
    assert comm.reduce_dict(losses) is losses and comm.reduce_dict(losses, average=False) is losses
    assert comm.reduce_dict({}) == {}
    assert comm.synchronize() is None
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(3.0)
    comm.average_buffers(layer, layer)
    assert layer.running_mean.item() == 3.0
    assert comm.any_rank(torch.tensor(1)) is True and comm.any_rank(0) is False


def test_shared_random_seeds_are_31_bits_and_differ_whatever_the_global_seed():
    seeds = set()
    for _ in range(20):
        torch.manual_seed(0)
        seeds.add(comm.shared_random_seed())
    assert len(seeds) > 15 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_single_process_needs_a_loss_too():
    assert comm.check_loss_names({"accuracy": 1.0, "b_loss": 1.0}) is None
    with pytest.raises(UserError, match=r"nothing to minimise: no key of \['a', 'b'\] contains 'loss'"):
        comm.check_loss_names({"b": 1.0, "a": 1.0})
