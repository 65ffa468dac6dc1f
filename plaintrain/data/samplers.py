"""Which images a rank sees, as pure functions of the seed and the position in the stream."""

import functools
import logging
import math

import numpy as np

from plaintrain.config import check_cfg, get_cfg, get_value
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


class TrainingSampler:
    """The endless stream of training images: passes over a new permutation of all of them.

    Position p of the stream belongs to pass `p // size`; each pass holds every image once. A
    batch is the next `batch_size` positions, so one may straddle two passes and no image is
    skipped or repeated. Any position can be entered at once.

    Attributes:
        phases: [(iteration, position, batch size)]: from this iteration on, which begins at this position,
            batches have this size. More than one when the size was changed on resume.
    """

    def __init__(self, size, batch_size=1, *, seed=0, shuffle=True, groups=None, window=0):
        """
        Args:
            size: number of images, >= 1.
            batch_size: images per iteration, over all ranks.
            seed: non-negative integer; the same on every rank.
            shuffle: permute each pass; otherwise 0, 1, 2, ...
            groups: a number for each image, or None. Within a pass, batches are made of images of
                like numbers as far as they allow (images of like shape pad less).
            window: batches are made like this from so many batches of images at a time, and shuffled
                among them; 0: from a whole pass.
        """
        if size < 1:
            raise UserError("there is no image to train on")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.phases = [(0, 0, batch_size)]
        self.groups, self.window = None if groups is None else np.asarray(groups), window
        self._order = functools.lru_cache(maxsize=2)(self._pass_order)

    def _draw(self, rng):
        """The images of a pass, `[size]`, in random order."""
        return rng.permutation(self.size)

    def _pass_order(self, number):
        """The images of a pass, `[size]`, as they come."""
        if not self.shuffle:
            return np.arange(self.size)
        rng = np.random.default_rng((self.seed, number))
        order = self._draw(rng)
        if self.groups is None:
            return order
        # A pass keeps the order that it began with: a batch size that changes within it cuts it elsewhere.
        _, position, batch_size = self._phase(1, number * self.size)
        # The ends of a pass that share a batch with its neighbours keep their random order.
        head = min((position - number * self.size) % batch_size, self.size)
        end = head + (self.size - head) // batch_size * batch_size
        step = self.window * batch_size or self.size
        for start in range(head, end, step):
            images = order[start : min(start + step, end)]
            images = images[np.argsort(self.groups[images], kind="stable")]
            order[start : start + images.size] = rng.permutation(images.reshape(-1, batch_size)).ravel()
        return order

    def _phase(self, column, value):
        """The last phase that begins at or before an iteration (column 0) or a position (column 1)."""
        return next(phase for phase in reversed(self.phases) if phase[column] <= value)

    def position(self, iteration):
        """The position of the stream at which an iteration begins."""
        since, position, batch_size = self._phase(0, iteration)
        return position + (iteration - since) * batch_size

    def index_at(self, position):
        """The image at a position of the stream."""
        number, offset = divmod(position, self.size)
        return int(self._order(number)[offset])

    def batch(self, iteration, rank=0, world_size=1):
        """[(image, position)] of one iteration for one rank."""
        share = self._phase(0, iteration)[2] // world_size
        start = self.position(iteration) + rank * share
        return [(self.index_at(p), p) for p in range(start, start + share)]

    def state_dict(self):
        """How long a pass is, and the batch sizes so far."""
        return {"size": self.size, "phases": [list(phase) for phase in self.phases]}

    def load_state_dict(self, state_dict, iteration):
        """Go on with the stream of a run at an iteration, also where batches have another size from there.

        Args:
            state_dict: the state of the run's sampler.
            iteration: the next one.
        """
        if state_dict["size"] != self.size:
            raise UserError(
                f"a pass over DATASETS.TRAIN has {self.size} images, and in the run that is resumed it had "
                f"{state_dict['size']}: a run cannot go on with other data; start a new one from its weights"
            )
        self.phases = [tuple(phase) for phase in state_dict["phases"] if phase[0] <= iteration]
        before = self.phases[-1][2]
        if before != self.batch_size:
            self.phases.append((iteration, self.position(iteration), self.batch_size))
            logger.warning(
                f"from iteration {iteration} on a batch has {self.batch_size} images and not {before}; the "
                f"pass goes on at its image {self.position(iteration) % self.size} of {self.size}"
            )
        self._order.cache_clear()


