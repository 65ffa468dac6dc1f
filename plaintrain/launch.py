"""Start a function on every process of a job, or join the job that torchrun or Slurm started."""

import datetime
import os
import re
import socket
import sys
import time
import traceback
from contextlib import closing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.watch import FailureWatch

# How long a collective may wait for the slowest rank, for example while rank 0 scores.
DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
# How long ranks wait for each other at the start.
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130


def launch(main_func, num_gpus_per_machine=1, num_machines=1, machine_rank=0, dist_url="auto", args=()):
    """Run `main_func(*args)` on `num_machines * num_gpus_per_machine` processes.

    Where torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, SLURM_NTASKS, ...) has started
    this process as one of several, it joins them instead. Without GPUs the processes work on the
    CPU, over gloo. A `UserError` is printed as one sentence, unless an element of `args` has a
    true `debug`; then, and for every other exception, with its traceback. The process exits with
    a code that is not 0 as soon as any rank of the job fails.

    Args:
        main_func: function that can be pickled.
        num_gpus_per_machine: processes on this machine, one a GPU.
        num_machines: machines of the job; the same command runs on each.
        machine_rank: this machine's number, from 0.
        dist_url: tcp://host:port of machine 0; "auto" picks a free port on a single machine.
        args: arguments of `main_func`.
    """
    debug = any(getattr(arg, "debug", False) for arg in args)
    try:
        job = _joined_job(num_gpus_per_machine, dist_url)
        if job is None:
            job = _described_job(num_gpus_per_machine, num_machines, machine_rank, dist_url)
    except UserError as e:
        _fail(e, debug)
    if job["world_size"] == 1:
        return _run(main_func, args, debug)
    if "rank" in job:
        return _process(0, main_func, args, job, debug)
    return _spawn(main_func, args, job, debug)


def _described_job(num_gpus, num_machines, machine_rank, dist_url):
    """The job that the command line describes."""
    if num_gpus < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank} do "
            "not fit together: the first two are at least 1, and the rank is below the machines"
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()} GPU(s)")
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError("several machines need --dist-url tcp://HOST:PORT of machine 0")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    return {
        "world_size": num_gpus * num_machines,
        "local_size": num_gpus,
        "first_rank": num_gpus * machine_rank,
        "address": _parse_url(dist_url),
        "machine": machine_rank,
    }


def _joined_job(num_gpus, dist_url):
    """The job this process was started in by torchrun or srun, or None."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 and "RANK" in env:
        job = {
            "rank": int(env["RANK"]),
            "world_size": int(env["WORLD_SIZE"]),
            "local_rank": int(env.get("LOCAL_RANK", 0)),
            "local_size": int(env.get("LOCAL_WORLD_SIZE", 1)),
            "machine": int(env.get("GROUP_RANK", 0)),
            "address": None,
        }
        started_by = "torchrun"
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and _is_step(env):
        job = _slurm_job(env, dist_url)
        started_by = "srun"
    else:
        return None
    if num_gpus not in (1, job["local_size"]):
        raise UserError(
            f"--num-gpus is {num_gpus}, but {started_by} has started {job['local_size']} processes on "
            "this machine; leave --num-gpus out"
        )
    if torch.cuda.is_available() and job["local_rank"] >= torch.cuda.device_count():
        raise UserError(
            f"{started_by} has started process {job['local_rank']} on this machine, which has only "
            f"{torch.cuda.device_count()} GPU(s)"
        )
    return job


def _is_step(env):
    # sbatch sets SLURM_NTASKS and SLURM_PROCID for its script too; only srun starts that many.
    return "SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env


def _tasks_on_node(counts, node):
    """Entry `node` of Slurm's short form: `2(x3),1` is 2, 2, 2, 1."""
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks[node] if node < len(tasks) else 1


def _slurm_job(env, dist_url):
    if dist_url == "auto":
        host = env.get("MASTER_ADDR") or _first_host(
            env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
        )
        # Every task computes the same port; jobs beside this one get another.
        port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
        dist_url = f"tcp://{host}:{port}"
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    return {
        "rank": int(env["SLURM_PROCID"]),
        "world_size": int(env["SLURM_NTASKS"]),
        "local_rank": int(env.get("SLURM_LOCALID", 0)),
        "local_size": _tasks_on_node(per_node, int(env.get("SLURM_NODEID", 0))),
        "machine": int(env.get("SLURM_NODEID", 0)),
        "address": _parse_url(dist_url),
    }


