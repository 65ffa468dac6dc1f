"""The order of training and validation epochs: plaintrain.solver.schedule."""

import pytest

from plaintrain.solver.schedule import check_workflow, workflow_epochs
from plaintrain.utils.errors import UserError

TRAIN_VAL = [["train", 2], ["val", 1]]


@pytest.mark.parametrize(
    ("workflow", "epochs", "expected"),
    [
        (TRAIN_VAL, 5, "T0 T1 V1 T2 T3 V3 T4 V4"),
        (TRAIN_VAL, 4, "T0 T1 V1 T2 T3 V3"),
        ([("val", 1), ("train", 2)], 3, "V-1 T0 T1 V1 T2"),
        ([["train", 1]], 3, "T0 T1 T2"),
        ([["train", 1], ["val", 1], ["train", 2]], 4, "T0 V0 T1 T2 T3 V3"),
        ([["val", 2], ["train", 1], ["val", 1]], 2, "V-1 V-1 T0 V0 V0 V0 T1 V1"),
        (TRAIN_VAL, 0, ""),
    ],
)
def test_epochs_repeat_the_workflow_and_resume_after_a_training_epoch(workflow, epochs, expected):
    whole = list(workflow_epochs(workflow, epochs))
    assert " ".join(f"{mode[0].upper()}{epoch}" for mode, epoch in whole) == expected
    for start in range(1, epochs + 1):
        after = whole.index(("train", start - 1)) + 1
        assert list(workflow_epochs(workflow, epochs, start_epoch=start)) == whole[after:]


@pytest.mark.parametrize(
    "entry",
    ["train", ["train"], ["train", 1, 2], ["test", 1], ["val", 0], ["train", 1.0], ["train", True], None],
)
def test_workflow_errors_name_the_entry(entry):
    for check in (check_workflow, lambda workflow: list(workflow_epochs(workflow, 3))):
        with pytest.raises(UserError) as error:
            check([["train", 1], entry])
        assert str(error.value).startswith(f"WORKFLOW has the entry {entry!r}, not [")
    for workflow in ([], [["val", 1]]):
        with pytest.raises(UserError, match="which never trains: add a train flow"):
            check_workflow(workflow)
