"""How much memory a process holds, and what to say when it runs out.

Then: which batch did not fit, and which keys make it smaller.
"""

import math
import re
import sys

import torch

from plaintrain.utils.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

# CUDA, its driver and libraries, and MPS; the CPU.
_WORDS = ("out of memory", "status_alloc_failed", "can't allocate memory")
_ASKED = re.compile(r"ried to allocate ([\d.]+ \w+)")


class _Last:
    """The samples that the main thread has got last, and whether to train on."""

    samples, training = (), False


def note_batch(samples, training):
    """Say what the main thread works on from now on; the list is kept until the next one comes."""
    _Last.samples, _Last.training = samples, training


def peak_memory():
    """{"max_mem": MiB}: the most that this process has held so far, of a GPU's memory if it uses one.

    What torch has allocated on the current GPU, or the process' resident memory; {} where the system does
    not tell.
    """
    if torch.cuda.is_initialized():
        return {"max_mem": torch.cuda.max_memory_allocated() / 2**20}
    if resource is None:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return {"max_mem": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def is_out_of_memory(error):
    """Whether an exception says that the memory of a GPU, or the CPU's, is full."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _WORDS)
    )


def out_of_memory(error):
    """A `UserError` that says what did not fit and what to change; the exception is its cause."""
    asked = _ASKED.search(str(error))
    more = f", which was asked for {asked.group(1)} more," if asked else ""
    advice = UserError(f"the memory is full{more} {_where()}: {_advice()}")
    advice.__cause__ = error
    return advice


def _where():
    number = len(_Last.samples)
    if not number:
        return "before the first batch"
    # A sample may be one in another's place, or of somebody else's making.
    samples = [getattr(sample, "sample", sample) for sample in _Last.samples]
    images = [sample["image"] for sample in samples if isinstance(sample, dict) and "image" in sample]
    shapes = [tuple(image.shape) for image in images if isinstance(image, torch.Tensor)]
    largest = max(shapes, key=math.prod, default=())
    size = f", the largest image {' x '.join(map(str, largest))}" if largest else ""
    what = "in a training step" if _Last.training else "in an evaluation"
    return f"{what} with {number} image{'s' * (number > 1)} in this process{size}"


def _advice():
    if not _Last.samples:
        return "see what else has memory there, or choose a smaller model"
    fewer = len(_Last.samples) > 1
    if _Last.training:
        fewer = "lower SOLVER.IMS_PER_BATCH, keep it and raise SOLVER.ACCUMULATE_STEPS, " * fewer
        return f"{fewer}set SOLVER.AMP.ENABLED True, or lower {_size_keys('TRAIN')}"
    sizes = _size_keys("TEST")
    if isinstance(_Last.samples[0], dict) and "views" in _Last.samples[0]:
        sizes = "TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE"
    return f"{'lower TEST.IMS_PER_BATCH, ' * fewer}set TEST.AMP True, or lower {sizes}"


def _size_keys(split):
    return f"INPUT.MIN_SIZE_{split} and INPUT.MAX_SIZE_{split} (or INPUT.FIXED_SIZE, where it is set)"
