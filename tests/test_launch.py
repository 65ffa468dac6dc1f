"""Starting and joining jobs, and what happens when a rank fails."""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from processes import Job
from rank_functions import free_port

from plaintrain.job import _first_host, _joined_job, _parse_url
from plaintrain.launch import launch
from plaintrain.utils.errors import UserError

# A waiting rank would wait for 100 s or, in a collective, for 30 minutes.
SOON = 20


def start_machines(main_func, folder, **kwargs):
    """A job of two machines with one process each, both on this one."""
    url = f"tcp://127.0.0.1:{free_port()}"
    return [
        Job(main_func, folder / f"machine-{m}", num_machines=2, machine_rank=m, dist_url=url, **kwargs)
        for m in range(2)
    ]


def wait_all(jobs, timeout=SOON):
    """Wait for all jobs, so that none is left behind, then say which did not end."""
    late = []
    for job in jobs:
        try:
            job.wait(timeout)
        except AssertionError as e:
            late.append(str(e))
    assert not late, "\n".join(late)
    return jobs


def do_nothing(args):
    pass


def first_traceback(output):
    return output.split("Traceback (most recent call last)")[1]


@pytest.fixture
def no_scheduler(monkeypatch):
    for key in list(os.environ):
        if key.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_")):
            monkeypatch.delenv(key)


@pytest.fixture
def four_gpus(monkeypatch, no_scheduler):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.fixture
def refused(capfd, no_scheduler):
    """Function that calls `launch` and returns the sentence it exits with."""

    def call(*args, main=do_nothing, **kwargs):
        with pytest.raises(SystemExit) as stop:
            launch(main, *args, args=(Namespace(debug=False),), **kwargs)
        assert stop.value.code == 1
        text = capfd.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    return call


# ---- one process -----------------------------------------------------------------------------


def test_one_process_runs_here_and_returns_the_value(no_scheduler):
    seen = []
    assert launch(lambda *args: seen.append(args) or os.getpid(), args=(1, "two")) == os.getpid()
    assert seen == [(1, "two")]
    assert launch(lambda: 5) == 5


@pytest.mark.parametrize("error", [UserError("the key X is wrong"), FloatingPointError("loss became NaN")])
def test_mistakes_of_the_user_are_one_sentence_and_exit_1(refused, error):
    def main(args):
        raise error

    assert refused(main=main) == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "debug"), [(UserError("the key X is wrong"), True), (RuntimeError("a bug"), False)]
)
def test_bugs_and_debug_show_the_traceback_and_exit_1(capfd, no_scheduler, error, debug):
    def main(config, args):
        raise error

    with pytest.raises(SystemExit) as stop:
        launch(main, args=("config", Namespace(debug=debug)))
    text = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" in text and "in main" in text and str(error) in text


def test_interrupt_says_how_to_go_on_and_exits_130(capfd, no_scheduler):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        launch(main)
    text = capfd.readouterr().err
    assert stop.value.code == 130 and "--resume" in text and "Traceback" not in text


def test_torchrun_with_a_single_process_is_no_job_to_join(monkeypatch, no_scheduler):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert launch(lambda: torch.distributed.is_initialized()) is False


# ---- command line that does not fit ----------------------------------------------------------


def test_more_processes_than_gpus_names_both(refused, four_gpus):
    text = refused(9)
    assert "--num-gpus" in text and "9" in text and "4 GPU" in text


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 2, 2), (1, 2, -1)])
def test_numbers_that_do_not_fit_are_named(refused, numbers):
    text = refused(*numbers)
    assert f"--num-gpus {numbers[0]} --num-machines {numbers[1]} --machine-rank {numbers[2]}" in text


def test_several_machines_need_an_address(refused):
    text = refused(1, 2, 0)
    assert "--dist-url" in text and "tcp://HOST:PORT" in text


