"""Peak memory of a process, and the message when it runs out: the batch and the keys to change."""

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
_TRAINING_ADVICE = (
    "lower SOLVER.IMS_PER_BATCH, keep it and raise SOLVER.ACCUMULATE_STEPS, set SOLVER.AMP.ENABLED True, or "
    "lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN (or INPUT.FIXED_SIZE, where it is set)"
)
_EVALUATION_ADVICE = (
    "lower TEST.IMS_PER_BATCH, set TEST.AMP True, or lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST (or "
    "INPUT.FIXED_SIZE, TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE, where they are set)"
)


class _Last:
    """The samples that the main thread has got last, and whether to train on."""

    samples, training = (), False


def note_batch(samples, training):
    """Note what the main thread works on from now on; the list is kept until the next one comes."""
    _Last.samples, _Last.training = samples, training


def get_peak_memory():
    """Return {"max_mem": MiB}: the most that this process has held so far, of a GPU's memory if it uses one.

    It is what torch has allocated on the current GPU, or the process' resident memory; {} where the system
    does not tell.
    """
    if torch.cuda.is_initialized():
        return {"max_mem": torch.cuda.max_memory_allocated() / 2**20}
    if resource is None:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return {"max_mem": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def is_out_of_memory(error):
    """Return whether an exception says that the memory of a GPU, or the CPU's, is full."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _WORDS)
    )


def describe_out_of_memory(error):
    """Return a `UserError` that says what did not fit and what to change; the exception is its cause."""
    amount = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    more = f", which was asked for {amount.group(1)} more," if amount else ""
    if not _Last.samples:
        place = "before the first batch: see what else has memory there, or choose a smaller model"
    elif _Last.training:
        place = f"in a training step with {_describe_batch()}: {_TRAINING_ADVICE}"
    else:
        place = f"in an evaluation with {_describe_batch()}: {_EVALUATION_ADVICE}"
    advice = UserError(f"the memory is full{more} {place}")
    advice.__cause__ = error
    return advice


def _describe_batch():
    text = f"{len(_Last.samples)} image(s) in this process"
    images = [sample.get("image") for sample in _Last.samples if isinstance(sample, dict)]
    sizes = [image.shape for image in images if isinstance(image, torch.Tensor)]
    if sizes:
        text += f", the largest {' x '.join(map(str, max(sizes, key=torch.Size.numel)))}"
    return text
