"""plaintrain.data.train_sampler: the sampler that a config describes, and what it refuses."""

import itertools

import numpy as np
import pytest

from plaintrain.data.samplers import TrainingSampler
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
    """24 images of dataset one with class 0, then 6 of dataset two with class 1."""
    return SerializedRecords.join([_records("one", 24, 0), _records("two", 6, 1)])


@pytest.fixture
def cfg(cfg):
    cfg.DATASETS.TRAIN = ("one", "two")
    return cfg


def _use(cfg, sampler, *options):
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, *options])
    return cfg


def _mean_counts(sampler, passes=40):
    images = [sampler.index_at(p) for p in range(passes * sampler.size)]
    return np.bincount(images, minlength=30) / passes


def test_by_default_every_image_comes_once_a_pass(cfg, records):
    sampler = build_train_sampler(cfg, records, 4)
    assert (sampler.size, sampler.batch_size, sampler.seed) == (30, 4, 5)
    assert (_mean_counts(sampler) == 1).all()


def test_repeat_factors_by_class_frequency(cfg, records):
    _use(cfg, "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.8)
    counts = _mean_counts(build_train_sampler(cfg, records, 4))
    assert (counts[:24] == 1).all()
    assert (counts[24:] == 2).all()
    cfg.DATALOADER.REPEAT_SQRT = False
    assert (_mean_counts(build_train_sampler(cfg, records, 4))[24:] == 4).all()


def test_class_balance(cfg, records):
    counts = _mean_counts(build_train_sampler(_use(cfg, "ClassBalancedTrainingSampler"), records, 4))
    assert counts[:24].sum() == pytest.approx(15, abs=0.5)
    assert counts[24:].sum() == pytest.approx(15, abs=0.5)


def test_datasets_by_their_factors(cfg, records):
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [["two", 3]]
    counts = _mean_counts(build_train_sampler(_use(cfg, "WeightedTrainingSampler"), records, 4))
    assert counts.tolist() == [1] * 24 + [3] * 6
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [["two", 2.0], ("one", 0)]
    counts = _mean_counts(build_train_sampler(cfg, records, 4))
    assert counts.tolist() == [0] * 24 + [2] * 6


def test_a_random_subset(cfg, records):
    sampler = build_train_sampler(
        _use(cfg, "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO", 0.5), records, 4
    )
    assert sorted(_mean_counts(sampler)) == [0] * 15 + [1] * 15


def _spread(sampler, records):
    """For each batch within a pass, the difference of its aspect ratios; the larger half of them."""
    ratios = records.columns["width"] / records.columns["height"]
    batches = [[i for i, _ in sampler.batch(n)] for n in range(90) if (n * 4) // 30 == (n * 4 + 3) // 30]
    return np.mean([np.ptp(ratios[batch]) for batch in batches])


def test_the_window_and_its_absence_decide_how_batches_are_made(cfg, records):
    spread = {}
    for window in (100, 0, None):
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = window is not None
        cfg.DATALOADER.GROUP_WINDOW = window or 0
        sampler = build_train_sampler(cfg, records, 4)
        assert isinstance(sampler, TrainingSampler)
        spread[window] = _spread(sampler, records)
    assert spread[100] < 0.8 * spread[0] < 0.8 * 0.8 * spread[None]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("RepeatFactorTrainingSampler", ["DATALOADER.REPEAT_THRESHOLD", 0.8]),
        ("ClassBalancedTrainingSampler", []),
        ("WeightedTrainingSampler", ["DATASETS.TRAIN_REPEAT_FACTOR", [["two", 3]]]),
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


# ---- mistakes


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("RepeatFactorSampler", [], "but only .*RepeatFactorTrainingSampler.* is supported"),
        ("RepeatFactorTrainingSampler", [], r"REPEAT_THRESHOLD is 0\.0, but"),
        (
            "RepeatFactorTrainingSampler",
            ["DATALOADER.REPEAT_THRESHOLD", -0.1],
            r"REPEAT_THRESHOLD is -0\.1, but",
        ),
        (
            "RepeatFactorTrainingSampler",
            ["DATALOADER.REPEAT_THRESHOLD", 1.5],
            r"REPEAT_THRESHOLD is 1\.5, but",
        ),
        (
            "TrainingSampler",
            ["DATALOADER.REPEAT_THRESHOLD", 0.1],
            "only RepeatFactorTrainingSampler reads it",
        ),
        ("TrainingSampler", ["DATALOADER.GROUP_WINDOW", -1], "GROUP_WINDOW is -1"),
        ("RandomSubsetTrainingSampler", ["DATALOADER.RANDOM_SUBSET_RATIO", 0.0], r"RATIO is 0\.0.*\(0, 1\]"),
        ("RandomSubsetTrainingSampler", ["DATALOADER.RANDOM_SUBSET_RATIO", 1.5], r"RATIO is 1\.5.*\(0, 1\]"),
        (
            "TrainingSampler",
            ["DATALOADER.RANDOM_SUBSET_RATIO", 0.5],
            "only RandomSubsetTrainingSampler reads",
        ),
        (
            "TrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", [["one", 2]]],
            "only WeightedTrainingSampler reads",
        ),
        (
            "WeightedTrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", [["onee", 2]]],
            r"'onee'.*\['one', 'two'\]",
        ),
        (
            "WeightedTrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", ["one", 2]],
            r"has 'one', not \[name, factor",
        ),
        ("WeightedTrainingSampler", ["DATASETS.TRAIN_REPEAT_FACTOR", [["one"]]], r"not \[name, factor"),
        (
            "WeightedTrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", [["one", -1]]],
            "one the factor -1, not",
        ),
        (
            "WeightedTrainingSampler",
            ["DATASETS.TRAIN_REPEAT_FACTOR", [["one", "2"]]],
            "one the factor '2', not",
        ),
    ],
)
def test_a_key_that_a_sampler_cannot_use_is_refused(cfg, records, sampler, options, message):
    with pytest.raises(UserError, match=message):
        build_train_sampler(_use(cfg, sampler, *options), records, 4)


def test_weights_of_datasets_need_the_datasets(cfg):
    cfg = _use(cfg, "WeightedTrainingSampler", "DATASETS.TRAIN_REPEAT_FACTOR", [["one", 2]])
    with pytest.raises(UserError, match="other records were passed in"):
        build_train_sampler(cfg, _records("other", 5, 0), 4)
    with pytest.raises(UserError, match="WeightedTrainingSampler needs DATASETS.TRAIN_REPEAT_FACTOR"):
        build_train_sampler(
            _use(cfg, "WeightedTrainingSampler", "DATASETS.TRAIN_REPEAT_FACTOR", []), _records("one", 5, 0), 4
        )


def test_grouping_needs_the_sizes(cfg):
    records = SerializedRecords([{"file_name": "a.png"}])
    with pytest.raises(UserError, match="ASPECT_RATIO_GROUPING needs the height and width"):
        build_train_sampler(cfg, records, 1)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert build_train_sampler(cfg, records, 1).size == 1
