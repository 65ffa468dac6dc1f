"""Starting and joining jobs, and ranks that fail: plaintrain.engine.launch, distributed_env."""

import os
import signal
import socket
from argparse import Namespace
from functools import partial

import pytest
import rank_functions
import torch
from processes import Job
from rank_functions import fail, free_port

from plaintrain.engine.distributed_env import find_job
from plaintrain.engine.launch import launch
from plaintrain.utils.errors import UserError

RANK_0_FAILS = partial(fail, ranks=(0,), error=RuntimeError("rank 0 broke"))
RANK_1_FAILS = partial(fail, ranks=(1,), error=RuntimeError("rank 1 broke"), waits=True)
KILLED_BY = "error: rank 1 was killed by SIGKILL; the machine may be out of memory"
# A waiting rank would wait for 100 s or, in a collective, for 30 minutes.
SOON = 20


def run_job(main_func, folder, **kwargs):
    """A job of two ranks on this machine, at its end."""
    return Job(main_func, folder / "job", num_gpus_per_machine=2, **kwargs).wait(SOON)


def run_jobs(main_func, folder, options):
    """One job of several processes that are started apart, at its end; `options` are those of each."""
    jobs = [Job(main_func, folder / str(i), **own) for i, own in enumerate(options)]
    return [job.wait(SOON) for job in jobs]


def two_machines(late=0.0):
    """One process each, both on this machine; the second may be late."""
    job = {"num_machines": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}"}
    return [{**job, "machine_rank": machine, "slow": machine * late} for machine in range(2)]


def torchrun_env(rank, number, **more):
    """What torchrun gives to one of its processes on one machine."""
    env = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": number}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    return {key: str(value) for key, value in env.items()} | more


def slurm_env(rank, local, tasks=2, per_node="2", node=0, nodes="node[3-4]", **more):
    """What srun gives to one of its tasks."""
    env = {"JOB_ID": 4242, "STEP_ID": 0, "PROCID": rank, "LOCALID": local, "NODEID": node, "NTASKS": tasks}
    for step in ("", "STEP_"):
        env |= {f"{step}TASKS_PER_NODE": per_node, f"{step}NODELIST": nodes}
    env["STEP_NUM_TASKS"] = tasks
    return {f"SLURM_{key}": str(value) for key, value in env.items()} | more


@pytest.fixture
def set_env(monkeypatch):
    """Function that sets environment variables, of which a scheduler around the tests has set none."""
    for key in list(os.environ):
        if key.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_")):
            monkeypatch.delenv(key)

    def set_all(env):
        for key, value in env.items():
            monkeypatch.setenv(key, value)

    return set_all


def test_one_process_runs_here_and_returns_the_value(set_env):
    seen = []
    assert launch(lambda *args: seen.append(args) or os.getpid(), args=(1, "two")) == os.getpid()
    assert seen == [(1, "two")]
    # Nor is a single process of torchrun a job to join.
    set_env(torchrun_env(0, 1))
    assert launch(torch.distributed.is_initialized) is False


def test_find_job_reads_the_address_and_lets_a_batch_script_start_the_processes(set_env):
    assert find_job(1, 2, 1, "tcp://gpu-node.cluster:1")["address"] == ("gpu-node.cluster", 1)
    assert find_job(1, 2, 1, "tcp://[fe80::1]:29500")["address"] == ("fe80::1", 29500)
    # sbatch sets SLURM_NTASKS and SLURM_PROCID for its script too; only srun starts that many.
    set_env({key: value for key, value in slurm_env(0, 0).items() if "STEP" not in key})
    assert find_job(1, 1, 0, "auto")["world_size"] == 1
    job = find_job(2, 1, 0, "auto")
    assert job["world_size"] == 2 and "rank" not in job


class Unprintable(RuntimeError):  # noqa: N818
    def __str__(self):
        raise KeyError


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed."
LOADING = f"a data loading worker has failed ({KILLED})"
HINT = "if the machine is out of memory, lower DATALOADER.NUM_WORKERS"
INTERRUPTED = "interrupted; continue"


