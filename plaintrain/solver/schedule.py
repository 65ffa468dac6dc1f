"""When something is due: what follows an iteration, and the order of training and validation epochs."""

from typing import NamedTuple

from plaintrain.utils.errors import UserError
from plaintrain.utils.storage import every

__all__ = ["Due", "check_workflow", "every", "validates_after", "workflow_epochs"]

_MODES = ("train", "val")


class Due(NamedTuple):
    """What follows an iteration."""

    save: bool = False
    validate: bool = False
    test: bool = False
    log: bool = False
    stop: bool = False


def workflow_epochs(workflow, max_epochs, start_epoch=0):
    """The epochs of a run in order, as MMDetection's runner takes them from `workflow`.

    The flows are repeated until `max_epochs` training epochs are done; only those count. The last
    round leaves out training epochs beyond that, its validation epochs take place.

    Args:
        workflow: [[mode, number], ...], mode "train" or "val".
        max_epochs: training epochs of the whole run.
        start_epoch: training epochs that are done already. It begins right after the last of them,
            with the validation epochs that follow it.

    Yields:
        (mode, epoch): "train" with the number of the training epoch, from 0; "val" with that of the
        last one that is done, -1 before the first.

    Raises:
        UserError: a workflow that is not such a list, or that has no training epoch.
    """
    check_workflow(workflow)
    done = 0
    while done < max_epochs:
        for mode, number in workflow:
            for _ in range(number):
                if mode == "train":
                    if done >= max_epochs:
                        break
                    done += 1
                if done > start_epoch or (done == start_epoch and (mode == "val" or start_epoch == 0)):
                    yield mode, done - 1


def validates_after(cfg, epoch):
    """Return whether WORKFLOW validates after a training epoch (from 0), or with -1 before the first."""
    epochs = workflow_epochs(cfg.WORKFLOW, cfg.SOLVER.MAX_EPOCHS)
    return any(mode == "val" and last_epoch == epoch for mode, last_epoch in epochs)


def check_workflow(workflow):
    """Refuse a WORKFLOW that is not [[mode, number], ...] with at least one training epoch.

    Raises:
        UserError: names the entry.
    """
    for entry in workflow:
        well = isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] in _MODES
        if not well or type(entry[1]) is not int or entry[1] < 1:
            raise UserError(
                f'WORKFLOW has the entry {entry!r}, not ["train", n] or ["val", n] with a whole number n >= 1'
            )
    if not any(mode == "train" for mode, _ in workflow):
        raise UserError(f"WORKFLOW is {workflow}, which never trains: add a train flow")