def _first_host(nodelist):
    """`node[03-05,9],other` -> `node03`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+))?", nodelist)
    return (match.group(1) + (match.group(2) or "")) or "127.0.0.1"


def _parse_url(dist_url):
    match = re.fullmatch(r"tcp://\[?([^\[\]]+?)\]?:(\d+)", dist_url)
    if not match or not 0 < int(match.group(2)) < 2**16:
        raise UserError(f"--dist-url must look like tcp://HOST:PORT, not {dist_url!r}")
    return match.group(1), int(match.group(2))


def _free_port():
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fail(error, debug):
    """Print what is to be said about an exception, and exit."""
    if isinstance(error, KeyboardInterrupt):
        _interrupted()
    print(_describe(error, debug), file=sys.stderr, flush=True)
    sys.exit(1)


def _interrupted():
    print(
        "interrupted; a training goes on from its last checkpoint with --resume", file=sys.stderr, flush=True
    )
    sys.exit(_INTERRUPTED)


def _describe(error, debug):
    if isinstance(error, UserError | FloatingPointError) and not debug:
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def _run(main_func, args, debug):
    try:
        return main_func(*args)
    except (Exception, KeyboardInterrupt) as e:
        _fail(e, debug)


def _spawn(main_func, args, job, debug):
    context = mp.start_processes(
        _process, (main_func, args, job, debug), nprocs=job["local_size"], join=False, start_method="spawn"
    )
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as e:
        if e.exit_code == _INTERRUPTED:
            _interrupted()
        # The failed process has said why, unless a signal ended it.
        if e.signal_name:
            rank = job["first_rank"] + e.error_index
            print(f"error: rank {rank} was ended by {e.signal_name}", file=sys.stderr)
        sys.exit(e.exit_code if e.exit_code > 0 else 1)
    except KeyboardInterrupt:
        for process in context.processes:
            process.join(timeout=30)
            process.kill()
        _interrupted()


def _process(local_rank, main_func, args, job, debug):
    """One rank: join the group, run, and tell the others when it fails."""
    spawned = "rank" not in job
    rank = job.setdefault("rank", job.get("first_rank", 0) + local_rank)
    local_rank = job.get("local_rank", local_rank)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(job["local_size"])
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job["local_size"]))
    watch = None
    try:
        watch = _join_group(rank, local_rank, job)
        main_func(*args)
        comm.synchronize()
    except KeyboardInterrupt as e:
        if rank == 0 and not spawned:
            _fail(e, debug)
        # The process that spawned this one says it, once for all ranks.
        os._exit(_INTERRUPTED)
    except Exception as e:
        if watch is not None and not watch.report(_describe(e, debug)):
            # Another rank failed first; this one only felt it.
            os._exit(1)
        print(f"rank {rank}: ", end="", file=sys.stderr)
        if rank == 0 and job["local_size"] < job["world_size"]:
            # The store ends with this process: let the other machines read what happened.
            time.sleep(2)
        _fail(e, debug)
    finally:
        if watch is not None:
            watch.stop()
    dist.destroy_process_group()


def _join_group(rank, local_rank, job):
    """Join the process group; returns the watch over the other ranks, or None under torchrun."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if job["address"] is None:
        # torchrun's agents watch the ranks.
        dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
        return None
    host, port = job["address"]
    try:
        store = dist.TCPStore(host, port, job["world_size"], rank == 0, timeout=_RENDEZVOUS_TIMEOUT)
    except (RuntimeError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"rank {rank} cannot meet the {job['world_size']} processes at tcp://{host}:{port}: {reason}"
        ) from e
    # Before the ranks part: rank 0 takes the store with it when it ends.
    watch = FailureWatch(rank, host, port, job["machine"], local_rank)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=job["world_size"], timeout=DEFAULT_TIMEOUT
    )
    return watch
