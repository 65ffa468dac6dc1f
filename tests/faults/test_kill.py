"""Runs that are killed, or asked to stop, and resume to the same bits. kill_runs.py does it for long."""

import contextlib
import os
import pty
import signal
import time
from functools import partial

import pytest
from file_events import kill_at
from kill_runs import MIXES, Trial, pipe_output
from processes import STEP, Run
from run_files import differences, lines, newest_checkpoint, read_values

from plaintrain.evaluation.coco import COCOEvaluator

NAMES = list(MIXES)


# ---- kills ----------------------------------------------------------------------------------------


# Before the fourth checkpoint, and after the third.
FOURTH = ("open model_N.pth.tmp-N", 4, "before")
THIRD = ("replace last_checkpoint", 3, "after")


@pytest.mark.parametrize(("number", "event"), [(1, FOURTH), (6, FOURTH), (8, THIRD)])
def test_killed_run_resumes_to_the_same_bits(number, event, tmp_path):
    script, ranks, options = MIXES[NAMES[number]]
    start = partial(Run, options=options, script=script, ranks=ranks)
    start(tmp_path / "whole").wait(code=0)
    start(tmp_path / "run", faults=partial(kill_at, tmp_path / "run", *event)).wait(code=-signal.SIGKILL)
    assert newest_checkpoint(tmp_path / "run")[0] in (7, 9)
    start(tmp_path / "run", flags=["--resume"]).wait(code=0)
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    assert read_values(tmp_path / "whole") == read_values(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2, 6, 9, 10])
def test_run_that_is_killed_at_random_moments_resumes_to_the_same_bits(number, tmp_path):
    trial = Trial(tmp_path, NAMES[number], seed=number)
    trial.kill_until(4)
    assert trial.found == [] and trial.counts["kills"] >= 4


# ---- signals --------------------------------------------------------------------------------------


def log_of(run):
    path = run.folder / "log.txt"
    return path.read_text() if path.exists() else ""


def test_ctrl_c_ends_a_run_with_a_checkpoint_of_its_last_step(tmp_path):
    # Stopped between two visits of the writers: the ranks' batch norms are not averaged there.
    options = [*STEP, "SOLVER.CHECKPOINT_PERIOD", 0, "LOG_PERIOD", 5, "SOLVER.MAX_ITER", 16]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", False]
    Run(tmp_path / "whole", options, ranks=2).wait(code=0)
    # Ctrl-C is sent to the whole group, and ends the reader of a pipe too.
    run = Run(tmp_path / "run", options, faults=pipe_output, ranks=2)
    run.wait_for(lambda: "iter: 4" in log_of(run))
    run.kill(signal.SIGINT)
    assert run.wait(60).code == 128 + signal.SIGINT, run.tail + log_of(run)
    assert log_of(run).count("SIGINT: stopped with a checkpoint") == 1
    assert "Traceback" not in run.output
    # Not one step is lost; where an evaluation was ended, its line is written by the run that goes on.
    assert newest_checkpoint(tmp_path / "run")[0] >= max(lines(tmp_path / "run")) >= 3
    Run(tmp_path / "run", options, ranks=2, flags=["--resume"]).wait(code=0)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def use_terminal(path):
    fd = os.open(path, os.O_RDWR)
    for standard in range(3):
        os.dup2(fd, standard)


def test_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path):
    Run(tmp_path / "whole", STEP).wait(code=0)
    master, slave = pty.openpty()
    os.set_blocking(master, False)

    def is_reached():
        # A terminal that nobody reads would block the run.
        with contextlib.suppress(BlockingIOError):
            while os.read(master, 65536):
                pass
        return "iter: 4" in log_of(run)

    run = Run(tmp_path / "run", STEP, faults=partial(use_terminal, os.ttyname(slave)))
    run.wait_for(is_reached)
    # This sends SIGHUP to the whole run.
    os.close(slave)
    os.close(master)
    assert run.wait(60).code == 128 + signal.SIGHUP, log_of(run)
    assert "SIGHUP: stopped with a checkpoint" in log_of(run) and newest_checkpoint(tmp_path / "run")[0] >= 3
    Run(tmp_path / "run", STEP, flags=["--resume"]).wait(code=0)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def slow_evaluation():
    process = COCOEvaluator.process

    def slow(self, inputs, outputs):
        print("EVALUATING", flush=True)
        time.sleep(0.3)
        process(self, inputs, outputs)

    COCOEvaluator.process = slow


@pytest.mark.long
def test_signal_ends_an_evaluation_which_the_resumed_run_does_first(tmp_path):
    options = [*STEP, "SOLVER.CHECKPOINT_PERIOD", 5]
    Run(tmp_path / "whole", options, ranks=2).wait(code=0)
    run = Run(tmp_path / "run", options, faults=slow_evaluation, ranks=2)
    run.wait_for("EVALUATING")
    run.kill(signal.SIGTERM)
    assert run.wait(60).code == 143 and run.output.count("EVALUATING") <= 4, run.tail
    assert newest_checkpoint(tmp_path / "run")[0] == 7
    run = Run(tmp_path / "run", options, ranks=2, flags=["--resume"]).wait(code=0)
    assert run.output.index("results on few_val") < run.output.index("iter: 8")
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.long
def test_ranks_whose_launcher_is_killed_end_with_a_checkpoint(tmp_path):
    options = ["SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.MAX_ITER", 5000]
    run = Run(tmp_path / "run", options, ranks=2)
    run.wait_for("iter: 3")
    os.kill(run.pid, signal.SIGKILL)
    run.process.join()
    end = time.monotonic() + 30
    while run.children() and time.monotonic() < end:
        time.sleep(0.1)
    assert run.children() == {}
    assert newest_checkpoint(tmp_path / "run")[0] >= 3
