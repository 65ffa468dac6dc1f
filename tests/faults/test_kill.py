"""Runs that are killed, or asked to stop, and resume to the same bits. kill_runs.py does it for long."""

import contextlib
import os
import pty
import random
import signal
import time
from functools import partial

import pytest
from failures import before_saves
from kill_runs import MIXES, SPARSE, WORKER, Trial
from processes import EPOCHS, STEP, Run
from run_files import differences, lines, newest_checkpoint, read_values

from plaintrain import evaluation
from plaintrain.checkpoint.training_checkpointer import TrainingCheckpointer
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.utils import comm

NAMES = list(MIXES)


# ---- kills ----------------------------------------------------------------------------------------


def kill_in_step(at):
    """Kill the run before the checkpoint of an iteration."""

    def kill(iteration):
        if iteration == at and comm.is_main_process():
            os.killpg(0, signal.SIGKILL)

    before_saves(kill)


def kill_in_evaluation(number):
    """Kill the run in one of its evaluations, counted from 0."""
    inference, calls = evaluation.inference_on_dataset, []

    def killing(*args):
        calls.append(args)
        return inference(*args) if len(calls) <= number else os.killpg(0, signal.SIGKILL)

    evaluation.inference_on_dataset = killing


def kill_before_final_model():
    TrainingCheckpointer.save_final = lambda *args, **kwargs: os.killpg(0, signal.SIGKILL)


# 5 steps an epoch; killed after the first checkpoint, and after the second, before anything else is written.
SPARSE = [*SPARSE, "SOLVER.IMS_PER_BATCH", 5]
IN_EVALUATIONS = [partial(kill_in_evaluation, 0), partial(kill_in_evaluation, 1)]
long = pytest.mark.long
# (mix, [faults of a run, and of that which resumes it, ...], the newest checkpoint after these).
KILLS = [
    pytest.param(MIXES[NAMES[1]], [partial(kill_in_step, 9)], [7], id="1 worker"),
    # What is written in the background may not be there yet.
    pytest.param(MIXES[NAMES[6]], [partial(kill_in_step, 10)], [3, 7], id="2 ranks, epochs"),
    pytest.param(
        ("epoch", 1, [*EPOCHS, *STEP]), [kill_before_final_model], [23], id="final model", marks=long
    ),
    pytest.param(
        ("plain", 1, [*SPARSE, "SOLVER.MAX_ITER", 20]), IN_EVALUATIONS, [9], id="evaluations", marks=long
    ),
    pytest.param(("epoch", 1, [*SPARSE, *EPOCHS]), IN_EVALUATIONS, [9], id="evaluations, epochs", marks=long),
]


@pytest.mark.parametrize(("mix", "kills", "newest"), KILLS)
def test_killed_run_resumes_to_the_same_bits(mix, kills, newest, tmp_path):
    script, ranks, options = mix
    Run(tmp_path / "whole", options, script=script, ranks=ranks).wait(code=0)
    for number, faults in enumerate(kills):
        flags = ["--resume"] if number else []
        run = Run(tmp_path / "run", options, script=script, ranks=ranks, faults=faults, flags=flags)
        run.wait(code=-signal.SIGKILL)
    saved, damaged = newest_checkpoint(tmp_path / "run")
    assert saved in newest and not damaged
    Run(tmp_path / "run", options, script=script, ranks=ranks, flags=["--resume"]).wait(code=0)
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    assert read_values(tmp_path / "whole") == read_values(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2, 6])
def test_run_that_is_killed_at_random_moments_resumes_to_the_same_bits(number, tmp_path):
    trial = Trial(tmp_path, number, MIXES[NAMES[number]], random.Random(number))
    trial.kill_until(2)
    assert trial.found == [] and trial.counts["kills"] >= 2
    assert trial.counts["lost"] == trial.counts["unreadable"] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nothing has disturbed."""
    return Run(tmp_path_factory.mktemp("whole") / "run", STEP).wait(code=0).folder


# ---- signals --------------------------------------------------------------------------------------


def without_a_reader():
    """Let the run print into a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)


def log_of(run):
    path = run.folder / "log.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("number", "script"),
    [(signal.SIGINT, "plain"), pytest.param(signal.SIGTERM, "epoch", marks=pytest.mark.long)],
)
def test_signal_ends_a_run_with_a_checkpoint_of_its_last_step(number, script, tmp_path):
    # Stopped between two visits of the writers: the ranks' batch norms are not averaged there.
    options = [*STEP, "SOLVER.CHECKPOINT_PERIOD", 0, "LOG_PERIOD", 5]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", script == "epoch"]
    options += (
        [*EPOCHS, "SOLVER.MAX_EPOCHS", 3, *WORKER[:4]] if script == "epoch" else ["SOLVER.MAX_ITER", 16]
    )
    Run(tmp_path / "whole", options, script=script, ranks=2).wait(code=0)
    # Ctrl-C is sent to the whole group, and ends the reader of a pipe too.
    faults = without_a_reader if number == signal.SIGINT else None
    run = Run(tmp_path / "run", options, script=script, ranks=2, faults=faults)
    run.wait_for(lambda: "iter: 4" in log_of(run))
    if number == signal.SIGINT:
        run.kill(number)
    else:
        # To the process that was started, and none to its children.
        os.kill(run.pid, number)
    assert run.wait(60).code == 128 + number, run.tail + log_of(run)
    assert (
        log_of(run).count(f"{number.name}: stopped with a checkpoint") == 1 and "Traceback" not in run.output
    )
    # Not one step is lost; where an evaluation was ended, its line is written by the run that goes on.
    assert newest_checkpoint(tmp_path / "run")[0] >= max(lines(tmp_path / "run")) >= 3
    Run(tmp_path / "run", options, script=script, ranks=2, flags=["--resume"]).wait(code=0)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


class Terminal:
    """A terminal for a run; closing it sends SIGHUP to the whole run."""

    def __init__(self):
        self._master, self._slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.faults = partial(use_terminal, os.ttyname(self._slave))

    def read(self):
        with contextlib.suppress(BlockingIOError):
            while os.read(self._master, 65536):
                pass

    def close(self):
        os.close(self._slave)
        os.close(self._master)


def use_terminal(path):
    fd = os.open(path, os.O_RDWR)
    for standard in range(3):
        os.dup2(fd, standard)


def test_closed_terminal_ends_a_run_with_a_checkpoint(whole, tmp_path):
    terminal = Terminal()
    run = Run(tmp_path / "run", STEP, faults=terminal.faults)
    run.wait_for(lambda: (terminal.read(), "iter: 4" in log_of(run))[1])
    terminal.close()
    assert run.wait(60).code == 128 + signal.SIGHUP, log_of(run)
    assert "SIGHUP: stopped with a checkpoint" in log_of(run) and newest_checkpoint(tmp_path / "run")[0] >= 3
    Run(tmp_path / "run", STEP, flags=["--resume"]).wait(code=0)
    assert differences(whole, tmp_path / "run") == []


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
