"""plaintrain.data.samplers: streams that are pure functions of the seed and the position."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shared.measure import read_sizes

from plaintrain.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
    aspect_ratio_groups,
    class_balanced_factors,
    repeat_factors_from_category_frequency,
)
from plaintrain.utils.errors import UserError

GROUPS = np.random.default_rng(0).integers(0, 2, size=103)
RATIOS = np.random.default_rng(1).uniform(0.4, 2.5, size=103).round(1)
FACTORS = np.random.default_rng(2).choice([0, 0.3, 1, 1.5, 2.71, 4], size=103)
# Every sampler that has passes, with all that it can be combined with.
MAKERS = {
    "all": lambda batch, **keys: TrainingSampler(103, batch, **keys),
    "repeat": lambda batch, **keys: RepeatFactorTrainingSampler(FACTORS, batch, **keys),
    "subset": lambda batch, **keys: RandomSubsetTrainingSampler(103, 0.4, batch, **keys),
}
GROUPINGS = [{}, {"groups": GROUPS}, {"groups": RATIOS, "window": 1}, {"groups": RATIOS, "window": 3}]


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


@pytest.mark.parametrize("keys", GROUPINGS)
@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_one_stream_without_loss_or_repeats(world_size, kind, keys):
    whole = MAKERS[kind](12, seed=2, **keys)
    ranks = [MAKERS[kind](12, seed=2, **keys) for _ in range(world_size)]
    for iteration in range(40):
        shares = [sampler.batch(iteration, rank, world_size) for rank, sampler in enumerate(ranks)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert list(itertools.chain(*shares)) == whole.batch(iteration)


@pytest.mark.parametrize("keys", GROUPINGS)
@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_stream_can_be_entered_anywhere_in_any_order(kind, keys):
    whole = MAKERS[kind](8, seed=3, **keys)
    batches = [whole.batch(i) for i in range(60)]
    for iteration in np.random.default_rng(0).permutation(60):
        assert MAKERS[kind](8, seed=3, **keys).batch(iteration) == batches[iteration]
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


# ---- batches cut from windows


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("window", [1, 3, 5, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 20, 150])
def test_windows_neither_lose_nor_repeat_an_image(kind, window, batch_size):
    plain, grouped = (
        MAKERS[kind](batch_size, seed=7, **keys) for keys in ({}, {"groups": RATIOS, "window": window})
    )
    passes = 5
    for number in range(passes):
        positions = range(number * plain.size, (number + 1) * plain.size)
        images = [[sampler.index_at(p) for p in positions] for sampler in (plain, grouped)]
        assert Counter(images[0]) == Counter(images[1])


def _window_batches(sampler, number, window):
    """The batches within a pass, in lists of those that were made from the same images."""
    first = -(-number * sampler.size // sampler.batch_size)
    last = (number + 1) * sampler.size // sampler.batch_size
    batches = [[image for image, _ in sampler.batch(i)] for i in range(first, last)]
    return [batches[i : i + window] for i in range(0, len(batches), window)]


def test_the_batches_of_a_window_are_neighbours_by_aspect_ratio_in_random_order():
    sampler, plain = TrainingSampler(103, 8, seed=8, groups=RATIOS, window=3), TrainingSampler(103, 8, seed=8)
    in_order = []
    for number in range(6):
        windows = _window_batches(sampler, number, 3)
        for batches, images in zip(windows, _window_batches(plain, number, 3), strict=True):
            assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*images))
            ends = [(min(RATIOS[batch]), max(RATIOS[batch])) for batch in batches]
            cut = sorted(ends)
            assert all(left[1] <= right[0] for left, right in itertools.pairwise(cut))
            in_order.append(ends == cut)
        assert len(windows) == 4
    assert 0 < sum(in_order) < len(in_order)


def test_images_of_equal_aspect_ratio_meet_at_random():
    sampler = TrainingSampler(64, 8, seed=9, groups=np.ones(64), window=4)
    batches = [frozenset(image for image, _ in sampler.batch(i)) for i in range(80)]
    assert len(set(batches)) == 80


def _padding(sampler, heights, widths):
    """The share of padding in two passes of batches, images resized to 800 x 1333 at most."""
    scale = np.minimum(800 / np.minimum(heights, widths), 1333 / np.maximum(heights, widths))
    heights, widths = (heights * scale).round(), (widths * scale).round()
    used = whole = 0
    for iteration in range(2 * sampler.size // sampler.batch_size):
        batch = [image for image, _ in sampler.batch(iteration)]
        used += (heights[batch] * widths[batch]).sum()
        whole += heights[batch].max() * widths[batch].max() * len(batch)
    return 1 - used / whole


def test_padding_at_cocos_sizes():
    folder = Path(__file__).resolve().parent.parent / "scripts" / "benchmarks"
    widths, heights = read_sizes(folder / "coco_sizes.json", 8000)
    groupings = [
        {},
        {"groups": aspect_ratio_groups(heights, widths)},
        {"groups": widths / heights, "window": 100},
    ]
    padding = [
        _padding(TrainingSampler(widths.size, 16, seed=1, **keys), heights, widths) for keys in groupings
    ]
    assert padding[0] == pytest.approx(0.43, abs=0.01)
    assert padding[1] == pytest.approx(0.14, abs=0.01)
    assert padding[2] <= 0.03


# ---- repeat factors


def _passes(sampler, num):
    return [
        [sampler.index_at(p) for p in range(n * sampler.size, (n + 1) * sampler.size)] for n in range(num)
    ]


@pytest.mark.parametrize("keys", GROUPINGS)
def test_a_pass_has_the_length_of_the_sum_and_counts_are_factors_rounded(keys):
    sampler = RepeatFactorTrainingSampler(FACTORS, 8, seed=1, **keys)
    assert sampler.size == round(FACTORS.sum())
    for images in _passes(sampler, 20):
        counts = np.bincount(images, minlength=103)
        assert (counts >= np.floor(FACTORS)).all()
        assert (counts <= np.ceil(FACTORS)).all()


def test_images_come_as_often_as_their_factors_say_on_average():
    factors = np.array([0.5] * 20 + [1] * 20 + [1.5] * 9 + [3, 4])
    sampler = RepeatFactorTrainingSampler(factors, seed=3)
    assert abs(sampler.size - factors.sum()) <= 0.5
    passes = _passes(sampler, 2000)
    mean = np.bincount(list(itertools.chain(*passes)), minlength=factors.size) / 2000
    # Four standard deviations of a fair coin over 2000 passes, and the rounding of the sum.
    assert abs(mean - factors).max() < 4 * 0.5 / 2000**0.5 + 0.5 / 29
    assert (mean == factors)[factors % 1 == 0].all()


def test_who_is_rounded_up_is_drawn_independently_of_the_neighbours():
    sampler = RepeatFactorTrainingSampler([0.5] * 6, seed=4)
    chosen = {frozenset(images) for images in _passes(sampler, 400)}
    assert all(len(images) == 3 for images in chosen)
    assert len(chosen) == 20


@pytest.mark.parametrize("factors", [[0.6], [0.9, 0.6], [0.9] * 19, [0.1] * 7, [2.0, 0, 1], [0.999] * 400])
def test_few_or_extreme_fractions_keep_the_length_and_the_rounding(factors):
    sampler = RepeatFactorTrainingSampler(factors, seed=5)
    for images in _passes(sampler, 50):
        counts = np.bincount(images, minlength=len(factors))
        assert counts.sum() == round(sum(factors))
        assert (counts >= np.floor(factors)).all()
        assert (counts <= np.ceil(factors)).all()


def test_passes_with_repeats_are_shuffled_anew():
    passes = _passes(RepeatFactorTrainingSampler([2] * 30, seed=6), 5)
    assert len({tuple(images) for images in passes}) == 5
    assert all(images != sorted(images) for images in passes)
    # Not the images of one permutation, twice over.
    assert all(sorted(images[:30]) != list(range(30)) for images in passes)


@pytest.mark.parametrize("factors", [[1, -0.5, 2], [1, float("nan")], [1, float("inf")]])
def test_a_factor_that_cannot_be_is_refused(factors):
    with pytest.raises(UserError, match="finite number >= 0"):
        RepeatFactorTrainingSampler(factors)


def test_factors_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="no image"):
        RepeatFactorTrainingSampler([0, 0])


def _records(*classes):
    return [{"annotations": [{"category_id": c, "iscrowd": 0} for c in labels]} for labels in classes]


def test_lvis_factors_are_those_of_the_rarest_class_of_an_image():
    # f = 3/4, 1/4, 1/2; class 3 has no image.
    records = _records([0, 0, 0], [0, 1], [0, 2], [2, 4])
    root = np.sqrt([1, 2, 1, 2])
    assert repeat_factors_from_category_frequency(records, 0.5).tolist() == pytest.approx(root.tolist())
    linear = repeat_factors_from_category_frequency(records, 0.5, sqrt=False)
    assert linear.tolist() == pytest.approx([1, 2, 1, 2])


def test_images_without_annotations_have_the_factor_1():
    records = _records([], [0], [], [1, 1])
    assert repeat_factors_from_category_frequency(records, 1.0).tolist() == [1, 2, 1, 2]
    assert class_balanced_factors(records).tolist() == [1, 1, 1, 1]
    assert repeat_factors_from_category_frequency(_records([], []), 0.5).tolist() == [1, 1]
    assert class_balanced_factors(_records([], [])).tolist() == [1, 1]


def test_class_balanced_factors_draw_each_class_as_often():
    records = _records(*[[0]] * 90, *[[2, 2]] * 9, [5])
    factors = class_balanced_factors(records)
    assert factors.sum() == pytest.approx(100)
    assert [factors[:90].sum(), factors[90:99].sum(), factors[99]] == pytest.approx([100 / 3] * 3)
    both = class_balanced_factors(_records([0, 1], [0], [0]))
    assert both.tolist() == pytest.approx([3 * (1 / 2 / 3 + 1 / 2), 0.5, 0.5])


# ---- a subset


def test_a_subset_is_the_same_in_every_pass_and_another_for_another_seed():
    subsets = set()
    for seed in (1, 2, 3):
        sampler = RandomSubsetTrainingSampler(103, 0.4, seed=seed)
        passes = _passes(sampler, 4)
        assert sampler.size == 41
        assert {tuple(sorted(images)) for images in passes} == {tuple(sorted(passes[0]))}
        assert len(set(passes[0])) == 41
        assert len({tuple(images) for images in passes}) == 4
        subsets.add(tuple(sorted(passes[0])))
    assert len(subsets) == 3


def test_a_subset_may_be_everything_and_holds_at_least_one_image():
    assert sorted(_passes(RandomSubsetTrainingSampler(9, 1.0), 1)[0]) == list(range(9))
    assert RandomSubsetTrainingSampler(9, 0.001).size == 1


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(UserError, match=r"not in \(0, 1\]"):
        RandomSubsetTrainingSampler(9, ratio)


def test_a_subset_of_nothing_is_refused():
    with pytest.raises(UserError, match="no image"):
        RandomSubsetTrainingSampler(0, 0.5)


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
