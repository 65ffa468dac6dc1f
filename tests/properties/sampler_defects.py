"""Mistakes that a sampler could have, to patch into plaintrain.data.samplers."""

import numpy as np

from plaintrain.data.samplers import TrainingSampler


def batch_from(start_of):
    """A defect that has a rank's share start elsewhere: `start_of(sampler, iteration, rank, share)`."""

    def batch(self, iteration, rank=0, world_size=1):
        share = self.batch_size // world_size
        start = start_of(self, iteration, rank, share)
        return [(self.index_at(p), p) for p in range(start, start + share)]

    return lambda patch: patch.setattr(TrainingSampler, "batch", batch)


def order_from(change):
    """A defect that changes a pass's order: `change(sampler, number, original)`."""

    def defect(patch):
        original = TrainingSampler._pass_order
        patch.setattr(TrainingSampler, "_pass_order", lambda self, n: change(self, n, original))

    return defect


def padded(sampler, number, original):
    order = original(sampler, number)
    rest = order.size % sampler.batch_size
    return np.concatenate([order[: order.size - rest], order[:rest]])


def by_history(sampler, number, original):
    sampler.calls = getattr(sampler, "calls", 0) + 1
    return np.roll(original(sampler, number), sampler.calls)


def replayed(sampler, number, original):
    for earlier in range(max(number - 64, 0), number):
        original(sampler, earlier)
    return original(sampler, number)


def subset_of_the_pass(self, rng):
    return rng.choice(self.subset.max() + 1, size=self.size, replace=False)


def rounded_alone(self, rng):
    """Each factor rounded by itself, as LVIS does: the length of a pass varies."""
    counts = self._whole + (rng.random(self._whole.size) < self._extra)
    return np.resize(rng.permutation(np.repeat(np.arange(counts.size), counts)), self.size)


def cut_by_the_last_batch(patch):
    """A pass that is under way when the batch changes is ordered anew."""
    original = TrainingSampler._phase
    patch.setattr(
        TrainingSampler,
        "_phase",
        lambda self, column, value: self.phases[-1] if column else original(self, column, value),
    )


def padded_share(self, size, rank=0, world_size=1):
    """A rank's share of the images to evaluate, all of one length."""
    share = -(-size // world_size)
    self._range = range(share * rank, share * (rank + 1))
