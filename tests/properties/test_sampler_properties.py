"""Samplers lose and repeat no image, whatever the size, batch, number of ranks, seed and grouping."""

import itertools
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import sampler_defects as broken
from hypothesis import strategies as st
from property_helpers import assert_caught, checks_of, defects_of, examine, for_all, patched
from sampler_cases import cases, pass_of

from plaintrain.data import samplers
from plaintrain.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)

PASSES = st.lists(st.integers(0, 10**6), max_size=2).map(lambda more: [0, 1, 2, *more])


@for_all(cases(), PASSES)
def check_a_pass_holds_each_image_as_often_as_it_should(case, numbers):
    """Once each, or each factor rounded, in passes of one length; a subset is always the same."""
    sampler, images_of = case.make(), []
    for number in numbers:
        images = pass_of(sampler, number)
        counts = np.bincount(images, minlength=len(case.low))
        assert (case.low <= counts).all()
        assert (counts <= case.high).all()
        assert len(images) == sampler.size
        images_of.append(counts)
    if case.kind == "repeat":
        assert sampler.size == round(case.factors.sum())
    else:
        assert all((counts == images_of[0]).all() for counts in images_of)


@for_all(cases(), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def check_the_stream_can_be_entered_anywhere(case, iterations):
    whole = case.make()
    batches = [whole.batch(i) for i in range(max(iterations) + 1)]
    places = [position for batch in batches for _, position in batch]
    assert places == list(range(len(places)))
    used = case.make()
    for i in iterations:
        assert case.make().batch(i) == batches[i]
        assert used.batch(i) == batches[i]
        assert [used.index_at(position) for _, position in batches[i]] == [image for image, _ in batches[i]]


@for_all(cases(), st.integers(0, 10**4))
def check_ranks_share_the_batch_whatever_their_number(case, iteration):
    whole = case.make()
    batch = whole.batch(iteration)
    for world_size in range(1, whole.batch_size + 1):
        if whole.batch_size % world_size:
            continue
        shares = [case.make().batch(iteration, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {whole.batch_size // world_size}
        positions = Counter(position for share in shares for _, position in share)
        assert set(positions.values()) == {1}
        assert list(itertools.chain(*shares)) == batch


@for_all(cases(grouped=True), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 24)), max_size=3))
def check_passes_stay_whole_when_the_batch_changes(case, changes):
    """Resumed with batches of another size, again and again: nothing is lost, repeated or moved."""
    sampler, iteration, keys = case.make(), 0, []
    for more, batch_size in [*changes, (0, None)]:
        keys += [key for i in range(iteration, iteration + more) for key in sampler.batch(i)]
        iteration += more
        if batch_size is not None:
            resumed = case.make(batch_size)
            resumed.load_state_dict(sampler.state_dict(), iteration)
            sampler = resumed
            assert len(sampler.batch(iteration)) == batch_size
    while len(keys) < 3 * sampler.size:
        keys += sampler.batch(iteration)
        iteration += 1
    assert [position for _, position in keys] == list(range(len(keys)))
    for start in range(0, len(keys) - sampler.size + 1, sampler.size):
        images = [image for image, _ in keys[start : start + sampler.size]]
        counts = np.bincount(images, minlength=len(case.low))
        assert (case.low <= counts).all()
        assert (counts <= case.high).all()


class _Counted:
    """A generator that counts the permutations that are drawn from it."""

    total = 0

    def __init__(self, *seed):
        self._rng = DEFAULT_RNG(*seed)

    def permutation(self, *arguments):
        _Counted.total += 1
        return self._rng.permutation(*arguments)

    def __getattr__(self, name):
        return getattr(self._rng, name)


DEFAULT_RNG = np.random.default_rng


@for_all(cases())
def check_a_far_position_draws_no_more_than_a_near_one(case):
    """Iteration 1,000,000 draws only the passes that it lies in, and they are the right ones."""
    sampler, iteration = case.make(), 10**6
    start, size = iteration * sampler.batch_size, sampler.size
    numbers = range(start // size, (start + sampler.batch_size - 1) // size + 1)
    windows = size // sampler.batch_size + 1
    with mock.patch.object(samplers.np.random, "default_rng", _Counted):
        _Counted.total = 0
        images = [image for image, _ in sampler.batch(iteration)]
    assert _Counted.total <= len(numbers) * (2 + windows)
    passes = [image for number in numbers for image in pass_of(case.make(), number)]
    offset = start - numbers[0] * size
    assert images == passes[offset : offset + sampler.batch_size]


@for_all(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 10**9))
def check_a_pass_is_a_permutation_of_seed_and_number(size, seed, number):
    """The definition: a checkpoint of yesterday's code is resumed with today's."""
    order = DEFAULT_RNG((seed, number)).permutation(size)
    assert pass_of(TrainingSampler(size, 3, seed=seed), number) == order.tolist()


@for_all(cases(grouped=True, longest=6), st.integers(0, 1000))
def check_groups_only_move_images_within_their_window(case, number):
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
        batches = [[image for image, _ in sampler.batch(i)] for i in iterations]
        expected = Counter(image for i in iterations for image, _ in plain.batch(i))
        assert Counter(itertools.chain(*batches)) == expected
        ends = sorted((groups[batch].min(), groups[batch].max()) for batch in batches)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


@for_all(st.integers(0, 300), st.integers(1, 40))
def check_inference_ranks_cover_all_images_once(size, world_size):
    shares = [InferenceSampler(size, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*shares)) == list(range(size))
    lengths = [len(share) for share in shares]
    assert lengths == [len(list(share)) for share in shares]
    assert max(lengths) - min(lengths) <= 1


CHECKS = checks_of(globals())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check):
    examine(check)


