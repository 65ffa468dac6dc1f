"""Counts brought to a run's processes, batch and epochs: plaintrain.scaling."""

import pytest

from plaintrain.config import get_cfg, get_value
from plaintrain.scaling import settle_schedule
from plaintrain.utils.errors import UserError

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


def make_cfg(**more):
    """`WRITTEN`, then KEY=value; `A__B` stands for A.B."""
    cfg = get_cfg()
    for key, value in {**WRITTEN, **more}.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def settle(cfg, num_workers=1, per_epoch=None):
    """The counts after `settle_schedule`, of a data set that has `per_epoch` iterations."""

    def count(given):
        assert given is cfg
        return per_epoch if per_epoch else pytest.fail("asked for the length of an epoch")

    settle_schedule(cfg, num_workers, count)
    return {key: get_value(cfg, key) for key in WRITTEN}


# ---- the batch of another number of processes ------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
def test_twice_the_processes_train_half_as_long_at_twice_the_learning_rate(freeze):
    cfg = make_cfg(SOLVER__REFERENCE_WORLD_SIZE=8)
    if freeze:
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
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 16 and cfg.is_frozen() == freeze


def test_one_process_of_eight_trains_eight_times_as_long():
    cfg = make_cfg(SOLVER__REFERENCE_WORLD_SIZE=8)
    found = settle(cfg, num_workers=1)
    assert found["SOLVER.IMS_PER_BATCH"] == 2
    assert found["SOLVER.BASE_LR"] == pytest.approx(0.0125)
    assert found["SOLVER.MAX_ITER"] == 40_000 and found["SOLVER.STEPS"] == (24_000, 32_000)
    assert found["SOLVER.WARMUP_ITERS"] == 8008 and found["TEST.EVAL_PERIOD"] == 1600


@pytest.mark.parametrize("key", ["REFERENCE_WORLD_SIZE", "REFERENCE_IMS_PER_BATCH"])
@pytest.mark.parametrize("reference", [0, "same"])
def test_without_a_reference_or_at_the_reference_nothing_changes(key, reference, log):
    same = {"REFERENCE_WORLD_SIZE": 4, "REFERENCE_IMS_PER_BATCH": 16}[key]
    cfg = make_cfg(**{f"SOLVER__{key}": same if reference == "same" else 0})
    before = cfg.dump()
    settle(cfg, num_workers=4)
    assert cfg.dump() == before and log.text == ""


# ---- another batch ---------------------------------------------------------------------------


def test_a_quarter_of_the_batch_trains_four_times_as_long_at_a_quarter_of_the_learning_rate():
    cfg = make_cfg(SOLVER__REFERENCE_IMS_PER_BATCH=64)
    assert settle(cfg, num_workers=2) == {
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": pytest.approx(0.025),
        "SOLVER.BASE_LR_END": pytest.approx(0.0025),
        "SOLVER.MAX_ITER": 20_000,
        "SOLVER.WARMUP_ITERS": 4004,
        "SOLVER.STEPS": (12_000, 16_000),
        "SOLVER.CHECKPOINT_PERIOD": 4000,
        "SOLVER.MOMENTUM_SCHEDULE": [[0, 0.95], [2000, 0.85]],
        "TEST.EVAL_PERIOD": 800,
        "TEST.EVAL_START": 2400,
        "TEST.VAL_LOSS_PERIOD": 200,
    }
    assert cfg.SOLVER.REFERENCE_IMS_PER_BATCH == 16


def test_what_is_on_stays_on_and_what_is_off_stays_off():
    cfg = make_cfg(
        SOLVER__REFERENCE_IMS_PER_BATCH=1, SOLVER__CHECKPOINT_PERIOD=0, TEST__EVAL_START=0, SOLVER__STEPS=()
    )
    found = settle(cfg)
    assert found["TEST.EVAL_PERIOD"] == 12 and found["TEST.VAL_LOSS_PERIOD"] == 3
    assert found["SOLVER.CHECKPOINT_PERIOD"] == found["TEST.EVAL_START"] == 0 and found["SOLVER.STEPS"] == ()
    cfg = make_cfg(SOLVER__REFERENCE_IMS_PER_BATCH=1, TEST__EVAL_PERIOD=3, TEST__VAL_LOSS_PERIOD=1)
    found = settle(cfg)
    assert found["TEST.EVAL_PERIOD"] == found["TEST.VAL_LOSS_PERIOD"] == 1


# ---- epochs ----------------------------------------------------------------------------------


def test_epochs_become_iterations_and_other_counts_stay():
    cfg = make_cfg(SOLVER__MAX_EPOCHS=12)
    found = settle(cfg, per_epoch=70)
    assert found.pop("SOLVER.MAX_ITER") == 840
    assert found == {key: value for key, value in WRITTEN.items() if key != "SOLVER.MAX_ITER"}
    assert cfg.SOLVER.MAX_EPOCHS == 12


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


def test_the_length_of_an_epoch_is_asked_for_after_the_batch_is_settled():
    cfg, asked = make_cfg(SOLVER__MAX_EPOCHS=2, SOLVER__REFERENCE_WORLD_SIZE=8), []
    settle_schedule(cfg, 2, lambda cfg: asked.append(cfg.SOLVER.IMS_PER_BATCH) or 10)
    assert asked == [4]