@pytest.mark.parametrize(
    ("error", "debug", "code", "text"),
    [
        (UserError("the key X is wrong"), False, 1, "error: the key X is wrong\n"),
        (FloatingPointError("loss became NaN"), False, 1, "error: loss became NaN\n"),
        (UserError("the key X is wrong"), True, 1, None),
        (RuntimeError("a bug"), False, 1, None),
        (RuntimeError(KILLED), False, 1, f"error: {LOADING}; {HINT}\n"),
        (Unprintable(), False, 1, None),
        (KeyboardInterrupt(), False, 130, f"{INTERRUPTED} from the last checkpoint with --resume\n"),
    ],
)
def test_mistakes_are_one_sentence_and_bugs_a_traceback(capfd, set_env, error, debug, code, text):
    def main(config, args):
        raise error

    with pytest.raises(SystemExit) as stop:
        launch(main, args=("config", Namespace(debug=debug)))
    err = capfd.readouterr().err
    assert stop.value.code == code
    if text is None:
        assert "Traceback" in err and "in main" in err and type(error).__name__ in err
    else:
        assert err == text


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        ((9,), {}, "--num-gpus is 9, but this machine has 4 GPU"),
        ((0, 1, 0), {}, "--num-gpus must be at least 1, got 0"),
        ((1, 0, 0), {}, "--num-machines must be at least 1, got 0"),
        ((1, 2, 2), {}, "--machine-rank must be from 0 to 1, got 2"),
        ((1, 2, -1), {}, "--machine-rank must be from 0 to 1, got -1"),
        ((1, 2, 0), {}, "--dist-url must be tcp://HOST:PORT of machine 0 for several machines, got auto"),
        ((2, 1, 0, "tcp://host"), {}, "--dist-url must be tcp://HOST:PORT, got 'tcp://host'"),
        ((2, 1, 0, "host:29500"), {}, "got 'host:29500'"),
        ((2, 1, 0, "tcp://:29500"), {}, "got 'tcp://:29500'"),
        ((2, 1, 0, "tcp://h:70000"), {}, "got 'tcp://h:70000'"),
        ((2,), torchrun_env(0, 4), "must be 4 or omitted, got 2; torchrun has started 4 processes"),
        ((1,), torchrun_env(6, 8), "torchrun has started 8 processes on this machine, but this"),
        (
            (1,),
            {"WORLD_SIZE": "2"},
            "LOCAL_RANK must be from 0 to 1, got ''; torchrun sets",
        ),
        ((1,), {"RANK": "0"}, "WORLD_SIZE must be from 1 to 65536, got ''"),
        ((1,), {"RANK": "", "WORLD_SIZE": ""}, "WORLD_SIZE must be from 1 to 65536, got ''"),
        ((1,), {"RANK": "1", "WORLD_SIZE": "1"}, "RANK must be from 0 to 0, got '1'"),
        ((1,), torchrun_env(0, 2, RANK="x"), "RANK must be from 0 to 1, got 'x'"),
        ((1,), torchrun_env(0, 2, MASTER_PORT="0"), "MASTER_PORT must be from 1 to 65535, got '0'"),
        ((1,), torchrun_env(0, 2, MASTER_ADDR=""), "MASTER_ADDR must be the host of rank 0"),
        ((1,), slurm_env(0, 0, SLURM_STEP_ID="4294967290"), "interactive shell of a Slurm job with 2 tasks"),
        ((1,), slurm_env(0, 0, SLURM_PTY_PORT="1"), "start them with srun, or give --num-gpus"),
        ((1,), slurm_env(0, 0, node=1), "SLURM_NODEID must be from 0 to 0, got '1'; torchrun sets"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_sentence(capfd, monkeypatch, set_env, args, env, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    set_env(env)
    with pytest.raises(SystemExit) as stop:
        launch(pytest.fail, *args)
    text = capfd.readouterr().err
    assert stop.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1 and words in text


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-05,9],other", "node03"),
        ("gpu-a[12]", "gpu-a12"),
        ("tux1,tux2", "tux1"),
        ("gpu-7.cluster.org,gpu-8.cluster.org", "gpu-7.cluster.org"),
        ("", "127.0.0.1"),
    ],
)
def test_slurm_tasks_find_each_other_at_the_first_node(set_env, nodes, first):
    jobs = []
    for rank, number in ((0, "4242"), (5, "4242"), (0, "4243")):
        set_env(slurm_env(rank, rank % 4, 8, "4(x2)", rank // 4, nodes, SLURM_JOB_ID=number))
        jobs.append(find_job(1, 1, 0, "auto"))
    assert jobs[0]["address"] == jobs[1]["address"] != jobs[2]["address"]
    host, port = jobs[1].pop("address")
    assert host == first and 1024 < port < 65536
    assert jobs[1] == {"rank": 5, "world_size": 8, "local_rank": 1, "local_size": 4, "machine": 1}


RANK_0 = {"rank": 0, "world_size": 2, "local_rank": 0, "local_size": 2, "main": True, "sum": 1.0}
RANK_1 = {**RANK_0, "rank": 1, "local_rank": 1, "main": False}


def test_sys_exit_0_on_all_ranks_is_a_success(tmp_path):
    assert run_job(partial(fail, ranks=(0, 1), error=SystemExit(0)), tmp_path).code == 0


def test_two_jobs_at_once_do_not_meet(tmp_path):
    for job in run_jobs(rank_functions.report, tmp_path, [{"num_gpus_per_machine": 2}] * 2):
        assert job.code == 0, job.output
        assert job.results() == [RANK_0, RANK_1]


def torchruns():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"env": torchrun_env(rank, 2, **address)} for rank in range(2)]