@pytest.mark.parametrize(
    "url",
    ["nonsense", "tcp://host", "tcp://:29500", "host:29500", "file:///x", "tcp://h:29x", "tcp://h:70000", ""],
)
def test_bad_dist_url_says_what_it_must_look_like(refused, url):
    text = refused(2, dist_url=url)
    assert "--dist-url" in text and "tcp://HOST:PORT" in text and repr(url) in text


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("tcp://10.0.0.1:29500", ("10.0.0.1", 29500)),
        ("tcp://gpu-node.cluster:1", ("gpu-node.cluster", 1)),
        ("tcp://[fe80::1]:29500", ("fe80::1", 29500)),
    ],
)
def test_dist_url_is_host_and_port(url, address):
    assert _parse_url(url) == address


def test_num_gpus_that_contradicts_torchrun_names_both(refused, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    text = refused(2)
    assert "--num-gpus is 2" in text and "torchrun" in text and "4 processes" in text


def test_torchrun_with_more_processes_than_gpus_is_refused(refused, four_gpus, monkeypatch):
    for key, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "6", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(key, value)
    text = refused()
    assert "torchrun" in text and "6" in text and "4 GPU" in text


# ---- Slurm's variables -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-05,9],other", "node03"),
        ("node[1,3]", "node1"),
        ("node[007-010]", "node007"),
        ("gpu-a[12]", "gpu-a12"),
        ("tux1,tux2", "tux1"),
        ("gpu7", "gpu7"),
        ("gpu-7.cluster.org,gpu-8.cluster.org", "gpu-7.cluster.org"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert _first_host(nodes) == first


def slurm_env(rank, tasks=2, local=None, per_node="2", node="0"):
    """What srun gives to one of its tasks."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank if local is None else local),
        "SLURM_NODEID": node,
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_TASKS_PER_NODE": per_node,
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_NODELIST": "node[3-4]",
        "SLURM_STEP_NODELIST": "node[3-4]",
    }


def test_slurm_tasks_find_each_other_at_the_first_node(monkeypatch, no_scheduler):
    jobs = []
    for rank, number in ((0, "4242"), (5, "4242"), (0, "4243")):
        env = slurm_env(rank, tasks=8, local=rank % 4, per_node="4(x2)", node=str(rank // 4))
        for key, value in {**env, "SLURM_JOB_ID": number}.items():
            monkeypatch.setenv(key, value)
        jobs.append(_joined_job(1, "auto"))
    assert jobs[0]["address"] == jobs[1]["address"] != jobs[2]["address"]
    host, port = jobs[0]["address"]
    assert host == "node3" and 1024 < port < 65536
    assert (jobs[1]["rank"], jobs[1]["world_size"], jobs[1]["local_rank"]) == (5, 8, 1)
    assert (jobs[1]["local_size"], jobs[1]["machine"]) == (4, 1)


# ---- jobs that work --------------------------------------------------------------------------


def test_two_spawned_processes_work_on_the_cpu(tmp_path):
    """The one test that spawns, as a script does; the others fork, which is quicker."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from plaintrain.launch import launch\n"
        "from plaintrain.utils import comm\n\n\n"
        "def main(text):\n"
        "    total = comm.reduce_dict({'x': torch.tensor(comm.get_rank() + 1.0)}, average=False)['x']\n"
        "    print(f'[{text} {comm.get_rank()} of {comm.get_world_size()}: {total.item()}]\\n', end='')\n"
        "    assert torch.distributed.get_backend() == 'gloo'\n\n\n"
        "if __name__ == '__main__':\n"
        "    launch(main, 2, args=('rank',))\n"
        "    print('[done]')\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "WORLD_SIZE"))}
    env.update(
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "[done]", "[rank 0 of 2: 3.0]", "[rank 1 of 2: 3.0]"]


def test_two_jobs_at_once_do_not_meet(tmp_path):
    jobs = [Job(rank_functions.report, tmp_path / str(i), num_gpus_per_machine=2) for i in range(2)]
    for job in wait_all(jobs):
        assert job.code == 0, job.output
        first, second = job.results()
        expected = {"rank": 0, "world_size": 2, "local_rank": 0, "local_size": 2, "main": True, "sum": 1.0}
        assert first == expected
        assert second == {**first, "rank": 1, "local_rank": 1, "main": False}


def test_two_machines_form_one_job(tmp_path):
    jobs = wait_all(start_machines(rank_functions.report, tmp_path))
    assert [job.code for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    expected = {"rank": 0, "world_size": 2, "local_rank": 0, "local_size": 1, "main": True, "sum": 1.0}
    assert jobs[0].results() == [expected]
    assert jobs[1].results() == [{**expected, "rank": 1, "main": False}]


def test_torchruns_processes_are_joined(tmp_path):
    port = str(free_port())
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        Job(rank_functions.report, tmp_path / str(i), env={**env, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(2)
    ]
    wait_all(jobs)
    assert [job.code for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    expected = {"rank": 0, "world_size": 2, "local_rank": 0, "local_size": 2, "main": True, "sum": 1.0}
    assert jobs[0].results() == [expected]
    assert jobs[1].results() == [{**expected, "rank": 1, "local_rank": 1, "main": False}]


@pytest.mark.parametrize(("per_node", "local"), [("2", (0, 1)), ("1(x2)", (0, 0))])
def test_slurms_tasks_are_joined(tmp_path, per_node, local):
    url = f"tcp://127.0.0.1:{free_port()}"
    envs = [
        slurm_env(rank, local=local[rank], per_node=per_node, node=str(rank - local[rank]))
        for rank in range(2)
    ]
    jobs = [Job(rank_functions.report, tmp_path / str(i), env=envs[i], dist_url=url) for i in range(2)]
    wait_all(jobs)
    assert [job.code for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    found = [job.results()[0] for job in jobs]
    assert [(f["rank"], f["world_size"], f["sum"]) for f in found] == [(0, 2, 1.0), (1, 2, 1.0)]
    assert [(f["local_rank"], f["local_size"]) for f in found] == [(i, int(per_node[0])) for i in local]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_batch_script_of_slurm_may_start_the_processes_itself(tmp_path, num_gpus):
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for its script too; only srun starts that many."""
    env = {key: value for key, value in slurm_env(0).items() if "STEP" not in key}
    job = Job(rank_functions.report, tmp_path / "job", env=env, num_gpus_per_machine=num_gpus)
    wait_all([job])
    assert job.code == 0 and [rank["world_size"] for rank in job.results()] == [num_gpus] * num_gpus


# ---- jobs that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "said"),
    [
        (rank_functions.rank_1_fails_while_0_works, "rank 1 broke"),
        (rank_functions.rank_0_fails_while_1_works, "rank 0 broke"),
        (rank_functions.rank_1_fails_while_0_waits, "rank 1 broke"),
    ],
)
def test_failing_rank_ends_the_job_with_its_own_traceback(tmp_path, main, said):
    (job,) = wait_all([Job(main, tmp_path / "job", num_gpus_per_machine=2)])
    assert job.code == 1
    assert said in first_traceback(job.output) and main.__name__ in first_traceback(job.output)
    assert job.output.count("Traceback") == 1 and job.output.count(f"RuntimeError: {said}") == 1


@pytest.mark.parametrize(
    ("main", "rank"),
    [
        (rank_functions.rank_1_fails_while_0_works, 1),
        (rank_functions.rank_0_fails_while_1_works, 0),
        (rank_functions.rank_1_fails_while_0_waits, 1),
    ],
)
def test_failing_rank_ends_the_job_on_the_other_machine_too(tmp_path, main, rank):
    jobs = wait_all(start_machines(main, tmp_path))
    failed, other = jobs[rank], jobs[1 - rank]
    assert [job.code for job in jobs] == [1, 1]
    assert f"RuntimeError: rank {rank} broke" in first_traceback(failed.output)
    assert failed.output.count("Traceback") == 1
    assert f"rank {rank} failed" in other.output


def test_failing_rank_ends_slurms_other_tasks(tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    main = rank_functions.rank_1_fails_while_0_works
    jobs = [Job(main, tmp_path / str(i), env=slurm_env(i), dist_url=url) for i in range(2)]
    wait_all(jobs)
    assert [job.code for job in jobs] == [1, 1]
    assert "rank 1 broke" in first_traceback(jobs[1].output)


def test_mistake_that_all_ranks_find_is_said_once(tmp_path):
    (job,) = wait_all([Job(rank_functions.both_refuse, tmp_path / "job", num_gpus_per_machine=2)])
    assert job.code == 1 and "Traceback" not in job.output
    assert job.output.count("error: both ranks find this") == 1


def test_machine_that_is_late_feels_that_rank_0_has_failed(tmp_path):
    """Rank 0 holds the store, and is gone before the other machine has begun to watch."""
    common = {"num_machines": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}"}
    main = rank_functions.rank_0_fails_while_1_works
    jobs = [Job(main, tmp_path / str(m), machine_rank=m, slow=m * 1.0, **common) for m in range(2)]
    wait_all(jobs)
    assert [job.code for job in jobs] == [1, 1]
    assert "RuntimeError: rank 0 broke" in first_traceback(jobs[0].output)


def test_mistake_that_all_machines_find_ends_both(tmp_path):
    jobs = wait_all(start_machines(rank_functions.both_refuse, tmp_path))
    assert [job.code for job in jobs] == [1, 1]
    assert "error: both ranks find this" in jobs[0].output + jobs[1].output
    assert "Traceback" not in jobs[0].output + jobs[1].output


def test_mistake_that_one_rank_finds_is_one_sentence(tmp_path):
    (job,) = wait_all([Job(rank_functions.rank_1_refuses, tmp_path / "job", num_gpus_per_machine=2)])
    assert job.code == 1 and "Traceback" not in job.output
    assert job.output.count("error: only rank 1 finds this") == 1


def test_mistake_of_the_user_has_a_traceback_with_debug(tmp_path):
    job = Job(rank_functions.rank_1_refuses, tmp_path / "job", num_gpus_per_machine=2, debug=True)
    wait_all([job])
    assert job.code == 1 and "only rank 1 finds this" in first_traceback(job.output)


def test_killed_rank_ends_the_job_and_is_named(tmp_path):
    (job,) = wait_all([Job(rank_functions.rank_1_is_killed, tmp_path / "job", num_gpus_per_machine=2)])
    assert job.code == 1 and "rank 1" in job.output and "SIGKILL" in job.output


def test_killed_rank_ends_the_job_on_the_other_machine_too(tmp_path):
    jobs = wait_all(start_machines(rank_functions.rank_1_is_killed, tmp_path))
    assert [job.code for job in jobs] == [1, 1]
    assert "rank 1 was ended by SIGKILL" in jobs[1].output
    assert "rank 1 failed: it was ended by SIGKILL" in jobs[0].output


def test_port_that_is_taken_is_named_in_one_sentence(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
        job = Job(rank_functions.report, tmp_path / "job", num_gpus_per_machine=2, dist_url=url)
        wait_all([job])
    said = [line for line in job.output.splitlines() if "error: " in line]
    assert job.code == 1 and len(said) == 1 and url in said[0] and "Traceback" not in job.output


def test_interrupt_ends_all_ranks_with_one_message(tmp_path):
    job = Job(rank_functions.wait_for_the_end, tmp_path / "job", num_gpus_per_machine=2)
    end = time.monotonic() + SOON
    while len(list(job.folder.glob("ready-*"))) < 2:
        assert time.monotonic() < end, job.wait(0).output
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    wait_all([job])
    assert job.code == 130
    assert job.output.count("interrupted; a training goes on") == 1 and "Traceback" not in job.output
