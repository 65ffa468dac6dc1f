"""Runs that are killed, or asked to stop, and go on as if nothing had been. kill_runs.py does it for long."""

import contextlib
import functools
import os
import pty
import random
import signal
import time

import pytest
import torch
from kill_runs import EPOCHS, MIXES, PROCESSES, STEP, Trial
from processes import Run
from run_files import differences, lines, newest_checkpoint, read_values

from plaintrain import evaluation

NAMES = list(MIXES)


# Workers and all that a step can hold; two ranks, epochs, files written in the background.
@pytest.mark.parametrize("number", [1, 6])
def test_a_run_that_is_killed_at_random_moments_is_the_run_that_was_not(number, tmp_path):
    trial = Trial(tmp_path, number, MIXES[NAMES[number]], random.Random(number))
    trial.kill_until(2)
    assert trial.found == [] and trial.counts["kills"] >= 2
    assert trial.counts["lost"] == trial.counts["unreadable"] == 0


def forget_random_state():
    """A defect: what the model draws does not go on where it was."""
    import plaintrain.checkpoint

    plaintrain.checkpoint.load_rng_states = lambda states: None


def skip_a_batch():
    """A defect: the stream goes on one batch too late."""
    from plaintrain.data.train_loader import TrainLoader

    load = TrainLoader.load_state_dict
    TrainLoader.load_state_dict = lambda self, state: load(
        self, {**state, "iteration": state["iteration"] + 1}
    )


def forget_the_average():
    """A defect: the averaged weights begin anew."""
    from plaintrain.ema import ModelEMA

    ModelEMA.load_state_dict = lambda self, state: None


def write_in_place():
    """A defect: a checkpoint is tagged before it is whole."""
    import plaintrain.utils.checkpoint_files as files

    write = files.write_checkpoint

    def early(path, data, last):
        files.tag_last(*path.rsplit("/", 1))
        with open(path, "wb") as f:
            f.write(b"half of it")
        print("HALF", flush=True)
        time.sleep(0.3)
        write(path, data, last)

    files.write_checkpoint = early
    import plaintrain.checkpoint

    plaintrain.checkpoint.write_checkpoint = early


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(folder, STEP)
    assert run.wait().code == 0, run.tail
    return folder


