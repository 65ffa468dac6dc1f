"""One rank of a job fails, and all of its processes end; the script failures.py measures how soon."""

import failures
import pytest
import torch
from processes import Run
from run_files import differences, newest_checkpoint

from plaintrain import modeling
from plaintrain.utils.checkpoint_files import read_checkpoint, resume_candidates

# The others differ little from one of these.
NAMES = [n for n in failures.FAILURES if n not in ("the disk is full", "a loader worker out of memory")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * ("frozen" in n)) for n in NAMES])
def test_every_process_ends_and_says_why_once(name, tmp_path):
    run, code, seconds, saved = failures.fail(name, tmp_path / "run")
    assert code == 1 and seconds < 60, run.tail
    assert run.children() == {}
    # The cause comes once, at the end, and the last checkpoint is good.
    for text in failures.FAILURES[name][2]:
        assert run.output.count(text) == run.tail.count(text) == 1, run.tail
    if saved >= 0:
        assert read_checkpoint(resume_candidates(str(tmp_path / "run"))[0])["iteration"] == saved


def test_an_exception_in_a_single_process_leaves_a_good_checkpoint(tmp_path):
    _, code, _, saved = failures.fail("the disk is full", tmp_path / "run", ranks=1)
    assert code == 1 and saved == 3


def test_without_a_limit_a_job_that_hangs_is_not_ended(tmp_path):
    run = Run(tmp_path / "run", ["HANG_TIMEOUT", 0], faults=failures.main_thread_hangs, ranks=2)
    run.wait_for("iter: 5")
    with pytest.raises(AssertionError, match="still running after 8 s"):
        run.wait(8)


def nan_now_and_then():
    """A model whose loss is NaN for the images of iteration 5, on rank 1, whenever they come up."""
    build_model = modeling.build_model

    def build(cfg):
        model = build_model(cfg)
        forward = model.forward

        def failing(samples):
            losses = forward(samples)
            if model.training and failures._is_there() and failures.get_event_storage().iter == failures.AT:
                losses = {name: value * float("nan") for name, value in losses.items()}
            return losses

        model.forward = failing
        return model

    modeling.build_model = build


def test_a_step_that_is_left_out_is_left_out_on_all_ranks_also_after_a_resume(tmp_path):
    options = ["SOLVER.ON_NONFINITE", "skip", "DEBUG.DUMP_BAD_BATCH", True, "SOLVER.MAX_ITER", 10]
    run = Run(tmp_path / "whole", options, faults=nan_now_and_then, ranks=2)
    code = run.wait().code
    assert code == 0, run.tail
    assert (
        "the step is left out: grad_norm, loss_box_reg, loss_cls, loss_rpn_cls, loss_rpn_loc, total_loss is"
        in run.output
    )
    final = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)
    assert final["skipped_steps"] == (1, 0)
    assert all(torch.isfinite(value).all() for value in final["model"].values())
    for rank in ("", ".rank1"):
        dumped = torch.load(tmp_path / f"whole/bad_batch_0000006{rank}.pth", weights_only=True)
        assert len(dumped["samples"]) == 2
    run = Run(tmp_path / "killed", [*options, "SOLVER.MAX_TIME", 0.001], faults=nan_now_and_then, ranks=2)
    assert run.wait().code == 0 and newest_checkpoint(tmp_path / "killed")[0] == 0
    for step in (4, 7):
        # Ends at the next save, and goes on from there.
        run = Run(tmp_path / "killed", options, faults=nan_now_and_then, ranks=2, flags=["--resume"])
        run.wait_for(f"iter: {step}")
        run.kill()
    run = Run(tmp_path / "killed", options, faults=nan_now_and_then, ranks=2, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
