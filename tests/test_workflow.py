"""The order of training and validation epochs: plaintrain.workflow."""

import pytest

from plaintrain.utils.errors import UserError
from plaintrain.workflow import check_workflow, workflow_epochs

TRAIN_VAL = [["train", 2], ["val", 1]]
VAL_TRAIN = [["val", 1], ["train", 2]]


def order(workflow, epochs, **start):
    """The modes as one word, T and V."""
    return "".join(mode[0].upper() for mode, _ in workflow_epochs(workflow, epochs, **start))


@pytest.mark.parametrize(
    ("workflow", "epochs", "expected"),
    [
        (TRAIN_VAL, 5, "TTVTTVTV"),
        (TRAIN_VAL, 4, "TTVTTV"),
        (VAL_TRAIN, 3, "VTTVT"),
        (VAL_TRAIN, 4, "VTTVTT"),
        ([["train", 1]], 3, "TTT"),
        ([["train", 1], ["val", 2]], 2, "TVVTVV"),
        ([["train", 1], ["val", 1], ["train", 2]], 4, "TVTTTV"),
        ([["train", 3], ["val", 1]], 1, "TV"),
        ([["val", 2], ["train", 1], ["val", 1]], 2, "VVTVVVTV"),
        (TRAIN_VAL, 0, ""),
    ],
)
def test_flows_are_repeated_until_all_training_epochs_are_done(workflow, epochs, expected):
    assert order(workflow, epochs) == expected
    assert order([tuple(flow) for flow in workflow], epochs) == expected


def test_training_epochs_count_from_0_and_validation_has_the_number_of_the_last():
    assert list(workflow_epochs(TRAIN_VAL, 3)) == [
        ("train", 0),
        ("train", 1),
        ("val", 1),
        ("train", 2),
        ("val", 2),
    ]
    assert list(workflow_epochs(VAL_TRAIN, 1)) == [("val", -1), ("train", 0)]


@pytest.mark.parametrize(
    "workflow",
    [
        TRAIN_VAL,
        VAL_TRAIN,
        [["train", 1]],
        [["train", 1], ["val", 2]],
        [["val", 1], ["train", 1], ["val", 2], ["train", 2]],
    ],
)
@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_a_resumed_run_goes_on_right_after_the_training_epochs_that_are_done(workflow, epochs):
    whole = list(workflow_epochs(workflow, epochs))
    assert list(workflow_epochs(workflow, epochs, start_epoch=0)) == whole
    for start in range(1, epochs + 1):
        after = whole.index(("train", start - 1)) + 1
        assert list(workflow_epochs(workflow, epochs, start_epoch=start)) == whole[after:]


@pytest.mark.parametrize(
    "entry",
    [
        "train",
        ["train"],
        ["train", 1, 2],
        ["test", 1],
        [1, "train"],
        ["val", 0],
        ["train", -1],
        ["train", 1.0],
        ["train", True],
        ["train", "1"],
        {"train": 1},
        None,
    ],
)
def test_an_entry_that_is_no_flow_is_named(entry):
    for refuse in (check_workflow, lambda workflow: list(workflow_epochs(workflow, 3))):
        with pytest.raises(UserError) as error:
            refuse([["train", 1], entry])
        assert str(error.value).startswith(f"WORKFLOW has the entry {entry!r}, not [")


@pytest.mark.parametrize("workflow", [[], [["val", 1]], [["val", 1], ["val", 2]]])
def test_a_workflow_that_never_trains_is_refused(workflow):
    for refuse in (check_workflow, lambda workflow: list(workflow_epochs(workflow, 3))):
        with pytest.raises(UserError, match="which never trains: add a train flow"):
            refuse(workflow)