@pytest.mark.parametrize("defect", [None, forget_random_state, skip_a_batch, forget_the_average])
def test_what_would_be_lost_is_noticed(defect, whole, tmp_path):
    run = Run(tmp_path / "run", STEP)
    run.wait_for("iter: 12")
    run.kill()
    run = Run(tmp_path / "run", STEP, faults=defect, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert bool(differences(whole, tmp_path / "run")) == (defect is not None)


def test_a_checkpoint_that_is_not_whole_is_noticed_and_passed_over(whole, tmp_path):
    run = Run(tmp_path / "run", STEP, faults=write_in_place)
    run.wait_for(lambda: run.output.count("HALF") == 2)
    run.kill()
    assert newest_checkpoint(tmp_path / "run") == (3, 1)
    run = Run(tmp_path / "run", STEP, flags=["--resume"])
    assert run.wait().code == 0 and "cannot read the checkpoint" in run.output
    assert differences(whole, tmp_path / "run") == []


def killed_before_the_final_model():
    from plaintrain.utils.periodic import PeriodicCheckpointer

    PeriodicCheckpointer.finish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("script, options", [("plain", []), ("epoch", [*EPOCHS, *STEP])])
def test_a_run_that_is_killed_just_before_its_final_model_gets_it(script, options, tmp_path):
    options = [*options, "TEST.EVAL_PERIOD", 0]
    undisturbed = Run(tmp_path / "whole", options, script=script)
    assert undisturbed.wait().code == 0, undisturbed.tail
    run = Run(tmp_path / "run", options, script=script, faults=killed_before_the_final_model)
    assert run.wait().code == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "run")[0] == 23 and not (tmp_path / "run/model_final.pth").exists()
    run = Run(tmp_path / "run", options, script=script, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def kill_in_first_test():
    evaluation.inference_on_dataset = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def kill_in_second_test():
    inference, calls = evaluation.inference_on_dataset, []

    def killing(*args):
        calls.append(args)
        return inference(*args) if len(calls) == 1 else os.kill(os.getpid(), signal.SIGKILL)

    evaluation.inference_on_dataset = killing


@pytest.mark.parametrize("script", ["plain", "epoch"])
def test_an_evaluation_that_is_repeated_is_written_before_the_first_step(script, tmp_path):
    # 5 steps an epoch.
    options = [
        "SOLVER.IMS_PER_BATCH",
        5,
        "LOG_PERIOD",
        20,
        "SOLVER.CHECKPOINT_PERIOD",
        5,
        "TEST.EVAL_PERIOD",
        5,
    ]
    options += ["SOLVER.MAX_ITER", 20] if script == "plain" else ["SOLVER.MAX_EPOCHS", 4]
    undisturbed = Run(tmp_path / "whole", options, script=script)
    assert undisturbed.wait().code == 0, undisturbed.tail
    # Killed right after the first checkpoint, and again after the second, before anything else is written.
    for faults, flags in ((kill_in_first_test, []), (kill_in_second_test, ["--resume"])):
        run = Run(tmp_path / "run", options, script=script, faults=faults, flags=flags)
        assert run.wait().code == -signal.SIGKILL, run.tail
    assert sorted(lines(tmp_path / "run")) == [4] and newest_checkpoint(tmp_path / "run")[0] == 9
    run = Run(tmp_path / "run", options, script=script, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    assert read_values(tmp_path / "whole") == read_values(tmp_path / "run")


# ---- signals --------------------------------------------------------------------------------------


def kill_main_only(run, number):
    """Send a signal to the process that was started, and none to its children."""
    os.kill(run.process.pid, number)


def without_a_reader():
    """Let the run print into a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)


class Terminal:
    """A terminal for a run, on which it shows its progress; closing it sends SIGHUP to the whole run."""

    def __init__(self):
        self._master, self._slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.faults = functools.partial(_use_terminal, os.ttyname(self._slave))

    def read(self):
        with contextlib.suppress(BlockingIOError):
            while os.read(self._master, 65536):
                pass

    def close(self):
        os.close(self._slave)
        os.close(self._master)


def _use_terminal(path):
    fd = os.open(path, os.O_RDWR)
    for standard in range(3):
        os.dup2(fd, standard)


def log_of(run):
    path = run.folder / "log.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    "number, ranks, script, send",
    [
        (signal.SIGUSR1, 1, "plain", kill_main_only),
        (signal.SIGINT, 2, "plain", Run.kill),
        (signal.SIGTERM, 2, "epoch", kill_main_only),
        (signal.SIGHUP, 1, "epoch", Terminal.close),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(number, ranks, script, send, tmp_path):
    # Stopped between two visits of the writers: the ranks' batch norms are not averaged there.
    options = [*STEP, "SOLVER.CHECKPOINT_PERIOD", 0, *PROCESSES, 1, "LOG_PERIOD", 5]
    # Without clipping the norm of the gradients is computed for the log alone.
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", script == "epoch"]
    options += [*EPOCHS, "SOLVER.MAX_EPOCHS", 3] if script == "epoch" else ["SOLVER.MAX_ITER", 16]
    whole = Run(tmp_path / "whole", options, script=script, ranks=ranks)
    assert whole.wait().code == 0, whole.tail
    terminal = Terminal() if send is Terminal.close else None
    # Ctrl-C ends the reader of a pipe too.
    faults = terminal.faults if terminal else without_a_reader if send is Run.kill else None
    run = Run(tmp_path / "run", options, script=script, ranks=ranks, faults=faults)
    run.wait_for(lambda: (terminal and terminal.read(), "iter: 4" in log_of(run))[1])
    terminal.close() if terminal else send(run, number)
    code = run.wait(60).code
    assert code == 128 + number, run.tail + log_of(run)
    assert log_of(run).count(f"{number.name}: the run has stopped") == 1 and "Traceback" not in run.output
    saved, _ = newest_checkpoint(tmp_path / "run")
    # Not one step is lost; where an evaluation was ended, its line is written by the run that goes on.
    assert saved >= max(lines(tmp_path / "run")) >= 3
    run = Run(tmp_path / "run", options, script=script, ranks=ranks, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def nohup():
    without_a_reader()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_run_under_nohup_goes_on_without_terminal_and_reader(whole, tmp_path):
    run = Run(tmp_path / "run", [*STEP, *PROCESSES, 1], faults=nohup)
    run.wait_for(lambda: "iter: 4" in log_of(run))
    run.kill(signal.SIGHUP)
    assert run.wait().code == 0, log_of(run)
    assert differences(whole, tmp_path / "run") == []


def test_another_number_of_ranks_goes_on_and_the_log_says_what_that_changes(tmp_path):
    run = Run(tmp_path / "run", ["SOLVER.MAX_ITER", 6], ranks=2)
    assert run.wait().code == 0, run.tail
    run = Run(tmp_path / "run", ["SOLVER.MAX_ITER", 10], flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert "the random state of 2 processes, and here there are 1" in run.output
    assert sorted(lines(tmp_path / "run")) == list(range(10))


def slow_evaluation():
    from plaintrain.evaluation.coco import COCOEvaluator

    process = COCOEvaluator.process

    def slow(self, inputs, outputs):
        print("EVALUATING", flush=True)
        time.sleep(0.3)
        process(self, inputs, outputs)

    COCOEvaluator.process = slow


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_an_evaluation_which_the_resumed_run_does_first(whole, ranks, tmp_path):
    options = [*STEP, "SOLVER.CHECKPOINT_PERIOD", 5]
    undisturbed = Run(tmp_path / "whole", options, ranks=ranks)
    assert undisturbed.wait().code == 0
    run = Run(tmp_path / "run", options, faults=slow_evaluation, ranks=ranks)
    run.wait_for("EVALUATING")
    run.kill(signal.SIGTERM)
    code = run.wait(60).code
    assert code == 143 and run.output.count("EVALUATING") <= 2 * ranks, run.tail
    assert newest_checkpoint(tmp_path / "run")[0] == 7
    saved = torch.load(tmp_path / "run/model_0000007.pth", weights_only=True)
    assert saved["due"] == (False, True)
    run = Run(tmp_path / "run", options, ranks=ranks, flags=["--resume"])
    assert run.wait().code == 0, run.tail
    assert run.output.index("results on few_val") < run.output.index("iter: 8")
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_second_interrupt_ends_at_once_also_where_a_step_takes_for_ever(tmp_path):
    def interrupt_twice(run):
        run.kill(signal.SIGINT)
        time.sleep(1.0)
        run.kill(signal.SIGINT)

    for ranks in (1, 2):
        folder = tmp_path / f"run-{ranks}"
        run = Run(folder, ["TEST.EVAL_PERIOD", 2], faults=hang_in_evaluation, ranks=ranks)
        run.wait_for("HANGING")
        interrupt_twice(run)
        code = run.wait(20).code
        assert code == 130 and run.children() == {}, run.tail


def hang_in_evaluation():
    def inference(*args):
        print("HANGING", flush=True)
        while True:
            time.sleep(0.1)

    evaluation.inference_on_dataset = inference


def test_ranks_whose_launcher_is_killed_end_with_a_checkpoint(tmp_path):
    options = ["SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.MAX_ITER", 5000]
    run = Run(tmp_path / "run", options, ranks=2)
    run.wait_for("iter: 3")
    kill_main_only(run, signal.SIGKILL)
    run.process.join()
    end = time.monotonic() + 30
    while run.children() and time.monotonic() < end:
        time.sleep(0.1)
    assert run.children() == {}
    assert newest_checkpoint(tmp_path / "run")[0] >= 3


def test_the_second_of_two_runs_in_one_folder_is_refused(tmp_path):
    first = Run(tmp_path / "run", ["SOLVER.MAX_ITER", 5000])
    first.wait_for("iter: 3")
    for flags in ([], ["--resume"]):
        second = Run(tmp_path / "run", [], flags=flags)
        code = second.wait().code
        assert code == 1 and f"another run is at work in {tmp_path / 'run'}: process" in second.output
    # Evaluating beside a training is not a run of its own.
    evaluated = Run(tmp_path / "run", [], flags=["--eval-only", "--resume"])
    assert evaluated.wait().code == 0, evaluated.tail
    first.kill()
    resumed = Run(tmp_path / "run", ["SOLVER.MAX_ITER", 20], flags=["--resume"])
    assert resumed.wait().code == 0, resumed.tail
