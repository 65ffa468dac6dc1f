"""plaintrain.data.samplers: streams of the seed and the position, and the config's sampler.

tests/properties/test_sampler_properties.py has what holds for every size, batch, seed and grouping.
"""

import itertools

import numpy as np
import pytest
import torch
from hostile_helpers import rejected
from torch.utils.data import DataLoader

from plaintrain.data.build import worker_init_reset_seed
from plaintrain.data.common import DatasetFromList, ToIterableDataset
from plaintrain.data.samplers import (
    GroupedBatchSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
    build_train_sampler,
    compute_class_balanced_factors,
)
from plaintrain.data.serialized import SerializedRecords

get_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
THRESHOLD, REPEAT_SQRT = "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT"
FACTORS, RATIO = "DATASETS.TRAIN_REPEAT_FACTOR", "DATALOADER.RANDOM_SUBSET_RATIO"


def _passes(sampler, num):
    size = sampler.size
    return [[sampler.get_index(n * size + i) for i in range(size)] for n in range(num)]


def test_grouped_batches_come_in_random_order_and_of_images_that_meet_at_random():
    groups = np.random.default_rng(0).integers(0, 2, size=96)
    sampler = TrainingSampler(96, 8, seed=6, groups=groups)
    orders, members = [], set()
    for number in range(6):
        batches = [[image for image, _ in sampler.get_batch(number * 12 + i)] for i in range(12)]
        orders.append([round(groups[batch].mean()) for batch in batches])
        members.update(frozenset(batch) for batch in batches)
    assert len(set(map(tuple, orders))) == 6
    assert not any(order in (sorted(order), sorted(order, reverse=True)) for order in orders)
    assert len(members) == 72
    sampler = TrainingSampler(64, 8, seed=9, groups=np.ones(64), window=4)
    batches = [frozenset(image for image, _ in sampler.get_batch(i)) for i in range(80)]
    assert len(set(batches)) == 80
    # After a change of the batch size they are of like images, too.
    groups = np.random.default_rng(0).random(23)
    before, after = (TrainingSampler(23, size, seed=1, groups=groups, window=2) for size in (4, 3))
    after.load_state_dict(before.state_dict(), 5)
    spread = [np.ptp(groups[[image for image, _ in after.get_batch(i)]]) for i in range(20, 40)]
    assert np.mean(spread) < 0.6


def test_repeat_factors_are_met_on_average_and_shuffled_as_one_list():
    factors = np.array([0.5] * 20 + [1] * 20 + [1.5] * 9 + [3, 4])
    mean = _mean_counts(RepeatFactorTrainingSampler(factors, seed=3), 2000)
    # Four standard deviations of a fair coin over 2000 passes, and the rounding of the sum.
    assert abs(mean - factors).max() < 4 * 0.5 / 2000**0.5 + 0.5 / 29
    assert (mean == factors)[factors % 1 == 0].all()
    chosen = {frozenset(images) for images in _passes(RepeatFactorTrainingSampler([0.5] * 6, seed=4), 400)}
    assert all(len(images) == 3 for images in chosen)
    assert len(chosen) == 20
    passes = _passes(RepeatFactorTrainingSampler([2] * 30, seed=6), 5)
    assert len({tuple(images) for images in passes}) == 5
    # Not one permutation, twice over.
    assert all(sorted(images[:30]) != list(range(30)) for images in passes)
    rejected("no image", by=lambda: RepeatFactorTrainingSampler([0, 0]))


def test_samplers_feed_a_data_loader_as_detectron2s(monkeypatch):
    sampler = TrainingSampler(6, seed=1)
    stream = [sampler.get_index(i) for i in range(12)]
    dataset = ToIterableDataset(DatasetFromList("abcdef"), sampler)
    loader = DataLoader(dataset, None, num_workers=2, worker_init_fn=worker_init_reset_seed)
    assert list(itertools.islice(loader, 12)) == ["abcdef"[index] for index in stream]
    batches = GroupedBatchSampler(range(7), torch.tensor([0, 1, 0, 1, 1, 0, 1]), 2)
    assert list(batches) == [[0, 2], [1, 3], [4, 6]]
    monkeypatch.setattr("plaintrain.utils.comm.get_rank", lambda: 1)
    monkeypatch.setattr("plaintrain.utils.comm.get_world_size", lambda: 2)
    assert list(itertools.islice(sampler, 6)) == stream[1::2] and list(InferenceSampler(5)) == [3, 4]