# ---- again -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"SOLVER__REFERENCE_WORLD_SIZE": 8},
        {"SOLVER__REFERENCE_IMS_PER_BATCH": 4},
        {"SOLVER__MAX_EPOCHS": 12},
        {**BY_EPOCH, "SOLVER__REFERENCE_WORLD_SIZE": 8},
        {**BY_EPOCH, "SOLVER__REFERENCE_IMS_PER_BATCH": 4},
    ],
)
def test_settling_again_changes_nothing_also_from_the_dumped_config(more, log):
    cfg = make_cfg(**more)
    settle(cfg, num_workers=4, per_epoch=70)
    before = cfg.dump()
    log.clear()
    settle(cfg, num_workers=4, per_epoch=70)
    assert cfg.dump() == before and "the schedule for this run" not in log.text
    again = get_cfg()
    again.merge_from_other_cfg(type(cfg)._load_cfg_from_yaml_str(before))
    settle(again, num_workers=4, per_epoch=70)
    assert again.dump() == before


def test_a_run_that_goes_on_with_other_processes_is_scaled_from_where_it_is():
    cfg = make_cfg(SOLVER__REFERENCE_WORLD_SIZE=8)
    settle(cfg, num_workers=4)
    found = settle(cfg, num_workers=16)
    assert found["SOLVER.BASE_LR"] == pytest.approx(0.2)
    assert (found["SOLVER.IMS_PER_BATCH"], found["SOLVER.MAX_ITER"]) == (32, 2500)


# ---- what is said and refused ----------------------------------------------------------------


def test_what_has_changed_is_logged_before_and_after(log):
    settle(make_cfg(**BY_EPOCH, SOLVER__REFERENCE_IMS_PER_BATCH=4), per_epoch=70)
    lines = log.text.split("INFO")[-1].splitlines()
    assert "an epoch has 70 iterations of 16 images" in log.text
    assert "the schedule for this run:" in lines[0]
    assert lines[1:] == [
        "  SOLVER.BASE_LR: 0.1 -> 0.4",
        "  SOLVER.BASE_LR_END: 0.01 -> 0.04",
        "  SOLVER.MAX_ITER: 5000 -> 840",
        "  SOLVER.WARMUP_ITERS: 1001 -> 250",
        "  SOLVER.STEPS: (8, 11) -> (560, 770)",
        "  SOLVER.MOMENTUM_SCHEDULE: [[0, 0.95], [3, 0.85]] -> [[0, 0.95], [210, 0.85]]",
        "  SOLVER.CHECKPOINT_PERIOD: 1 -> 70",
        "  TEST.EVAL_PERIOD: 2 -> 140",
        "  TEST.EVAL_START: 4 -> 280",
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"SOLVER__BY_EPOCH": True},
            "SOLVER.BY_EPOCH counts in epochs, but SOLVER.MAX_EPOCHS is 0: set their number",
        ),
        (
            {"SOLVER__REFERENCE_WORLD_SIZE": 8, "SOLVER__REFERENCE_IMS_PER_BATCH": 8},
            "SOLVER.REFERENCE_WORLD_SIZE and SOLVER.REFERENCE_IMS_PER_BATCH would both scale the schedule: "
            "set one of them to 0",
        ),
        (
            {"SOLVER__REFERENCE_WORLD_SIZE": 6},
            "SOLVER.IMS_PER_BATCH is 16, which SOLVER.REFERENCE_WORLD_SIZE 6 does not divide",
        ),
        (
            {"SOLVER__REFERENCE_WORLD_SIZE": 8, "SOLVER__MOMENTUM_SCHEDULE": [5]},
            "SOLVER.MOMENTUM_SCHEDULE has 5, not [iteration, momentum]",
        ),
        (
            {**BY_EPOCH, "SOLVER__MOMENTUM_SCHEDULE": [["a", 0.9]]},
            "SOLVER.MOMENTUM_SCHEDULE has ['a', 0.9], not [iteration, momentum]",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(more, words):
    with pytest.raises(UserError) as error:
        settle(make_cfg(**more), per_epoch=70)
    assert str(error.value) == words


@pytest.mark.parametrize(
    "more",
    [
        {"SOLVER__REFERENCE_WORLD_SIZE": -8},
        {"SOLVER__REFERENCE_IMS_PER_BATCH": -8},
        {"SOLVER__MAX_EPOCHS": -1},
        {"SOLVER__REFERENCE_IMS_PER_BATCH": 8, "SOLVER__IMS_PER_BATCH": 0},
    ],
)
def test_numbers_that_cannot_be_are_left_to_the_check_of_all_values(more):
    cfg = make_cfg(**more)
    before = cfg.dump()
    settle(cfg)
    assert cfg.dump() == before


def test_negative_counts_are_left_to_be_refused():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_EPOCHS", 2, "SOLVER.BY_EPOCH", True, "TEST.EVAL_PERIOD", -1])
    settle_schedule(cfg, 1, lambda cfg: 5)
    assert cfg.TEST.EVAL_PERIOD == -1


@pytest.mark.parametrize("step", ["a", None, True, [1]])
def test_a_step_that_is_no_iteration_is_refused(step):
    cfg = get_cfg()
    cfg.SOLVER.STEPS = (5, step)
    with pytest.raises(UserError) as error:
        settle_schedule(cfg, 1, None)
    assert str(error.value) == f"SOLVER.STEPS holds {step!r}, but must hold iterations"
