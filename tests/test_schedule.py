"""Periods, the order of epochs, scaling to batch and processes: plaintrain.solver.schedule."""

import itertools
import math
import re

import pytest

from plaintrain.config import check_cfg, get_cfg, get_value, set_value
from plaintrain.solver.schedule import every, resolve_schedule, validates_after
from plaintrain.utils.errors import UserError


def test_every_is_true_after_start_and_each_period_of_finished_iterations():
    for period, start in itertools.product((0, 1, 2, 3, 7, 20), (0, 1, 2, 3, 5, 11)):
        expected = [n - 1 for n in range(1, 23) if period and n >= start and (n - start) % period == 0]
        assert [i for i in range(-1, 22) if every(period, i, start=start)] == expected


TRAIN_VAL = [["train", 2], ["val", 1]]


@pytest.mark.parametrize(
    ("workflow", "epochs", "expected"),
    [
        (TRAIN_VAL, 5, [1, 3, 4]),
        ([("val", 1), ("train", 2)], 3, [-1, 1]),
        ([["train", 1]], 3, []),
        ([["train", 1], ["val", 1], ["train", 2]], 4, [0, 3]),
        ([["val", 2], ["train", 1], ["val", 1]], 2, [-1, 0, 1]),
        (TRAIN_VAL, 0, []),
    ],
)
def test_workflow_validates_after_its_epochs(workflow, epochs, expected):
    cfg = make_cfg(SOLVER__MAX_EPOCHS=epochs, WORKFLOW=workflow)
    assert [epoch for epoch in range(-1, epochs + 1) if validates_after(cfg, epoch)] == expected


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (
            "WORKFLOW",
            [
                *[[["train", 1], flow] for flow in ("train", ["train"], ["train", 1, 2], ["test", 1], None)],
                *[[["train", 1], flow] for flow in (["val", 0], ["train", 1.0], ["train", True])],
                *[[], [["val", 1]]],
            ],
        ),
        (
            "SOLVER.MOMENTUM_SCHEDULE",
            [
                *[[[0, 0.9], 5], [[0, 0.9, 1]], [[0, True]], [[0, 1.0]], [[0, -0.1]], [[0, math.nan]]],
                [[5, 0.9], [5, 0.8]],
            ],
        ),
    ],
)
def test_malformed_workflows_and_momentum_schedules_are_rejected(key, values):
    for value in values:
        cfg = get_cfg()
        set_value(cfg, key, value)
        with pytest.raises(UserError, match=rf"^{key} must be \[\["):
            check_cfg(cfg)


# As in the description of Detectron2's DefaultTrainer.auto_scale_workers, and what it leaves out.
WRITTEN = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.BASE_LR_END": 0.01,
    "SOLVER.MAX_ITER": 5000,
    "SOLVER.WARMUP_ITERS": 1001,
    "SOLVER.STEPS": (3000, 4000),
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "SOLVER.MOMENTUM_SCHEDULE": [[0, 0.95], [500, 0.85]],
    "TEST.EVAL_PERIOD": 200,
    "TEST.EVAL_START": 600,
    "TEST.VAL_LOSS_PERIOD": 50,
}
BY_EPOCH = {
    "SOLVER__MAX_EPOCHS": 12,
    "SOLVER__BY_EPOCH": True,
    "SOLVER__STEPS": (8, 11),
    "SOLVER__CHECKPOINT_PERIOD": 1,
    "SOLVER__MOMENTUM_SCHEDULE": [[0, 0.95], [3, 0.85]],
    "TEST__EVAL_PERIOD": 2,
    "TEST__EVAL_START": 4,
    "TEST__VAL_LOSS_PERIOD": 0,
}


def make_cfg(**more):
    """Return `WRITTEN`, then KEY=value; `A__B` stands for A.B."""
    cfg = get_cfg()
    for key, value in {**WRITTEN, **more}.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def settle(cfg, num_workers=1, per_epoch=None):
    """Return the counts after `resolve_schedule`, for a dataset of `per_epoch` iterations."""
    resolve_schedule(cfg, num_workers, lambda _: per_epoch or pytest.fail("asked for the length of an epoch"))
    return {key: get_value(cfg, key) for key in WRITTEN}


def test_schedule_of_twice_the_processes_is_half_as_long_at_twice_the_learning_rate():
    cfg = make_cfg(SOLVER__REFERENCE_WORLD_SIZE=8)
    cfg.freeze()
    assert settle(cfg, num_workers=16) == {
        "SOLVER.IMS_PER_BATCH": 32,
        "SOLVER.BASE_LR": pytest.approx(0.2),
        "SOLVER.BASE_LR_END": pytest.approx(0.02),
        "SOLVER.MAX_ITER": 2500,
        "SOLVER.WARMUP_ITERS": 500,
        "SOLVER.STEPS": (1500, 2000),
        "SOLVER.CHECKPOINT_PERIOD": 500,
        "SOLVER.MOMENTUM_SCHEDULE": [[0, 0.95], [250, 0.85]],
        "TEST.EVAL_PERIOD": 100,
        "TEST.EVAL_START": 300,
        "TEST.VAL_LOSS_PERIOD": 25,
    }
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 16 and cfg.is_frozen()
    # Resumed with other processes, it is scaled from there.
    counts = settle(cfg, num_workers=1)
    assert (counts["SOLVER.IMS_PER_BATCH"], counts["SOLVER.MAX_ITER"]) == (2, 40_000)
    assert counts["SOLVER.BASE_LR"] == pytest.approx(0.0125)