def _records(*classes):
    return [{"annotations": [{"category_id": c, "iscrowd": 0} for c in labels]} for labels in classes]


def test_factors_are_those_of_the_rarest_class_or_balance_the_classes():
    # f = 3/4, 1/4, 1/2; class 3 has no image.
    records = _records([0, 0, 0], [0, 1], [0, 2], [2, 4])
    root = np.sqrt([1, 2, 1, 2])
    assert get_factors(records, 0.5).tolist() == pytest.approx(root.tolist())
    linear = get_factors(records, 0.5, sqrt=False)
    assert linear.tolist() == pytest.approx([1, 2, 1, 2])
    records = _records([], [0], [], [1, 1])
    assert get_factors(records, 1.0).tolist() == [1, 2, 1, 2]
    assert compute_class_balanced_factors(records).tolist() == [1, 1, 1, 1]
    assert get_factors(_records([], []), 0.5).tolist() == [1, 1]
    assert compute_class_balanced_factors(_records([], [])).tolist() == [1, 1]
    records = _records(*[[0]] * 90, *[[2, 2]] * 9, [5])
    factors = compute_class_balanced_factors(records)
    assert [factors[:90].sum(), factors[90:99].sum(), factors[99]] == pytest.approx([100 / 3] * 3)
    both = compute_class_balanced_factors(_records([0, 1], [0], [0]))
    assert both.tolist() == pytest.approx([3 * (1 / 2 / 3 + 1 / 2), 0.5, 0.5])


def _dataset(name, num, label):
    # Every third image is upright.
    return SerializedRecords(
        {"file_name": f"{name}/{i}.png", "image_id": i, "height": 20 if i % 3 else 40 + i, "width": 30}
        | {"annotations": [{"category_id": label}]}
        for i in range(num)
    )


@pytest.fixture
def records():
    """24 images of dataset large with class 0, then 6 of dataset few with class 1."""
    return SerializedRecords.join([_dataset("large", 24, 0), _dataset("few", 6, 1)])


@pytest.fixture
def cfg(cfg):
    cfg.DATASETS.TRAIN = ("large", "few")
    return cfg


def _use(cfg, sampler, *options):
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, *options])
    return cfg


def _mean_counts(sampler, num=40):
    return np.bincount(list(itertools.chain(*_passes(sampler, num)))) / num


@pytest.mark.parametrize(
    ("sampler", "options", "expected"),
    [
        ("TrainingSampler", [], [1] * 30),
        ("RepeatFactorTrainingSampler", [THRESHOLD, 0.8], [1] * 24 + [2] * 6),
        ("RepeatFactorTrainingSampler", [THRESHOLD, 0.8, REPEAT_SQRT, False], [1] * 24 + [4] * 6),
        ("WeightedTrainingSampler", [FACTORS, [["few", 3]]], [1] * 24 + [3] * 6),
        ("WeightedTrainingSampler", [FACTORS, [["few", 2.0], ["large", 0]]], [0] * 24 + [2] * 6),
    ],
)
def test_sampler_draws_each_image_as_often_as_the_config_says(cfg, records, sampler, options, expected):
    assert _mean_counts(build_train_sampler(_use(cfg, sampler, *options), records, 4)).tolist() == expected