# ---- planted defects

DEFECTS = {
    check_a_pass_holds_each_image_as_often_as_it_should: {
        "the last batch of a pass is padded": broken.order_from(broken.padded),
        "the subset is drawn anew for each pass": patched(
            RandomSubsetTrainingSampler, "_draw", broken.subset_of_the_pass
        ),
        "factors are rounded one by one": patched(RepeatFactorTrainingSampler, "_draw", broken.rounded_alone),
    },
    check_the_stream_can_be_entered_anywhere: {
        "the order depends on what was read before": broken.order_from(broken.by_history),
    },
    check_ranks_share_the_batch_whatever_their_number: {
        "every rank has the first share": broken.batch_from(lambda s, i, rank, share: i * s.batch_size),
    },
    check_passes_stay_whole_when_the_batch_changes: {
        "a pass is cut anew within it": broken.cut_by_the_last_batch,
    },
    check_a_far_position_draws_no_more_than_a_near_one: {
        "a pass is drawn for each image": patched(
            samplers.functools, "lru_cache", lambda maxsize: lambda function: function
        ),
        "earlier passes are replayed": broken.order_from(broken.replayed),
    },
    check_a_pass_is_a_permutation_of_seed_and_number: {
        "seed and pass change places": patched(
            samplers.np.random, "default_rng", lambda seed: DEFAULT_RNG(seed[::-1])
        ),
    },
    check_groups_only_move_images_within_their_window: {
        "images are not sorted": patched(samplers.np, "argsort", lambda values, **_: np.arange(values.size)),
    },
    check_inference_ranks_cover_all_images_once: {
        "shares are padded": patched(InferenceSampler, "__init__", broken.padded_share),
    },
}


def test_every_property_has_a_planted_defect():
    assert list(DEFECTS) == CHECKS


FIRST, *OTHERS = defects_of(DEFECTS)


@pytest.mark.parametrize(("check", "defect"), [FIRST])
def test_planted_defect_is_caught(check, defect, monkeypatch):
    defect(monkeypatch)
    assert_caught(check)


@pytest.mark.long
@pytest.mark.parametrize(("check", "defect"), OTHERS)
def test_other_planted_defect_is_caught(check, defect, monkeypatch):
    test_planted_defect_is_caught(check, defect, monkeypatch)
