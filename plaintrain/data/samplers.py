"""Training and inference samplers, pure functions of the seed and the position in the stream."""

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from plaintrain.config import CfgNode, check_cfg, get_cfg, get_value
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrainingSampler:
    """An infinite stream of image indices: a new permutation in each epoch.

    Position p of the stream is in epoch `p // size`. Batches are consecutive positions, so a batch may
    contain images of two epochs, and no image is skipped or repeated.
    """

    size: int
    batch_size: int = 1  # over all ranks
    _: KW_ONLY
    seed: int = 0  # equal on all ranks
    shuffle: bool = True
    # A number per image, for example its aspect ratio: batches contain images with similar numbers.
    groups: Sequence[float] | np.ndarray | None = None
    # Images are grouped, and batches shuffled, within this many batches; 0 for the whole epoch.
    window: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise UserError("there is no image to train on")
        # (iteration, position, batch size); a phase begins where the batch size changes on resume.
        self.phases = [(0, 0, self.batch_size)]
        self.groups = None if self.groups is None else np.asarray(self.groups)
        self._get_order = functools.lru_cache(maxsize=2)(self._compute_order)

    def _draw(self, rng):
        """Draw the images of an epoch, `[size]`, in random order."""
        return rng.permutation(self.size)

    def _compute_order(self, epoch):
        if not self.shuffle:
            return np.arange(self.size)
        rng = np.random.default_rng((self.seed, epoch))
        order = self._draw(rng)
        if self.groups is None:
            return order
        # An epoch keeps the order of its first batch size, even if the batch size changes within it.
        _, position, batch_size = self._get_phase(1, epoch * self.size)
        # Images whose batch spans two epochs keep their random order.
        head = min((position - epoch * self.size) % batch_size, self.size)
        end = head + (self.size - head) // batch_size * batch_size
        step = self.window * batch_size or self.size
        for start in range(head, end, step):
            images = order[start : min(start + step, end)]
            images = images[np.argsort(self.groups[images], kind="stable")]
            order[start : start + images.size] = rng.permutation(images.reshape(-1, batch_size)).ravel()
        return order

    def _get_phase(self, column, value):
        """Return the last phase that begins at or before an iteration (column 0) or position (column 1)."""
        return next(phase for phase in reversed(self.phases) if phase[column] <= value)

    def get_position(self, iteration: int) -> int:
        start, position, batch_size = self._get_phase(0, iteration)
        return position + (iteration - start) * batch_size

    def get_index(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        return int(self._get_order(epoch)[offset])

    def get_batch(self, iteration: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return [(image index, position)] of one rank in an iteration."""
        num_images = self._get_phase(0, iteration)[2] // world_size
        start = self.get_position(iteration) + rank * num_images
        return [(self.get_index(p), p) for p in range(start, start + num_images)]

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank without end, for your own `DataLoader`."""
        return map(self.get_index, itertools.count(comm.get_rank(), comm.get_world_size()))

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "phases": [list(phase) for phase in self.phases]}

    def load_state_dict(self, state_dict: dict[str, Any], iteration: int) -> None:
        """Resume at an iteration; the batch size may change there."""
        if state_dict["size"] != self.size:
            raise UserError(
                f"an epoch of DATASETS.TRAIN has {self.size} images, but had {state_dict['size']} before: a "
                "run cannot continue with other data; start a new one from its weights"
            )
        self.phases = [tuple(phase) for phase in state_dict["phases"] if phase[0] <= iteration]
        old_batch_size = self.phases[-1][2]
        if old_batch_size != self.batch_size:
            self.phases.append((iteration, self.get_position(iteration), self.batch_size))
            logger.warning(
                f"the batch size changes from {old_batch_size} to {self.batch_size} at iteration {iteration} "
                f"(image {self.get_position(iteration) % self.size} of {self.size} of the epoch)"
            )
        self._get_order.cache_clear()


@dataclass(eq=False)
class GroupedBatchSampler:
    """Batches of a sampler's indices with equal `group_ids`; the last, incomplete ones are dropped."""

    sampler: Iterable[int]
    group_ids: Sequence[Any]
    batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        batches = defaultdict(list)
        group_ids = np.asarray(self.group_ids).tolist()
        for index in self.sampler:
            group_id = group_ids[index]
            batches[group_id].append(index)
            if len(batches[group_id]) == self.batch_size:
                yield batches.pop(group_id)


class RepeatFactorTrainingSampler(TrainingSampler):
    """A sampler that draws each image as often per epoch as its repeat factor, on average.

    As in LVIS (https://arxiv.org/abs/1908.03195), but an epoch always has round(sum of the factors) >= 1
    images. An image with factor f appears floor(f) or ceil(f) times; systematic sampling over a random
    permutation draws which factors are rounded up, with the probability of their fractions.
    """

    def __init__(self, factors: Sequence[float] | np.ndarray, batch_size: int = 1, **options: Any) -> None:
        factors = np.asarray(factors, dtype=np.float64)
        self._repeats = np.floor(factors).astype(np.int64)
        self._fractions = factors % 1
        size = round(factors.sum())
        # Scale the fractions, within 0 to 1, so that their sum is an integer.
        total = self._fractions.sum()
        self._num_up = size - self._repeats.sum()
        if self._num_up <= total:
            self._fractions *= self._num_up / max(total, 1)
        else:
            nonzero = self._fractions > 0
            rest = 1 - self._fractions[nonzero]
            self._fractions[nonzero] = 1 - rest * (nonzero.sum() - self._num_up) / (nonzero.sum() - total)
        super().__init__(size, batch_size, **options)

    def _draw(self, rng):
        images = rng.permutation(self._repeats.size)
        # The sum of the fractions has a rounding error.
        edges = np.minimum(np.cumsum(self._fractions[images])[:-1], self._num_up)
        edges = np.concatenate([[0], edges, [self._num_up]])
        counts = self._repeats[images] + np.diff(np.floor(edges + rng.uniform()).astype(np.int64))
        return rng.permutation(np.repeat(images, counts))

    @staticmethod
    def repeat_factors_from_category_frequency(
        records: Sequence[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> np.ndarray:
        """Return the repeat factor of each image, `[N]`, by its rarest class (arXiv 1908.03195, 4.2).

        A class c in a fraction f(c) of the images has r(c) = max(1, sqrt(repeat_thresh / f(c))), and an image
        the largest r(c) of its classes, or 1 without any.
        """
        images, labels = _list_image_classes(records)
        frequency = np.bincount(labels) / len(records)
        rate = np.maximum(1, repeat_thresh / frequency[labels])
        factors = np.ones(len(records))
        np.maximum.at(factors, images, np.sqrt(rate) if sqrt else rate)
        return factors


class RandomSubsetTrainingSampler(TrainingSampler):
    """A sampler of a random fraction `ratio` in (0, 1] of the images, which depends only on the seed."""

    def __init__(self, size: int, ratio: float, batch_size: int = 1, seed: int = 0, **options: Any) -> None:
        # The third number separates this generator from those of the epochs.
        rng = np.random.default_rng((seed, 0, 1))
        self.subset = np.sort(rng.choice(size, size=min(size, max(1, round(size * ratio))), replace=False))
        super().__init__(self.subset.size, batch_size, seed=seed, **options)

    def _draw(self, rng):
        return self.subset[rng.permutation(self.size)]


class InferenceSampler:
    """The contiguous indices of this rank; over all ranks, each index of `range(size)` once."""

    def __init__(self, size: int) -> None:
        self._range = self._get_local_indices(size, comm.get_world_size(), comm.get_rank())

    @staticmethod
    def _get_local_indices(size, world_size, rank):
        length, rest = divmod(size, world_size)
        start = length * rank + min(rank, rest)
        return range(start, start + length + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        return iter(self._range)

    def __len__(self):
        return len(self._range)


def compute_class_balanced_factors(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the repeat factor of each image, `[N]`, so that all classes are sampled equally often.

    The factor of an image is the sum of M / (K n(c)) over its classes: n(c) images contain class c, M contain
    any, and K classes occur. Images without annotations have 1, so the factors sum to N.
    """
    images, labels = _list_image_classes(records)
    num_images = np.bincount(labels)
    annotated = np.unique(images)
    factors = np.ones(len(records))
    factors[annotated] = 0
    np.add.at(factors, images, annotated.size / (np.count_nonzero(num_images) * num_images[labels]))
    return factors


def _list_image_classes(records):
    """Return (images, labels): the distinct classes of each image, int64 arrays of equal length."""
    pairs = [(i, c) for i, r in enumerate(records) for c in {a["category_id"] for a in r["annotations"]}]
    images, labels = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return images, labels


# Keys that only one sampler reads.
_READ_BY = {
    "DATALOADER.REPEAT_THRESHOLD": "RepeatFactorTrainingSampler",
    "DATASETS.TRAIN_REPEAT_FACTOR": "WeightedTrainingSampler",
    "DATALOADER.RANDOM_SUBSET_RATIO": "RandomSubsetTrainingSampler",
}


def build_train_sampler(cfg: CfgNode, records: SerializedRecords, batch_size: int) -> TrainingSampler:
    """Build DATALOADER.SAMPLER_TRAIN for the records of DATASETS.TRAIN; `batch_size` is over all ranks."""
    check_cfg(cfg)
    name = cfg.DATALOADER.SAMPLER_TRAIN
    for key, reader in _READ_BY.items():
        if name != reader and get_value(cfg, key) != get_value(get_cfg(), key):
            raise UserError(f"{key} is set, but only {reader} reads it; DATALOADER.SAMPLER_TRAIN is {name}")
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    options = {"batch_size": batch_size, "seed": seed, **_get_grouping(cfg, records)}
    if name == "TrainingSampler":
        return TrainingSampler(len(records), **options)
    if name == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO, **options)
    if name == "WeightedTrainingSampler":
        factors = _compute_dataset_factors(cfg, records)
    elif name == "ClassBalancedTrainingSampler":
        factors = compute_class_balanced_factors(records)
    else:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
        )
    return RepeatFactorTrainingSampler(factors, **options)


def _get_grouping(cfg, records):
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return {}
    if records.columns is None:
        raise UserError("DATALOADER.ASPECT_RATIO_GROUPING needs the height and width of every record")
    width = records.columns["width"]
    height = records.columns["height"]
    window = cfg.DATALOADER.GROUP_WINDOW
    # Without a window, the groups are portrait and landscape.
    return {"groups": width / height if window else width >= height, "window": window}


def _compute_dataset_factors(cfg, records):
    """Return the factor of each record by DATASETS.TRAIN_REPEAT_FACTOR, `[N]`."""
    key = "DATASETS.TRAIN_REPEAT_FACTOR"
    names = list(cfg.DATASETS.TRAIN)
    if not cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        raise UserError(f"WeightedTrainingSampler needs {key} [[name, factor], ...]")
    factors = dict.fromkeys(names, 1.0)
    for name, factor in cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        if name not in names:
            raise UserError(f"{key} must hold [one of {names}, factor], got {[name, factor]}")
        factors[name] = factor
    if len(records.lengths) != len(names):
        raise UserError(f"{key} needs the records of DATASETS.TRAIN, got other records")
    return np.repeat([factors[name] for name in names], records.lengths)
