"""Start a function on every process of a job, or join the job that torchrun or Slurm started."""

import datetime
import inspect
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from plaintrain.engine.distributed_env import find_job
from plaintrain.engine.network import agree_on_prefix, choose_interface
from plaintrain.engine.watchdog import FailureWatch, connect, is_felt, report_failure
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.logger import outlive_console
from plaintrain.utils.memory import is_out_of_memory, out_of_memory
from plaintrain.utils.stop import end_at_once, stop_signals

# How long a collective may wait for the slowest rank, for example while rank 0 scores.
DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
# How long ranks wait for each other at the start.
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130
# What a rank tells the process that has spawned it, which says that to the person: 128 plus no signal.
_RANK_INTERRUPTED = 128
# How long the other ranks have to end by themselves when one has failed.
_GRACE_SECONDS = 8.0


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
    outlive_console()
    debug = any(getattr(arg, "debug", False) for arg in args)
    try:
        job = find_job(num_gpus_per_machine, num_machines, machine_rank, dist_url)
    except UserError as e:
        _fail(e, debug)
    if job["world_size"] == 1:
        return _run(main_func, args, debug)
    if "rank" in job:
        return _process(0, main_func, args, job, debug)
    return _spawn(main_func, args, job, debug)


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
    if "DataLoader worker" in str(error) and isinstance(error, RuntimeError | MemoryError):
        # PyTorch raises it wherever the training process stands when a worker has gone.
        text = (
            f"a process that loads images has failed ({first_line(error)}); if the machine's memory is full, "
        )
        error = UserError(text + "lower DATALOADER.NUM_WORKERS")
    elif is_out_of_memory(error):
        error = out_of_memory(error)
    if isinstance(error, UserError | FloatingPointError) and not debug:
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def _run(main_func, args, debug):
    try:
        return main_func(*args)
    except (Exception, KeyboardInterrupt) as e:
        _fail(e, debug)


def _spawn(main_func, args, job, debug):
    # Before there are ranks: what comes now is theirs too.
    ranks, received = [], []

    def hand_on(number, frame):
        """Send a signal to all ranks; a second Ctrl-C ends them."""
        first = signal.SIGINT not in received
        received.append(number)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, number if number != signal.SIGINT or first else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in stop_signals()}
    try:
        work, number = (main_func, args, job, debug), job["local_size"]
        ranks += mp.start_processes(_process, work, number, join=False, start_method="spawn").processes
        failed = _first_to_fail(ranks)
        code = failed.exitcode if failed else 0
        if code < 0 and not received:
            name, rank = signal.Signals(-code).name, job["first_rank"] + ranks.index(failed)
            text = f"was ended by {name}" + (": is the memory full?" if code == -signal.SIGKILL else "")
            _tell_other_machines(job, rank, f"it {text}")
            print(f"error: rank {rank} {text}", file=sys.stderr, flush=True)
        _end_ranks(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == _RANK_INTERRUPTED or (code < 0 and signal.SIGINT in received):
        _interrupted()
    if code < 0:
        code = 128 + received[0] if received else 1
    if code:
        sys.exit(code)


def _first_to_fail(ranks):
    """The first process that ends with an error, or None if none does."""
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return process
    return None


def _end_ranks(ranks):
    """Wait for processes to end by themselves, and then no longer."""
    end = time.monotonic() + _GRACE_SECONDS
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _tell_other_machines(job, rank, text):
    """Report a rank that could not do so itself."""
    if job["local_size"] == job["world_size"] or rank == 0:
        # Rank 0 took the store with it; that they see themselves.
        return
    try:
        report_failure(connect(*job["address"]), {"machine": job["machine"], "text": text, "rank": rank})
    except (RuntimeError, OSError):
        # The store has gone too.
        return


def _process(local_rank, main_func, args, job, debug):
    """One rank: join the group, run, and tell the others when it fails."""
    spawned = "rank" not in job
    if spawned:
        _begin_rank()
    rank = job.setdefault("rank", job.get("first_rank", 0) + local_rank)
    local_rank = job.setdefault("local_rank", local_rank)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(job["local_size"])
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job["local_size"]))
    watches = []
    try:
        _join_group(job, watches)
        main_func(*args)
        comm.synchronize()
    except KeyboardInterrupt as e:
        if rank == 0 and not spawned:
            _fail(e, debug)
        # The process that spawned this one says it, once for all ranks.
        end_at_once(_RANK_INTERRUPTED if spawned else _INTERRUPTED)
    except Exception as e:
        text = _describe(e, debug)
        first = all(watch.report(text, felt=is_felt(e)) for watch in watches)
        if first:
            print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
        for watch in watches:
            watch.linger()
        if not first:
            # This one only felt that another rank has failed.
            end_at_once(1)
        sys.exit(1)
    finally:
        for watch in watches:
            watch.stop()
    dist.destroy_process_group()


def _begin_rank():
    outlive_console()
    # Where processes are forked, they have the handlers of the one that hands signals on.
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _join_group(job, watches):
    """Join the process group; the watch over the other ranks is added to `watches` as early as it can be."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(job["local_rank"])
        backend = "cpu:gloo,cuda:nccl"
    rank, world_size, by_torchrun = job["rank"], job["world_size"], job["address"] is None
    several_machines, env = job["local_size"] < world_size, os.environ
    address = (env["MASTER_ADDR"], int(env["MASTER_PORT"])) if by_torchrun else job["address"]
    store, prefix = _open_store(address, rank, world_size, by_torchrun), ""
    if by_torchrun:
        prefix = agree_on_prefix(store, rank, world_size, _RENDEZVOUS_TIMEOUT.total_seconds())
        store = dist.PrefixStore(prefix, store)
    # The store of torchrun's agent outlives rank 0.
    lingers = several_machines and rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place = job["machine"], job["local_rank"]
    # Before the ranks part: rank 0 takes the store with it when it ends.
    watches.append(FailureWatch(address, (rank, world_size), place, prefix=prefix, lingers=lingers))
    if several_machines:
        choose_interface(store, job["machine"], address[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)


def _open_store(address, rank, world_size, by_torchrun):
    """The store in which the ranks of the job meet."""
    if by_torchrun:
        return next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))[0]
    host, port = address
    try:
        return dist.TCPStore(host, port, world_size, rank == 0, timeout=_RENDEZVOUS_TIMEOUT)
    except (RuntimeError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"rank {rank} cannot meet the {world_size} processes at tcp://{host}:{port}: {reason}"
        ) from e


def create_ddp_model(model):
    """Return the model wrapped in DistributedDataParallel; itself when there is one process."""
    if comm.get_world_size() == 1:
        return model
    # torch 2.14 has renamed it, and warns of the old name.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[comm.get_local_rank()] if next(model.parameters()).is_cuda else None,
        gradient_as_bucket_view=True,
        **{sync_buffers: False},
    )
