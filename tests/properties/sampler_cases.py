"""Samplers of any size, batch, seed and grouping, and what they give."""

from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from plaintrain.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler

FACTORS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 4, allow_subnormal=False))


@st.composite
def cases(draw, grouped=None, longest=24):
    """A sampler's arguments: `make()` gives it anew, `make(4)` with another batch, `plain()` without groups.

    `low` and `high` say how often an image may come in a pass, each a number for each image.
    """
    size, batch_size = draw(st.integers(1, 40)), draw(st.integers(1, longest))
    seed, kind = draw(st.integers(0, 2**40)), draw(st.sampled_from(["all", "repeat", "subset"]))
    grouping, low, high = {}, np.ones(size, dtype=int), np.ones(size, dtype=int)
    if draw(st.booleans()) if grouped is None else grouped:
        numbers = st.one_of(st.integers(0, 2), st.floats(0.25, 4))
        grouping["groups"] = draw(st.lists(numbers, min_size=size, max_size=size))
        grouping["window"] = draw(st.integers(0, 4))
    if kind == "all":
        first, options = size, {"shuffle": draw(st.booleans())}
        maker = TrainingSampler
    elif kind == "repeat":
        factors = np.array(draw(st.lists(FACTORS, min_size=size, max_size=size)))
        factors[0] = max(factors[0], 1.0)
        first, options, maker = factors, {}, RepeatFactorTrainingSampler
        low, high = np.floor(factors).astype(int), np.ceil(factors).astype(int)
    else:
        ratio = draw(st.floats(0.01, 1))
        first, options = size, {}
        low = np.zeros(size, dtype=int)

        def maker(size, *arguments, **keys):
            return RandomSubsetTrainingSampler(size, ratio, *arguments, **keys)

    return SimpleNamespace(
        make=lambda batch=batch_size: maker(first, batch, seed=seed, **options, **grouping),
        plain=lambda: maker(first, batch_size, seed=seed, **options),
        kind=kind,
        factors=first,
        low=low,
        high=high,
        grouping=grouping,
        seed=seed,
    )


def stream(sampler, start, stop):
    """The images at the positions from `start` to `stop`, as batches give them."""
    first, last = start // sampler.batch_size, -(-stop // sampler.batch_size)
    images = [image for i in range(first, last) for image, _ in sampler.batch(i)]
    offset = start - first * sampler.batch_size
    return images[offset : offset + stop - start]


def pass_of(sampler, number):
    return stream(sampler, number * sampler.size, (number + 1) * sampler.size)
