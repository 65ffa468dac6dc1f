"""plaintrain.data.samplers: streams that are pure functions of the seed and the position."""

import itertools

import numpy as np
import pytest

from plaintrain.data.samplers import InferenceSampler, TrainingSampler, aspect_ratio_groups
from plaintrain.utils.errors import UserError

GROUPS = np.random.default_rng(0).integers(0, 2, size=103)


def _images(sampler, iterations):
    return [image for i in range(iterations) for image, _ in sampler.batch(i)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("size", "batch_size"), [(103, 8), (103, 1), (96, 8), (5, 8), (1, 4), (7, 7), (3, 20)]
)
def test_each_pass_holds_every_image_once_though_batches_straddle_passes(size, batch_size, grouped):
    sampler = TrainingSampler(size, batch_size, seed=1, groups=GROUPS[:size] if grouped else None)
    iterations = -(-6 * size // batch_size)
    images = _images(sampler, iterations)
    assert len(images) == iterations * batch_size
    passes = [images[i * size : (i + 1) * size] for i in range(6)]
    assert all(sorted(order) == list(range(size)) for order in passes)
    if size > 10:
        assert len({tuple(order) for order in passes}) == 6


def test_positions_count_on_and_name_their_image():
    sampler = TrainingSampler(10, 4, seed=1)
    keys = [key for i in range(8) for key in sampler.batch(i)]
    assert [position for _, position in keys] == list(range(32))
    assert [sampler.index_at(position) for _, position in keys] == [image for image, _ in keys]
    assert all(type(image) is int for image, _ in keys)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_one_stream_without_loss_or_repeats(world_size, groups):
    whole = TrainingSampler(103, 12, seed=2, groups=groups)
    ranks = [TrainingSampler(103, 12, seed=2, groups=groups) for _ in range(world_size)]
    for iteration in range(40):
        shares = [sampler.batch(iteration, rank, world_size) for rank, sampler in enumerate(ranks)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert list(itertools.chain(*shares)) == whole.batch(iteration)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_stream_can_be_entered_anywhere_in_any_order(groups):
    whole = TrainingSampler(103, 8, seed=3, groups=groups)
    batches = [whole.batch(i) for i in range(60)]
    for iteration in np.random.default_rng(0).permutation(60):
        assert TrainingSampler(103, 8, seed=3, groups=groups).batch(iteration) == batches[iteration]
        assert whole.batch(iteration) == batches[iteration]
    assert 0 <= whole.index_at(10**12) < 103


def test_the_seed_decides_the_order():
    orders = [_images(TrainingSampler(50, 5, seed=seed), 10) for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_a_later_pass_is_not_another_seeds_pass():
    first = [_images(TrainingSampler(50, 50, seed=seed), 3) for seed in range(3)]
    passes = [tuple(images[i : i + 50]) for images in first for i in (0, 50, 100)]
    assert len(set(passes)) == 9


def test_without_shuffling_images_come_in_their_order():
    assert _images(TrainingSampler(5, 3, shuffle=False), 4) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_no_image_is_refused():
    with pytest.raises(UserError, match="no image"):
        TrainingSampler(0, 2)


# ---- batches of one group


def _mixed(sampler, groups, passes):
    """For each pass, how many of the batches within it hold two groups."""
    size, batch_size = sampler.size, sampler.batch_size
    counts = [0] * passes
    for iteration in range(passes * size // batch_size):
        first, last = iteration * batch_size // size, ((iteration + 1) * batch_size - 1) // size
        if first == last:
            counts[first] += len({groups[image] for image, _ in sampler.batch(iteration)}) > 1
    return counts


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_at_most_one_batch_within_a_pass_mixes_the_groups(batch_size):
    counts = _mixed(TrainingSampler(103, batch_size, seed=4, groups=GROUPS), GROUPS, 12)
    assert max(counts) <= 1
    assert min(_mixed(TrainingSampler(103, batch_size, seed=4), GROUPS, 12)) > 1


def test_a_rare_group_is_neither_repeated_nor_lost():
    groups = np.zeros(40, dtype=int)
    groups[:3] = 1
    sampler = TrainingSampler(40, 8, seed=5, groups=groups)
    assert max(_mixed(sampler, groups, 10)) <= 1
    images = _images(sampler, 50)
    assert [images.count(image) for image in range(40)] == [10] * 40


def test_batches_of_the_groups_come_in_random_order_with_random_members():
    sampler = TrainingSampler(96, 8, seed=6, groups=GROUPS[:96])
    orders, members = set(), set()
    for number in range(6):
        batches = [[image for image, _ in sampler.batch(number * 12 + i)] for i in range(12)]
        orders.add(tuple(round(GROUPS[batch].mean()) for batch in batches))
        members.update(frozenset(batch) for batch in batches)
    assert len(orders) == 6
    assert not any(list(order) in (sorted(order), sorted(order, reverse=True)) for order in orders)
    assert len(members) == 72


def test_aspect_ratio_groups_tell_upright_images_from_the_others():
    groups = aspect_ratio_groups([10, 20, 10], [20, 10, 10])
    assert groups[0] != groups[1]
    assert groups[0] == groups[2]


# ---- evaluation


def test_inference_ranks_cover_every_image_once_in_even_contiguous_shares():
    for size, world_size in itertools.product(range(20), range(1, 9)):
        samplers = [InferenceSampler(size, rank, world_size) for rank in range(world_size)]
        shares = [list(sampler) for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
        assert list(itertools.chain(*shares)) == list(range(size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
