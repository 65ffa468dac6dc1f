"""Samplers lose and repeat no image, whatever the size, batch, number of ranks, seed and grouping."""

import functools
import itertools
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plaintrain.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)

FACTORS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 4, allow_subnormal=False))


@st.composite
def cases(draw, grouped=None, longest=24):
    """A sampler's arguments: `make()` gives it anew, `make(4)` with another batch, `plain()` without groups.

    `low` and `high` say how often an image may come in a pass, each a number for each image.
    """
    size, batch_size = draw(st.integers(1, 40)), draw(st.integers(1, longest))
    seed, kind = draw(st.integers(0, 2**40)), draw(st.sampled_from(["all", "repeat", "subset"]))
    grouping, low, high = {}, np.ones(size, dtype=int), np.ones(size, dtype=int)
    if draw(st.booleans()) if grouped is None else grouped:
        numbers = st.one_of(st.integers(0, 2), st.floats(0.25, 4))
        grouping["groups"] = draw(st.lists(numbers, min_size=size, max_size=size))
        grouping["window"] = draw(st.integers(0, 4))
    factors = np.array(draw(st.lists(FACTORS, min_size=size, max_size=size)))
    factors[0] = max(factors[0], 1.0)
    if kind == "all":
        make = functools.partial(TrainingSampler, size, shuffle=draw(st.booleans()))
    elif kind == "repeat":
        make = functools.partial(RepeatFactorTrainingSampler, factors)
        low, high = np.floor(factors).astype(int), np.ceil(factors).astype(int)
    else:
        make = functools.partial(RandomSubsetTrainingSampler, size, draw(st.floats(0.01, 1)))
        low = np.zeros(size, dtype=int)
    return SimpleNamespace(
        make=lambda batch=batch_size: make(batch, seed=seed, **grouping),
        plain=lambda: make(batch_size, seed=seed),
        kind=kind,
        factors=factors,
        low=low,
        high=high,
        grouping=grouping,
    )


def pass_of(sampler, number):
    """The images of a pass, as batches give them."""
    start, stop = number * sampler.size, (number + 1) * sampler.size
    first, last = start // sampler.batch_size, -(-stop // sampler.batch_size)
    images = [image for i in range(first, last) for image, _ in sampler.get_batch(i)]
    offset = start - first * sampler.batch_size
    return images[offset : offset + sampler.size]


def counts_of(case, images):
    """How often each image comes in a pass: within the limits of its case."""
    counts = np.bincount(images, minlength=len(case.low))
    assert (case.low <= counts).all() and (counts <= case.high).all()
    return counts


PASSES = st.lists(st.integers(0, 10**6), max_size=2).map(lambda more: [0, 1, 2, *more])


@settings(max_examples=200)
@given(cases(), PASSES)
def test_a_pass_holds_each_image_as_often_as_it_should(case, numbers):
    """Once each, or each factor rounded, in passes of one length; a subset is always the same."""
    sampler, images_of = case.make(), []
    for number in numbers:
        images = pass_of(sampler, number)
        assert len(images) == sampler.size
        images_of.append(counts_of(case, images))
    if case.kind == "repeat":
        assert sampler.size == round(case.factors.sum())
    else:
        assert all((counts == images_of[0]).all() for counts in images_of)


@given(cases(), st.integers(0, 10**4))
def test_ranks_share_the_batch_whatever_their_number(case, iteration):
    whole = case.make()
    batch = whole.get_batch(iteration)
    for world_size in range(1, whole.batch_size + 1):
        if whole.batch_size % world_size:
            continue
        shares = [case.make().get_batch(iteration, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {whole.batch_size // world_size}
        positions = Counter(position for share in shares for _, position in share)
        assert set(positions.values()) == {1}
        assert list(itertools.chain(*shares)) == batch


@given(cases(grouped=True), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 24)), max_size=3))
def test_passes_stay_whole_when_the_batch_changes(case, changes):
    """Resumed with batches of another size, again and again: nothing is lost, repeated or moved."""
    sampler, iteration, keys = case.make(), 0, []
    for more, batch_size in [*changes, (0, None)]:
        keys += [key for i in range(iteration, iteration + more) for key in sampler.get_batch(i)]
        iteration += more
        if batch_size is not None:
            resumed = case.make(batch_size)
            resumed.load_state_dict(sampler.state_dict(), iteration)
            sampler = resumed
            assert len(sampler.get_batch(iteration)) == batch_size
    while len(keys) < 3 * sampler.size:
        keys += sampler.get_batch(iteration)
        iteration += 1
    assert [position for _, position in keys] == list(range(len(keys)))
    for start in range(0, len(keys) - sampler.size + 1, sampler.size):
        counts_of(case, [image for image, _ in keys[start : start + sampler.size]])


@given(cases())
def test_a_far_position_draws_no_more_than_a_near_one(case):
    """Iteration 1,000,000 draws only the passes that it lies in, and they are the right ones."""
    sampler, iteration = case.make(), 10**6
    start, size = iteration * sampler.batch_size, sampler.size
    numbers = range(start // size, (start + sampler.batch_size - 1) // size + 1)
    with mock.patch.object(sampler, "_draw", wraps=sampler._draw) as draw:
        images = [image for image, _ in sampler.get_batch(iteration)]
    assert draw.call_count <= len(numbers)
    passes = [image for number in numbers for image in pass_of(case.make(), number)]
    offset = start - numbers[0] * size
    assert images == passes[offset : offset + sampler.batch_size]


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 10**9))
def test_a_pass_is_a_permutation_of_seed_and_number(size, seed, number):
    """The definition: a checkpoint of yesterday's code is resumed with today's."""
    order = np.random.default_rng((seed, number)).permutation(size)
    assert pass_of(TrainingSampler(size, 3, seed=seed), number) == order.tolist()


@given(cases(grouped=True, longest=6), st.integers(0, 1000))
def test_groups_only_move_images_within_their_window(case, number):
    """A window holds what it would without groups, cut into batches of neighbours."""
    sampler, plain = case.make(), case.plain()
    size, batch_size = sampler.size, sampler.batch_size
    if not sampler.shuffle:
        return
    groups = np.array(case.grouping["groups"])
    first, last = -(-number * size // batch_size), (number + 1) * size // batch_size
    window = case.grouping["window"] or max(last - first, 1)
    for start in range(first, last, window):
        iterations = range(start, min(start + window, last))
        batches = [[image for image, _ in sampler.get_batch(i)] for i in iterations]
        expected = Counter(image for i in iterations for image, _ in plain.get_batch(i))
        assert Counter(itertools.chain(*batches)) == expected
        ends = sorted((groups[batch].min(), groups[batch].max()) for batch in batches)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


@given(st.integers(0, 300), st.integers(1, 40))
def test_inference_ranks_cover_all_images_once(size, world_size):
    shares = [InferenceSampler._get_local_indices(size, world_size, rank) for rank in range(world_size)]
    assert list(itertools.chain(*shares)) == list(range(size))
    lengths = [len(share) for share in shares]
    assert lengths == [len(list(share)) for share in shares]
    assert max(lengths) - min(lengths) <= 1
