"""plaintrain.data.train_sampler: the sampler that a config describes, and the keys it rejects."""

import itertools

import numpy as np
import pytest

from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.train_sampler import build_train_sampler
from plaintrain.utils.errors import UserError


def _records(name, num, label):
    # Every third image is upright.
    return SerializedRecords(
        {
            "file_name": f"{name}/{i}.png",
            "image_id": i,
            "height": 40 + i if i % 3 == 0 else 20,
            "width": 30,
            "annotations": [{"category_id": label}],
        }
        for i in range(num)
    )


@pytest.fixture
def records():
    """24 images of dataset large with class 0, then 6 of dataset few with class 1."""
    return SerializedRecords.join([_records("large", 24, 0), _records("few", 6, 1)])


@pytest.fixture
def cfg(cfg):
    cfg.DATASETS.TRAIN = ("large", "few")
    return cfg


def _use(cfg, sampler, *options):
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, *options])
    return cfg


def _mean_counts(sampler, passes=40):
    images = [sampler.index_at(p) for p in range(passes * sampler.size)]
    return np.bincount(images, minlength=30) / passes


@pytest.mark.parametrize(
    ("sampler", "options", "expected"),
    [
        ("TrainingSampler", [], [1] * 30),
        ("RepeatFactorTrainingSampler", ["DATALOADER.REPEAT_THRESHOLD", 0.8], [1] * 24 + [2] * 6),
        (
            "RepeatFactorTrainingSampler",
            ["DATALOADER.REPEAT_THRESHOLD", 0.8, "DATALOADER.REPEAT_SQRT", False],
            [1] * 24 + [4] * 6,
        ),
        ("WeightedTrainingSampler", ["DATASETS.TRAIN_REPEAT_FACTOR", [["few", 3]]], [1] * 24 + [3] * 6),
        (
            "WeightedTrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", [["few", 2.0], ["large", 0]]],
            [0] * 24 + [2] * 6,
        ),
    ],
)
def test_sampler_draws_each_image_as_often_as_the_config_says(cfg, records, sampler, options, expected):
    assert _mean_counts(build_train_sampler(_use(cfg, sampler, *options), records, 4)).tolist() == expected


def test_class_balanced_sampler_draws_each_class_as_often(cfg, records):
    counts = _mean_counts(build_train_sampler(_use(cfg, "ClassBalancedTrainingSampler"), records, 4))
    assert [counts[:24].sum(), counts[24:].sum()] == pytest.approx([15, 15], abs=0.5)


def test_random_subset_sampler_draws_a_subset(cfg, records):
    _use(cfg, "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO", 0.5)
    assert sorted(_mean_counts(build_train_sampler(cfg, records, 4))) == [0] * 15 + [1] * 15


def _spread(sampler, records):
    """Return the mean, over the batches within an epoch, of the range of their aspect ratios."""
    ratios = records.columns["width"] / records.columns["height"]
    batches = [[i for i, _ in sampler.batch(n)] for n in range(90) if (n * 4) // 30 == (n * 4 + 3) // 30]
    return np.mean([np.ptp(ratios[batch]) for batch in batches])


def test_group_window_makes_batches_of_like_aspect_ratio(cfg, records):
    spread = {}
    for window in (100, 0, None):
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = window is not None
        cfg.DATALOADER.GROUP_WINDOW = window or 0
        sampler = build_train_sampler(cfg, records, 4)
        spread[window] = _spread(sampler, records)
    assert spread[100] < 0.8 * spread[0] < 0.8 * 0.8 * spread[None]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("RepeatFactorTrainingSampler", ["DATALOADER.REPEAT_THRESHOLD", 0.8]),
        ("ClassBalancedTrainingSampler", []),
        ("WeightedTrainingSampler", ["DATASETS.TRAIN_REPEAT_FACTOR", [["few", 3]]]),
        ("RandomSubsetTrainingSampler", ["DATALOADER.RANDOM_SUBSET_RATIO", 0.8]),
    ],
)
def test_grouping_and_seed_reach_every_sampler(cfg, records, sampler, options):
    _use(cfg, sampler, *options)
    spread, orders = {}, set()
    for seed, grouping in itertools.product((5, 6), (True, False)):
        cfg.SEED, cfg.DATALOADER.ASPECT_RATIO_GROUPING = seed, grouping
        built = build_train_sampler(cfg, records, 4)
        spread[seed, grouping] = _spread(built, records)
        orders.add(tuple(built.index_at(p) for p in range(60)))
    assert len(orders) == 4
    assert spread[5, True] < 0.6 * spread[5, False]


THRESHOLD, RATIO = "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.RANDOM_SUBSET_RATIO"
FACTORS = "DATASETS.TRAIN_REPEAT_FACTOR"


@pytest.mark.parametrize(
    ("sampler", "key", "value", "message"),
    [
        ("RepeatFactorSampler", "SEED", 1, "but only .*RepeatFactorTrainingSampler.* is supported"),
        ("RepeatFactorTrainingSampler", THRESHOLD, 0.0, r"REPEAT_THRESHOLD is 0\.0, but"),
        ("RepeatFactorTrainingSampler", THRESHOLD, 1.5, r"REPEAT_THRESHOLD is 1\.5, but"),
        ("TrainingSampler", THRESHOLD, 0.1, "only RepeatFactorTrainingSampler reads it"),
        ("TrainingSampler", "DATALOADER.GROUP_WINDOW", -1, "GROUP_WINDOW is -1"),
        ("RandomSubsetTrainingSampler", RATIO, 0.0, r"RATIO is 0\.0.*\(0, 1\]"),
        ("RandomSubsetTrainingSampler", RATIO, 1.5, r"RATIO is 1\.5.*\(0, 1\]"),
        ("TrainingSampler", RATIO, 0.5, "only RandomSubsetTrainingSampler reads"),
        ("TrainingSampler", FACTORS, [["large", 2]], "only WeightedTrainingSampler reads"),
        ("WeightedTrainingSampler", FACTORS, [["largee", 2]], r"'largee'.*\['large', 'few'\]"),
        ("WeightedTrainingSampler", FACTORS, ["large", 2], r"has 'large', not \[name, factor"),
        ("WeightedTrainingSampler", FACTORS, [["large"]], r"not \[name, factor"),
        ("WeightedTrainingSampler", FACTORS, [["large", -1]], "large the factor -1, not"),
        ("WeightedTrainingSampler", FACTORS, [["large", "2"]], "large the factor '2', not"),
        ("WeightedTrainingSampler", "SEED", 1, "WeightedTrainingSampler needs " + FACTORS),
    ],
)
def test_sampler_keys_that_cannot_be_used_are_rejected(cfg, records, sampler, key, value, message):
    with pytest.raises(UserError, match=message):
        build_train_sampler(_use(cfg, sampler, key, value), records, 4)


def test_weighted_sampler_needs_the_records_of_the_datasets(cfg):
    _use(cfg, "WeightedTrainingSampler", "DATASETS.TRAIN_REPEAT_FACTOR", [["large", 2]])
    with pytest.raises(UserError, match="other records were passed in"):
        build_train_sampler(cfg, _records("other", 5, 0), 4)


def test_grouping_needs_the_sizes(cfg):
    records = SerializedRecords([{"file_name": "a.png"}])
    with pytest.raises(UserError, match="ASPECT_RATIO_GROUPING needs the height and width"):
        build_train_sampler(cfg, records, 1)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert build_train_sampler(cfg, records, 1).size == 1
