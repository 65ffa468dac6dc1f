"""One rank of a job fails, and all of its processes end; the script failures.py measures how soon."""

import failures
import pytest
from processes import Run
from run_files import differences, load, newest_checkpoint

from plaintrain.checkpoint.files import list_resume_candidates, read_checkpoint

# The others differ little from one of these.
NAMES = [n for n in failures.FAILURES if n not in ("the disk is full", "a loader worker out of memory")]
FAST = "an exception on one rank"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n != FAST)) for n in NAMES])
def test_failure_of_one_rank_ends_every_process_and_is_said_once(name, tmp_path):
    run, code, seconds, saved = failures.fail(name, tmp_path / "run")
    assert code == 1 and seconds < 60, run.tail
    assert run.children() == {}
    # The cause comes once, at the end, and the last checkpoint is good.
    for text in failures.FAILURES[name][2]:
        assert run.output.count(text) == run.tail.count(text) == 1, run.tail
    if saved >= 0:
        assert read_checkpoint(list_resume_candidates(str(tmp_path / "run"))[0])["iteration"] == saved


@pytest.mark.long
def test_failure_of_a_single_process_leaves_a_good_checkpoint(tmp_path):
    _, code, _, saved = failures.fail("the disk is full", tmp_path / "run", ranks=1)
    assert code == 1 and saved == 3


def nan_in_one_iteration():
    def change(losses):
        if failures.get_event_storage().iter == failures.AT:
            losses.update({name: value * float("nan") for name, value in losses.items()})

    failures.change_losses(change)


@pytest.mark.long
def test_step_that_is_skipped_is_skipped_on_all_ranks_also_after_a_resume(tmp_path):
    def start(folder, *options, flags=()):
        skip = ["SOLVER.ON_NONFINITE", "skip", "DEBUG.DUMP_BAD_BATCH", True, "SOLVER.MAX_ITER", 10]
        return Run(tmp_path / folder, [*skip, *options], faults=nan_in_one_iteration, ranks=2, flags=flags)

    run = start("whole")
    assert run.wait().code == 0 and "skipping the step: grad_norm, loss_box_reg" in run.output, run.tail
    final = load(tmp_path / "whole/model_final.pth")
    assert final["nonfinite"] == {"num_skipped": 1, "num_in_row": 0}
    assert all(value.isfinite().all() for value in final["model"].values())
    for rank in ("", ".rank1"):
        assert len(load(tmp_path / f"whole/bad_batch_0000006{rank}.pth")["samples"]) == 2
    assert start("killed", "SOLVER.MAX_TIME", 0.001).wait().code == 0
    assert newest_checkpoint(tmp_path / "killed")[0] == 0
    run = start("killed", flags=["--resume"])
    run.wait_for("iter: 7")
    run.kill()
    assert start("killed", flags=["--resume"]).wait().code == 0
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