class RepeatFactorTrainingSampler(TrainingSampler):
    """Passes in which an image comes as often as its factor says, on average over passes.

    The stochastic rounding of LVIS (https://arxiv.org/abs/1908.03195), with the sum held: a pass
    has round(sum of the factors) positions, and an image with factor f comes floor(f) or ceil(f)
    times in it. Which images are rounded up is drawn anew for each pass, by systematic sampling over
    a random permutation: each with the probability that its fraction gives it, up to the rounding
    of the sum.
    """

    def __init__(self, factors, batch_size=1, **options):
        """
        Args:
            factors: a number >= 0 for each image, whose sum is at least one half.
            batch_size, options: see `TrainingSampler`.
        """
        factors = np.asarray(factors, dtype=np.float64)
        self._whole, self._extra = np.floor(factors).astype(np.int64), factors % 1
        size = round(factors.sum())
        # The fractions are moved a little, within 0 to 1, so that their sum is a whole number.
        up, num_up, some = self._extra.sum(), size - self._whole.sum(), self._extra > 0
        if num_up <= up:
            self._extra *= num_up / max(up, 1)
        else:
            self._extra[some] = 1 - (1 - self._extra[some]) * (some.sum() - num_up) / (some.sum() - up)
        self._num_up = num_up
        super().__init__(size, batch_size, **options)

    def _draw(self, rng):
        images = rng.permutation(self._whole.size)
        edges = np.concatenate([[0], np.cumsum(self._extra[images])])
        # Sums of fractions are not exact.
        edges = np.append(np.minimum(edges[:-1], self._num_up), self._num_up)
        counts = self._whole[images] + np.diff(np.floor(edges + rng.uniform()).astype(np.int64))
        return rng.permutation(np.repeat(images, counts))


class RandomSubsetTrainingSampler(TrainingSampler):
    """Passes over a random subset of the images, which the seed alone decides."""

    def __init__(self, size, ratio, batch_size=1, *, seed=0, **options):
        """
        Args:
            size: number of images.
            ratio: the share of them to use, in (0, 1]; at least one image is used.
            batch_size, seed, options: see `TrainingSampler`.
        """
        # Three numbers, where the generator of a pass has two.
        rng = np.random.default_rng((seed, 0, 1))
        self.subset = np.sort(rng.choice(size, size=min(size, max(1, round(size * ratio))), replace=False))
        super().__init__(self.subset.size, batch_size, seed=seed, **options)

    def _draw(self, rng):
        return self.subset[rng.permutation(self.size)]


