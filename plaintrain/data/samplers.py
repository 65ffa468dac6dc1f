"""Which images a rank sees, as pure functions of the seed and the position in the stream."""

import functools

import numpy as np

from plaintrain.utils.errors import UserError


class TrainingSampler:
    """The endless stream of training images: passes over a new permutation of all of them.

    Position p of the stream belongs to pass `p // size`; each pass holds every image once. A
    batch is the next `batch_size` positions, so one may straddle two passes and no image is
    skipped or repeated. Any position can be entered at once.
    """

    def __init__(self, size, batch_size=1, *, seed=0, shuffle=True, groups=None):
        """
        Args:
            size: number of images, >= 1.
            batch_size: images per iteration, over all ranks.
            seed: non-negative integer; the same on every rank.
            shuffle: permute each pass; otherwise 0, 1, 2, ...
            groups: `[size]` integers or None. Within a pass, batches are made of images of one
                group as far as the numbers allow (two groups by aspect ratio pad less).

        Raises:
            UserError: no image.
        """
        if size < 1:
            raise UserError("there is no image to train on")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.groups = None if groups is None else np.asarray(groups)
        self._order = functools.lru_cache(maxsize=2)(self._pass_order)

    def _pass_order(self, number):
        """The images of a pass, `[size]`, in the order in which they come."""
        if not self.shuffle:
            return np.arange(self.size)
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(self.size)
        if self.groups is None:
            return order
        # The ends of a pass that share a batch with its neighbours keep their random order.
        head = min(-(number * self.size) % self.batch_size, self.size)
        full = (self.size - head) // self.batch_size
        middle = order[head : head + full * self.batch_size]
        middle = middle[np.argsort(self.groups[middle], kind="stable")]
        middle = rng.permutation(middle.reshape(full, self.batch_size))
        return np.concatenate([order[:head], middle.ravel(), order[head + middle.size :]])

    def index_at(self, position):
        """The image at a position of the stream."""
        number, offset = divmod(position, self.size)
        return int(self._order(number)[offset])

    def batch(self, iteration, rank=0, world_size=1):
        """[(image, position)] of one iteration for one rank."""
        share = self.batch_size // world_size
        start = iteration * self.batch_size + rank * share
        return [(self.index_at(p), p) for p in range(start, start + share)]


class InferenceSampler:
    """A rank's share of `range(size)`: contiguous, none missing, none twice."""

    def __init__(self, size, rank=0, world_size=1):
        self._range = range(size * rank // world_size, size * (rank + 1) // world_size)

    def __iter__(self):
        return iter(self._range)

    def __len__(self):
        return len(self._range)


def aspect_ratio_groups(heights, widths):
    """0 for images that are higher than wide, 1 for the others, `[N]`."""
    return (np.asarray(widths) >= np.asarray(heights)).astype(np.int64)
