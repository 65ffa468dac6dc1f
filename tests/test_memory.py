"""plaintrain.utils.memory: an out-of-memory error names the batch and the config keys."""

import functools

import pytest
import torch
from processes import Run

from plaintrain.utils.errors import UserError
from plaintrain.utils.memory import describe_out_of_memory, get_peak_memory, is_out_of_memory, note_batch

CUDA = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.20 GiB is free.\nIf reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MPS = "MPS backend out of memory (MPS allocated: 17.74 GB). Tried to allocate 1.00 GB on private pool."


@pytest.fixture(autouse=True)
def _forget():
    yield
    note_batch((), False)


def _fill_memory(in_training):
    from plaintrain.modeling.rcnn import GeneralizedRCNN

    forward = GeneralizedRCNN.forward

    def fail(model, samples):
        if model.training == in_training:
            raise torch.OutOfMemoryError(CUDA)
        return forward(model, samples)

    GeneralizedRCNN.forward = fail


TRAINING = (
    "in a training step with 4 image(s) in this process, the largest 3 x 48 x 48 (tried to allocate 2.25 "
    "GiB); lower SOLVER.IMS_PER_BATCH, keep it and raise SOLVER.ACCUMULATE_STEPS, set SOLVER.AMP.ENABLED "
    "True, or lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN (or INPUT.FIXED_SIZE, where it is set)"
)
EVALUATION = (
    "in an evaluation with 1 image(s) in this process, the largest 3 x 64 x 64 (tried to allocate 2.25 "
    "GiB); lower TEST.IMS_PER_BATCH, set TEST.AMP True, or lower INPUT.MIN_SIZE_TEST and "
    "INPUT.MAX_SIZE_TEST (or INPUT.FIXED_SIZE, TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE, where they are "
    "set)"
)


@pytest.mark.parametrize(("in_training", "words"), [(True, TRAINING), (False, EVALUATION)])
def test_out_of_memory_error_names_the_batch_and_the_keys(tmp_path, in_training, words):
    options = ["SOLVER.MAX_ITER", 1, "TEST.IMS_PER_BATCH", 1, "INPUT.MIN_SIZE_TRAIN", "(48,)"]
    options += ["INPUT.CROP.ENABLED", False]
    run = Run(tmp_path / "out", options, faults=functools.partial(_fill_memory, in_training)).wait()
    assert run.code == 1
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: out of memory {words}"]


def test_is_out_of_memory_for_the_messages_of_all_devices():
    note_batch([{"image": torch.zeros(3, 4, 9)}, {"image": torch.zeros(3, 5, 8)}], True)
    for text in (CUDA, CPU, MPS, "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        error = RuntimeError(text)
        advice = describe_out_of_memory(error)
        assert is_out_of_memory(error) and isinstance(advice, UserError) and advice.__cause__ is error
        assert "2 image(s) in this process, the largest 3 x 5 x 8" in str(advice)
        assert ("(tried to allocate 4000000000000 bytes)" in str(advice)) == (text is CPU)
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory"), UserError("x")):
        assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert is_out_of_memory(caught.value)


def test_describe_out_of_memory_for_samples_of_any_type():
    for samples, training, words in (
        ([], False, "before the first batch; end other processes, or choose a smaller model"),
        ([(1, 2), {"image": None}], True, "with 2 image(s) in this process; lower SOLVER"),
        ([{"views": []}] * 2, False, "with 2 image(s) in this process; lower TEST.IMS_PER_BATCH"),
    ):
        note_batch(samples, training)
        assert words in str(describe_out_of_memory(RuntimeError("")))


def test_peak_memory_is_that_of_this_process_in_mib():
    with open("/proc/self/status") as f:
        (peak,) = (int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))
    # Of the process that has started this one too.
    assert 0.5 < get_peak_memory()["max_mem"] / peak < 10