class InferenceSampler:
    """A rank's share of `range(size)`: contiguous, none missing, none twice."""

    def __init__(self, size, rank=0, world_size=1):
        self._range = range(size * rank // world_size, size * (rank + 1) // world_size)

    def __iter__(self):
        return iter(self._range)

    def __len__(self):
        return len(self._range)


def repeat_factors_from_category_frequency(records, repeat_thresh, sqrt=True):
    """Return the repeat factor of each image, `[N]`, by its rarest class (arXiv 1908.03195, 4.2).

    A class c in the share f(c) of the images has r(c) = max(1, sqrt(repeat_thresh / f(c))), and an
    image the largest r(c) of its classes; 1 if it has none. LVIS takes the square root.
    """
    images, labels = _classes_of_images(records)
    share = np.bincount(labels) / len(records)
    rate = np.maximum(1, repeat_thresh / share[labels])
    factors = np.ones(len(records))
    np.maximum.at(factors, images, np.sqrt(rate) if sqrt else rate)
    return factors


def compute_class_balanced_factors(records):
    """Return the repeat factor of each image, `[N]`, for which every class is drawn as often.

    As if a class were drawn, each as likely, and then one of its images: an image has the sum of
    M / (K n(c)) over its classes, where n(c) images hold class c, M hold any, and K classes occur.
    Images without annotations have 1, so that the sum of all is N.
    """
    images, labels = _classes_of_images(records)
    images_of, used = np.bincount(labels), np.unique(images)
    factors = np.ones(len(records))
    factors[used] = 0
    np.add.at(factors, images, used.size / (np.count_nonzero(images_of) * images_of[labels]))
    return factors


def _classes_of_images(records):
    """(images, labels): every class of every image once, int64 arrays of one length."""
    pairs = [(i, c) for i, r in enumerate(records) for c in {a["category_id"] for a in r["annotations"]}]
    images, labels = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return images, labels


# Keys that one sampler alone reads.
_READ_BY = {
    "DATALOADER.REPEAT_THRESHOLD": "RepeatFactorTrainingSampler",
    "DATASETS.TRAIN_REPEAT_FACTOR": "WeightedTrainingSampler",
    "DATALOADER.RANDOM_SUBSET_RATIO": "RandomSubsetTrainingSampler",
}


def build_train_sampler(cfg, records, batch_size):
    """Build the sampler of DATALOADER.SAMPLER_TRAIN, with the keys that it reads.

    Args:
        cfg: the config.
        records: `SerializedRecords`, of the datasets in DATASETS.TRAIN.
        batch_size: images per iteration, over all ranks.
    """
    check_cfg(cfg)
    name, loading, defaults = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER, get_cfg()
    for key, reader in _READ_BY.items():
        if name != reader and get_value(cfg, key) != get_value(defaults, key):
            raise UserError(
                f"{key} is set, but only {reader} reads it, and DATALOADER.SAMPLER_TRAIN is {name}"
            )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    options = {"batch_size": batch_size, "seed": seed, **_grouping(cfg, records)}
    if name == "TrainingSampler":
        return TrainingSampler(len(records), **options)
    if name == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(len(records), loading.RANDOM_SUBSET_RATIO, **options)
    if name == "WeightedTrainingSampler":
        factors = _factors_of_datasets(cfg, records)
    elif name == "ClassBalancedTrainingSampler":
        factors = compute_class_balanced_factors(records)
    else:
        threshold, sqrt = loading.REPEAT_THRESHOLD, loading.REPEAT_SQRT
        factors = repeat_factors_from_category_frequency(records, threshold, sqrt)
    return RepeatFactorTrainingSampler(factors, **options)


def _grouping(cfg, records):
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return {}
    if records.columns is None:
        raise UserError("DATALOADER.ASPECT_RATIO_GROUPING needs the height and width of every record")
    height, width, window = records.columns["height"], records.columns["width"], cfg.DATALOADER.GROUP_WINDOW
    # Without a window, there are two groups: images that are higher than wide, and the others.
    return {"groups": width / height if window else width >= height, "window": window}


def _factors_of_datasets(cfg, records):
    """Return the factor of each record by DATASETS.TRAIN_REPEAT_FACTOR, `[N]`."""
    key, names = "DATASETS.TRAIN_REPEAT_FACTOR", list(cfg.DATASETS.TRAIN)
    if not cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        raise UserError(f"WeightedTrainingSampler needs {key}, [[name, factor], ...]")
    factors = dict.fromkeys(names, 1.0)
    for entry in cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        name, factor = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        if name not in names or type(factor) not in (int, float) or not 0 <= factor < math.inf:
            raise UserError(f"{key} has {entry!r}, not [name, number >= 0] with one of the names {names}")
        factors[name] = factor
    if len(records.lengths) != len(names):
        raise UserError(f"{key} is about the datasets of DATASETS.TRAIN, but other records were passed in")
    return np.repeat([factors[name] for name in names], records.lengths)