def test_schedule_of_16_times_the_batch_keeps_periods_on_or_off():
    off = {"SOLVER__CHECKPOINT_PERIOD": 0, "TEST__EVAL_START": 0, "SOLVER__STEPS": ()}
    cfg = make_cfg(SOLVER__REFERENCE_IMS_PER_BATCH=1, TEST__VAL_LOSS_PERIOD=1, **off)
    counts = settle(cfg, num_workers=2)
    assert counts["SOLVER.IMS_PER_BATCH"] == cfg.SOLVER.REFERENCE_IMS_PER_BATCH == 16
    assert counts["SOLVER.BASE_LR"] == pytest.approx(1.6) and counts["SOLVER.MAX_ITER"] == 312
    assert counts["TEST.EVAL_PERIOD"] == 12 and counts["TEST.VAL_LOSS_PERIOD"] == 1
    assert counts["SOLVER.CHECKPOINT_PERIOD"] == counts["TEST.EVAL_START"] == 0
    assert counts["SOLVER.STEPS"] == ()


@pytest.mark.parametrize(
    ("reference", "num_workers", "batch", "lr", "warmup"),
    [
        ({}, 1, 16, 0.1, 1001),
        # Epochs are epochs whatever the batch: only the learning rate and the warm-up are scaled.
        ({"SOLVER__REFERENCE_WORLD_SIZE": 8}, 4, 8, 0.05, 2002),
        ({"SOLVER__REFERENCE_IMS_PER_BATCH": 4}, 4, 16, 0.4, 250),
    ],
)
def test_counts_of_epochs_become_iterations(reference, num_workers, batch, lr, warmup):
    cfg = make_cfg(**BY_EPOCH, **reference)
    assert settle(cfg, num_workers, per_epoch=70) == {
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.BASE_LR": pytest.approx(lr),
        "SOLVER.BASE_LR_END": pytest.approx(lr / 10),
        "SOLVER.MAX_ITER": 840,
        "SOLVER.WARMUP_ITERS": warmup,
        "SOLVER.STEPS": (560, 770),
        "SOLVER.CHECKPOINT_PERIOD": 70,
        "SOLVER.MOMENTUM_SCHEDULE": [[0, 0.95], [210, 0.85]],
        "TEST.EVAL_PERIOD": 140,
        "TEST.EVAL_START": 280,
        "TEST.VAL_LOSS_PERIOD": 0,
    }
    assert not cfg.SOLVER.BY_EPOCH
    # An epoch is counted after the batch is scaled; other counts are not of epochs without BY_EPOCH.
    cfg, batches = make_cfg(SOLVER__MAX_EPOCHS=2, SOLVER__REFERENCE_WORLD_SIZE=8), []
    resolve_schedule(cfg, 2, lambda cfg: batches.append(cfg.SOLVER.IMS_PER_BATCH) or 10)
    assert batches == [4] and cfg.SOLVER.MAX_ITER == 20 and cfg.SOLVER.STEPS == (12_000, 16_000)


@pytest.mark.parametrize(
    "more",
    [
        {"SOLVER__REFERENCE_WORLD_SIZE": 8},
        {"SOLVER__REFERENCE_IMS_PER_BATCH": 4},
        {**BY_EPOCH, "SOLVER__REFERENCE_WORLD_SIZE": 8},
    ],
)
def test_resolve_schedule_changes_nothing_again_or_from_the_dumped_config(more, log):
    cfg = make_cfg(**more)
    settle(cfg, num_workers=4, per_epoch=70)
    before = cfg.dump()
    again = get_cfg()
    again.merge_from_other_cfg(type(cfg)._load_cfg_from_yaml_str(before))
    log.clear()
    settle(again, num_workers=4, per_epoch=70)
    assert again.dump() == before and "the schedule of this run" not in log.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"BY_EPOCH": True}, "MAX_EPOCHS must be set if SOLVER.BY_EPOCH is True, got 0"),
        (
            {"REFERENCE_WORLD_SIZE": 8, "REFERENCE_IMS_PER_BATCH": 8},
            "REFERENCE_WORLD_SIZE and SOLVER.REFERENCE_IMS_PER_BATCH must not both scale the schedule, "
            "got 8 and 8; set one of them to 0",
        ),
        (
            {"REFERENCE_WORLD_SIZE": 6},
            "IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE 6, got 16",
        ),
    ],
)
def test_schedule_errors_name_the_keys(more, message):
    cfg = make_cfg(**{f"SOLVER__{key}": value for key, value in more.items()})
    with pytest.raises(UserError, match=f"^{re.escape(f'SOLVER.{message}')}$"):
        settle(cfg, per_epoch=70)