def slurms():
    """Two tasks, each on a node of its own."""
    url = f"tcp://127.0.0.1:{free_port()}"
    return [{"env": slurm_env(rank, 0, per_node="1(x2)", node=rank), "dist_url": url} for rank in range(2)]


@pytest.mark.parametrize("start", [two_machines, torchruns, slurms])
def test_processes_that_are_started_apart_form_one_job(tmp_path, start):
    jobs = run_jobs(rank_functions.report, tmp_path, start())
    assert [job.code for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    alone = {} if start is torchruns else {"local_rank": 0, "local_size": 1}
    assert [job.results() for job in jobs] == [[{**RANK_0, **alone}], [{**RANK_1, **alone}]]


@pytest.mark.parametrize(
    ("main", "words", "tracebacks"),
    [
        (RANK_0_FAILS, "RuntimeError: rank 0 broke", 1),
        (RANK_1_FAILS, "RuntimeError: rank 1 broke", 1),
        (partial(fail, ranks=(0, 1), error=UserError("both find this")), "error: both find this", 0),
        (partial(fail, ranks=(1,), error=UserError("only rank 1 does")), "error: only rank 1 does", 0),
        (
            partial(fail, ranks=(1,), error=SystemExit(3), waits=True),
            "rank 1: error: it called sys.exit(3)",
            0,
        ),
        (
            partial(fail, ranks=(0,), error=SystemExit(0), waits=True),
            "rank 0: error: it called sys.exit(0)",
            0,
        ),
        (rank_functions.rank_0_exits, "error: rank 0 has exited with code 0 and without a message", 0),
        pytest.param(rank_functions.rank_1_is_killed, KILLED_BY, None, marks=pytest.mark.long),
    ],
)
def test_failing_rank_ends_the_job_which_says_why_once(tmp_path, main, words, tracebacks):
    job = run_job(main, tmp_path)
    assert job.code == (3 if "(3)" in words else 1)
    assert (
        words in job.output.splitlines()[-1]
        and job.output.count(words) == 1
        and tracebacks in (None, job.output.count("Traceback"))
    ), job.output


@pytest.mark.long
@pytest.mark.parametrize(
    ("main", "rank", "own", "others", "late"),
    [
        (RANK_0_FAILS, 0, "RuntimeError: rank 0 broke", "rank 0 failed", 0),
        # Rank 0 holds the store, and is gone before the other machine has begun to watch.
        (RANK_0_FAILS, 0, "RuntimeError: rank 0 broke", "", 1),
        (RANK_1_FAILS, 1, "RuntimeError: rank 1 broke", "rank 1 failed", 0),
        (rank_functions.rank_1_is_killed, 1, KILLED_BY, "rank 1 failed: it was killed by", 0),
    ],
)
def test_failing_rank_ends_the_job_on_the_other_machine_too(tmp_path, main, rank, own, others, late):
    jobs = run_jobs(main, tmp_path, two_machines(late))
    assert [job.code for job in jobs] == [1, 1]
    assert own in jobs[rank].output and others in jobs[1 - rank].output


@pytest.mark.long
def test_port_that_is_taken_is_named_in_one_sentence(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
        job = run_job(rank_functions.report, tmp_path, dist_url=url)
    errors = [line for line in job.output.splitlines() if "error: " in line]
    assert job.code == 1 and len(errors) == 1 and url in errors[0] and "Traceback" not in job.output


@pytest.mark.parametrize(("number", "code", "messages"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0)])
def test_signal_ends_all_ranks_with_its_code(tmp_path, number, code, messages):
    job = Job(rank_functions.wait_for_the_end, tmp_path / "job", num_gpus_per_machine=2)
    assert job.wait_for(lambda: len(list(job.folder.glob("ready-*"))) == 2)
    job.kill(number)
    assert job.wait(SOON).code == code
    assert job.output.count(INTERRUPTED) == messages and "Traceback" not in job.output
