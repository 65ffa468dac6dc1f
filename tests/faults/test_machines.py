"""Jobs on two and three machines, which are network namespaces here."""

import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch.distributed as dist
from machines import Machines, NotAllowedError, start, start_torchrun
from processes import Run
from run_files import differences, lines, newest_checkpoint

from plaintrain.engine.distributed_env import agree_on_prefix
from plaintrain.utils.errors import UserError

# Long enough to be ended in between.
OPTIONS = ["SOLVER.MAX_ITER", 60, "TEST.EVAL_PERIOD", 20, "SOLVER.CHECKPOINT_PERIOD", 10]
SHORT = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 0]
THREE = ["SOLVER.IMS_PER_BATCH", 6, *SHORT]


@pytest.fixture(scope="module")
def three_machines(tmp_path_factory):
    try:
        with Machines(3, tmp_path_factory.mktemp("machines")) as made:
            yield made
    except NotAllowedError as e:
        pytest.skip(f"needs network namespaces, which are not allowed here: {e}")


@pytest.fixture
def machines(three_machines):
    """Three machines, on which nothing is left afterwards."""
    yield three_machines
    for k in range(3):
        three_machines.kill(k)
        three_machines.set_network(k, "up")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run of two processes on one machine, that nothing has disturbed."""
    return Run(tmp_path_factory.mktemp("one") / "whole", OPTIONS, ranks=2).wait(code=0).folder


def wait(runs, code):
    """Wait until all end, which they do with this code."""
    codes = [run.wait(120).code for run in runs]
    assert codes == [code] * len(runs), "\n\n".join(run.output for run in runs)


def reach(run, iteration):
    """Wait until metrics.json has a line of an iteration."""
    assert run.wait_for(lambda: max(lines(run.folder), default=-1) >= iteration), run.tail


def test_three_machines_train_as_one_does_and_only_the_first_holds_the_run(machines, tmp_path):
    alone = Run(tmp_path / "alone", THREE, ranks=3).wait(code=0).folder
    folders = [tmp_path / f"machine-{k}" for k in range(3)]
    wait(start(machines, folders, THREE), 0)
    assert differences(alone, folders[0]) == []
    assert [sorted(os.listdir(f)) for f in folders[1:]] == [["log.txt.rank1"], ["log.txt.rank2"]]


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "own folders"])
def test_two_machines_stop_together_and_resume_and_evaluate_as_one_would(machines, whole, tmp_path, shared):
    folders = [tmp_path / "run", tmp_path / ("run" if shared else "other")]
    runs = start(machines, folders, OPTIONS)
    reach(runs[0], 24)
    os.kill(runs[1].process.pid, signal.SIGTERM)
    wait(runs, 143)
    iteration, damaged = newest_checkpoint(folders[0])
    assert 24 <= iteration < 60 and not damaged
    if not shared:
        # A run of that machine's own is not taken up.
        for name in ("model_final.pth", "last_checkpoint", "config.yaml"):
            shutil.copy(whole / name, folders[1])
    runs = start(machines, folders, OPTIONS, flags=["--resume"])
    wait(runs, 0)
    assert f"starting training from iteration {iteration + 1} of 60" in runs[0].output
    assert differences(whole, folders[0]) == []
    predictions = "inference/few_val/coco_instances_results.json"
    (folders[0] / predictions).unlink()
    wait(start(machines, folders, OPTIONS, flags=["--eval-only", "--resume"]), 0)
    assert (folders[0] / predictions).read_bytes() == (whole / predictions).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("is_other", [True, False])
def test_weights_of_machine_0_are_those_of_all(machines, whole, tmp_path, is_other):
    (machines.home(1) / "weights.pth").unlink(missing_ok=True)
    for k, name in enumerate(("model_0000009.pth", "model_final.pth")[: 1 + is_other]):
        shutil.copy(whole / name, machines.home(k) / "weights.pth")
    weights = ["MODEL.WEIGHTS", machines.home(0) / "weights.pth"]
    alone = Run(tmp_path / "alone", [*OPTIONS, *SHORT, *weights], ranks=2).wait(code=0).folder
    runs = start(machines, [tmp_path / "run"] * 2, [*OPTIONS, *SHORT, weights[0], "~/weights.pth"])
    wait(runs, 0)
    assert differences(alone, tmp_path / "run") == []


def kill_a_rank(machines, runs):
    children = runs[1].children()
    ranks = [pid for pid, parent in children.items() if parent == runs[1].process.pid]
    os.kill(max(ranks), signal.SIGKILL)


HANGS = r"no step was finished within 5 s \(HANG_TIMEOUT\)"
LOST = r"lost the connection to a rank that has reported no failure"
GONE = "rank 0 failed: its process or machine has died"
# {failure: (what happens, [words on machine 0, and on machine 1], the most seconds until all have ended)}.
FAILURES = {
    "a rank is killed": (
        kill_a_rank,
        ["rank 1 failed: it was killed by SIGKILL", "error: rank 1 was killed by SIGKILL"],
        15,
    ),
    "machine 1 is killed": (lambda machines, _: machines.kill(1), [LOST, ""], 15),
    "machine 0 is killed": (lambda machines, _: machines.kill(0), ["", GONE], 15),
    "machine 1 loses its network": (lambda machines, _: machines.set_network(1, "down"), [HANGS, HANGS], 40),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", FAILURES)
def test_failure_ends_all_machines_which_say_why_once(machines, tmp_path, name):
    act, words, seconds = FAILURES[name]
    options = [*OPTIONS, "SOLVER.MAX_ITER", 5000, "TEST.EVAL_PERIOD", 0, "HANG_TIMEOUT", 5]
    runs = start(machines, [tmp_path / "run", tmp_path / "other"], options)
    reach(runs[0], 12)
    act(machines, runs)
    machines.wait_for_the_end(seconds)
    assert all(run.wait(5).code != 0 for run in runs)
    for run, text in zip(runs, words, strict=True):
        assert not text or len(re.findall(text, run.output)) == 1, run.output
    iteration, damaged = newest_checkpoint(tmp_path / "run")
    assert iteration >= 9 and not damaged


@pytest.mark.long
def test_torchrun_forms_the_job_again_when_a_rank_is_killed(machines, whole, tmp_path):
    folder, port = tmp_path / "run", machines.free_port()
    runs = [start_torchrun(machines, k, port, folder, OPTIONS) for k in range(2)]
    reach(runs[0], 24)
    machines.kill(1, but=runs[1].process.pid)
    wait(runs, 0)
    assert differences(whole, folder) == []
    assert runs[0].output.count("resumed from") == 1


def test_ranks_that_are_started_again_agree_on_a_new_prefix():
    store, prefixes = dist.HashStore(), []

    def agree(rank):
        prefixes.append(agree_on_prefix(store, rank, 2, timeout=20))

    for first in (0, 1, 0):
        threads = [threading.Thread(target=agree, args=(rank,)) for rank in (first, 1 - first)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(20)
    assert len(prefixes) == 6 and len(set(prefixes)) == 3
    assert all(prefixes[i] == prefixes[i + 1] for i in (0, 2, 4))


def test_rank_that_does_not_come_is_named():
    with pytest.raises(UserError, match="rank 1 of 3 has not joined within 0.1 s"):
        agree_on_prefix(dist.HashStore(), 0, 3, timeout=0.1)
