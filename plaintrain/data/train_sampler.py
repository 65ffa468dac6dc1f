"""The training sampler that a config describes."""

import math

import numpy as np

from plaintrain.config import check_cfg
from plaintrain.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
    aspect_ratio_groups,
    class_balanced_factors,
    repeat_factors_from_category_frequency,
)
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


def build_train_sampler(cfg, records, batch_size):
    """The sampler of DATALOADER.SAMPLER_TRAIN, with the keys that it reads.

    Args:
        cfg: the config.
        records: `SerializedRecords`, of the datasets in DATASETS.TRAIN.
        batch_size: images per iteration, over all ranks.

    Returns:
        A `TrainingSampler`.

    Raises:
        UserError: an unknown sampler, or a key that it cannot use or does not read.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    check_cfg(cfg)
    settings = {
        "DATALOADER.REPEAT_THRESHOLD": (cfg.DATALOADER.REPEAT_THRESHOLD, "RepeatFactorTrainingSampler"),
        "DATASETS.TRAIN_REPEAT_FACTOR": (cfg.DATASETS.TRAIN_REPEAT_FACTOR, "WeightedTrainingSampler"),
        "DATALOADER.RANDOM_SUBSET_RATIO": (
            cfg.DATALOADER.RANDOM_SUBSET_RATIO != 1,
            "RandomSubsetTrainingSampler",
        ),
    }
    for key, (is_set, reader) in settings.items():
        if is_set and name != reader:
            raise UserError(
                f"{key} is set, but only {reader} reads it, and DATALOADER.SAMPLER_TRAIN is {name}"
            )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return _SAMPLERS[name](cfg, records, {"batch_size": batch_size, "seed": seed, **_grouping(cfg, records)})


def _grouping(cfg, records):
    window = cfg.DATALOADER.GROUP_WINDOW
    if window < 0:
        raise UserError(f"DATALOADER.GROUP_WINDOW is {window}, but must be at least 0")
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return {}
    if records.columns is None:
        raise UserError("DATALOADER.ASPECT_RATIO_GROUPING needs the height and width of every record")
    height, width = records.columns["height"], records.columns["width"]
    return {"groups": width / height if window else aspect_ratio_groups(height, width), "window": window}


def _by_class_frequency(cfg, records, keys):
    threshold = cfg.DATALOADER.REPEAT_THRESHOLD
    if not 0 < threshold <= 1:
        raise UserError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold}, but RepeatFactorTrainingSampler needs a share "
            "of the images in (0, 1], 0.001 for LVIS"
        )
    factors = repeat_factors_from_category_frequency(records, threshold, cfg.DATALOADER.REPEAT_SQRT)
    return RepeatFactorTrainingSampler(factors, **keys)


def _weighted(cfg, records, keys):
    where, names = "DATASETS.TRAIN_REPEAT_FACTOR", list(cfg.DATASETS.TRAIN)
    if not cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        raise UserError(f"WeightedTrainingSampler needs {where}, [[name, factor], ...]")
    factors = dict.fromkeys(names, 1.0)
    for entry in cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[0] not in factors:
            raise UserError(
                f"{where} has {entry!r}, not [name, factor] with a name in DATASETS.TRAIN: {names}"
            )
        if type(entry[1]) not in (int, float) or not 0 <= entry[1] < math.inf:
            raise UserError(f"{where} gives {entry[0]} the factor {entry[1]!r}, not a number >= 0")
        factors[entry[0]] = entry[1]
    if len(records.lengths) != len(names):
        raise UserError(f"{where} is about the datasets of DATASETS.TRAIN, but other records were passed in")
    return RepeatFactorTrainingSampler(np.repeat([factors[name] for name in names], records.lengths), **keys)


_SAMPLERS = {
    "TrainingSampler": lambda _, records, keys: TrainingSampler(len(records), **keys),
    "RepeatFactorTrainingSampler": _by_class_frequency,
    "ClassBalancedTrainingSampler": lambda _, records, keys: RepeatFactorTrainingSampler(
        class_balanced_factors(records), **keys
    ),
    "WeightedTrainingSampler": _weighted,
    "RandomSubsetTrainingSampler": lambda cfg, records, keys: RandomSubsetTrainingSampler(
        len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO, **keys
    ),
}
