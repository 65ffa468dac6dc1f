"""plaintrain.utils.memory: a run whose memory is full ends with one sentence that says what to change."""

import logging
import runpy
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from plaintrain.arguments import default_argument_parser
from plaintrain.launch import launch
from plaintrain.utils import memory
from plaintrain.utils.errors import UserError
from plaintrain.utils.memory import is_out_of_memory, note_batch, out_of_memory

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "plain_train_net.py"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.20 GiB is free.\nIf reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MPS = "MPS backend out of memory (MPS allocated: 17.74 GB). Tried to allocate 1.00 GB on private pool."
TINY = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_tiny_backbone, FREEZE_AT: 0}
  TINY: {CHANNELS: [8, 16], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16, 32]]}
INPUT: {MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 64}
DATASETS:
  DECLARE:
    full_train: {FORMAT: shapes, SPLIT: train, NUM: 12, HEIGHT: 32, WIDTH: 64}
    full_val: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 64}
  TRAIN: [full_train]
  TEST: [full_val]
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 4, STEPS: [], MAX_ITER: 2}
TEST: {IMS_PER_BATCH: 1}
OUTPUT: {REPORT: False}
SEED: 3
"""


@pytest.fixture(autouse=True)
def _forget():
    yield
    note_batch((), False)
    for handler in logging.getLogger("plaintrain").handlers[:]:
        logging.getLogger("plaintrain").removeHandler(handler)


@pytest.mark.parametrize(
    ("in_training", "words"),
    [
        (
            True,
            "in a training step with 4 images in this process, the largest image 3 x 48 x 96: lower "
            "SOLVER.IMS_PER_BATCH, keep it and raise SOLVER.ACCUMULATE_STEPS, set SOLVER.AMP.ENABLED True, "
            "or lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN (or INPUT.FIXED_SIZE, where it is set)",
        ),
        (
            False,
            "in an evaluation with 1 image in this process, the largest image 3 x 64 x 64: set TEST.AMP "
            "True, or lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST (or INPUT.FIXED_SIZE, where it is "
            "set)",
        ),
    ],
)
def test_a_run_ends_with_the_batch_and_the_keys(tmp_path, capfd, in_training, words):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    main = runpy.run_path(str(SCRIPT))["main"]
    build_model = main.__globals__["build_model"]

    def build(cfg):
        def fail(module, args):
            if module.training == in_training:
                raise torch.OutOfMemoryError(CUDA)

        model = build_model(cfg)
        model.register_forward_pre_hook(fail)
        return model

    main.__globals__["build_model"] = build
    options = ["--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        launch(main, args=(default_argument_parser().parse_args(options),))
    assert stop.value.code == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error == [f"error: the memory is full, which was asked for 2.25 GiB more, {words}"]


@pytest.mark.parametrize("text", [CUDA, CPU, MPS, "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_the_messages_of_all_devices_are_known(text):
    note_batch([{"image": torch.zeros(3, 4, 9)}, {"image": torch.zeros(3, 5, 8)}], True)
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    said = out_of_memory(error)
    assert isinstance(said, UserError)
    assert said.__cause__ is error
    assert "2 images in this process, the largest image 3 x 5 x 8: lower" in str(said)
    assert ("4000000000000 bytes more" in str(said)) == (text is CPU)


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(10**16)
    assert is_out_of_memory(found.value)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory"), UserError("x")):
        assert not is_out_of_memory(error)


def test_of_samples_without_images_the_keys_are_said():
    note_batch([(1, 2), {"image": None}], True)
    assert "with 2 images in this process: lower SOLVER" in str(out_of_memory(RuntimeError("")))
    note_batch([{"views": []}, {"views": []}], False)
    said = str(out_of_memory(RuntimeError("")))
    assert said.endswith(
        "lower TEST.IMS_PER_BATCH, set TEST.AMP True, or lower TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE"
    )


def test_before_any_batch_none_is_made_smaller():
    said = str(out_of_memory(RuntimeError("")))
    assert said == (
        "the memory is full before the first batch: see what else has memory there, or choose a smaller model"
    )


def test_debug_shows_the_error_itself_too(capfd):
    def main(args):
        raise torch.OutOfMemoryError(CUDA)

    with pytest.raises(SystemExit):
        launch(main, args=(Namespace(debug=True),))
    text = capfd.readouterr().err
    assert "total capacity of 79.10 GiB" in text
    assert "the memory is full" in text
    assert "in main" in text


def test_the_last_batch_is_the_one_of_the_main_thread():
    note_batch([1], True)
    note_batch([2, 3], False)
    assert (memory._Last.samples, memory._Last.training) == ([2, 3], False)
