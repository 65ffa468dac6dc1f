"""Peak memory, and the error message for out-of-memory."""

import math
import re
import resource
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from plaintrain.utils.errors import UserError

# Out-of-memory messages of CUDA and its libraries, MPS and the CPU.
_OOM_MESSAGES = ("out of memory", "status_alloc_failed", "can't allocate memory")
_TRAINING_ADVICE = (
    "lower SOLVER.IMS_PER_BATCH, keep it and raise SOLVER.ACCUMULATE_STEPS, set SOLVER.AMP.ENABLED True, or "
    "lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN (or INPUT.FIXED_SIZE, where it is set)"
)
_EVALUATION_ADVICE = (
    "lower TEST.IMS_PER_BATCH, set TEST.AMP True, or lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST (or "
    "INPUT.FIXED_SIZE, TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE, where they are set)"
)


class _LastBatch:
    """The batch that the main thread works on."""

    samples: Sequence[Any] = ()
    training = False


def note_batch(samples: Sequence[Any], training: bool) -> None:
    """Store the batch that the main thread works on, for `describe_out_of_memory`."""
    _LastBatch.samples = samples
    _LastBatch.training = training


def get_peak_memory() -> dict[str, float]:
    """Return {"max_mem": MiB}, the peak memory that torch has allocated on the GPU, or of the process."""
    if torch.cuda.is_initialized():
        return {"max_mem": torch.cuda.max_memory_allocated() / 2**20}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The unit is KiB on Linux and bytes on macOS.
    return {"max_mem": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the memory of a GPU or the CPU is full."""
    # Not str(), which may fail.
    text = "".join(traceback.format_exception_only(error)).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in text for message in _OOM_MESSAGES)
    )


def describe_out_of_memory(error: BaseException) -> UserError:
    """Return a `UserError`, caused by `error`, that names the batch and the config keys to change."""
    match = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    amount = f" (tried to allocate {match.group(1)})" if match else ""
    if not _LastBatch.samples:
        message = f"before the first batch{amount}; end other processes, or choose a smaller model"
    elif _LastBatch.training:
        message = f"in a training step with {_describe_batch()}{amount}; {_TRAINING_ADVICE}"
    else:
        message = f"in an evaluation with {_describe_batch()}{amount}; {_EVALUATION_ADVICE}"
    user_error = UserError(f"out of memory {message}")
    user_error.__cause__ = error
    return user_error


def _describe_batch() -> str:
    text = f"{len(_LastBatch.samples)} image(s) in this process"
    images = [sample.get("image") for sample in _LastBatch.samples if isinstance(sample, dict)]
    sizes = [image.shape for image in images if isinstance(image, torch.Tensor)]
    if sizes:
        text += f", the largest {' x '.join(map(str, max(sizes, key=math.prod)))}"
    return text