def test_sampler_draws_each_class_as_often_or_a_subset_of_the_images(cfg, records):
    counts = _mean_counts(build_train_sampler(_use(cfg, "ClassBalancedTrainingSampler"), records, 4))
    assert [counts[:24].sum(), counts[24:].sum()] == pytest.approx([15, 15], abs=0.5)
    # A random subset has its size and depends on the seed.
    _use(cfg, "RandomSubsetTrainingSampler", RATIO, 0.5)
    assert build_train_sampler(cfg, records, 4).size == 15
    samplers = [RandomSubsetTrainingSampler(103, 0.4, seed=seed) for seed in (1, 2, 3)]
    assert {sampler.size for sampler in samplers} == {41}
    assert len({frozenset(_passes(sampler, 1)[0]) for sampler in samplers}) == 3
    assert RandomSubsetTrainingSampler(9, 0.001).size == 1


def _spread(sampler, records):
    """Return the mean, over the batches within an epoch, of the range of their aspect ratios."""
    ratios = records.columns["width"] / records.columns["height"]
    batches = [[i for i, _ in sampler.get_batch(n)] for n in range(90) if (n * 4) // 30 == (n * 4 + 3) // 30]
    return np.mean([np.ptp(ratios[batch]) for batch in batches])


def test_group_window_makes_batches_of_like_aspect_ratio_and_needs_sizes(cfg, records):
    spread = []
    for grouping, window in ((True, 100), (True, 0), (False, 0)):
        cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.DATALOADER.GROUP_WINDOW = grouping, window
        spread.append(_spread(build_train_sampler(cfg, records, 4), records))
    assert spread[0] < 0.8 * spread[1] < 0.8 * 0.8 * spread[2]
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    records = SerializedRecords([{"file_name": "a.png"}])
    words = "ASPECT_RATIO_GROUPING needs the height and width"
    rejected(words, by=lambda: build_train_sampler(cfg, records, 1))
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert build_train_sampler(cfg, records, 1).size == 1
    _use(cfg, "WeightedTrainingSampler", FACTORS, [["large", 2]])
    rejected("got other records", by=lambda: build_train_sampler(cfg, _dataset("other", 5, 0), 4))


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("RepeatFactorTrainingSampler", [THRESHOLD, 0.8]),
        ("ClassBalancedTrainingSampler", []),
        ("WeightedTrainingSampler", [FACTORS, [["few", 3]]]),
        ("RandomSubsetTrainingSampler", [RATIO, 0.8]),
    ],
)
def test_grouping_and_seed_reach_every_sampler(cfg, records, sampler, options):
    _use(cfg, sampler, *options)
    spread, orders = {}, set()
    for seed, grouping in itertools.product((5, 6), (True, False)):
        cfg.SEED, cfg.DATALOADER.ASPECT_RATIO_GROUPING = seed, grouping
        built = build_train_sampler(cfg, records, 4)
        spread[seed, grouping] = _spread(built, records)
        orders.add(tuple(built.get_index(p) for p in range(60)))
    assert len(orders) == 4
    assert spread[5, True] < 0.6 * spread[5, False]


@pytest.mark.parametrize(
    ("sampler", "key", "value", "message"),
    [
        ("RepeatFactorSampler", "SEED", 1, "DATALOADER.SAMPLER_TRAIN must be"),
        ("TrainingSampler", THRESHOLD, 0.1, "only RepeatFactorTrainingSampler reads it"),
        ("TrainingSampler", RATIO, 0.5, "only RandomSubsetTrainingSampler reads"),
        ("TrainingSampler", FACTORS, [["large", 2]], "only WeightedTrainingSampler reads"),
        ("WeightedTrainingSampler", FACTORS, [["largee", 2]], "'few'], factor], got ['largee'"),
        ("WeightedTrainingSampler", FACTORS, ["large", 2], "got ['large', 2]"),
        ("WeightedTrainingSampler", FACTORS, [["large", -1]], "got [['large', -1]]"),
        ("WeightedTrainingSampler", "SEED", 1, "WeightedTrainingSampler needs " + FACTORS),
    ],
)
def test_sampler_keys_that_cannot_be_used_are_rejected(cfg, records, sampler, key, value, message):
    _use(cfg, sampler, key, value)
    rejected(message, by=lambda: build_train_sampler(cfg, records, 4))
