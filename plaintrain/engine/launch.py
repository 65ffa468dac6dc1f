"""Start a function on every process of a job, or join the job that torchrun or Slurm started."""

import contextlib
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

from plaintrain.engine.distributed_env import agree_on_prefix, choose_interface, find_job
from plaintrain.engine.watchdog import FailureWatch, connect, report_failure
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.logger import ignore_console_errors
from plaintrain.utils.memory import describe_out_of_memory, is_out_of_memory
from plaintrain.utils.stop import end_at_once, get_stop_signals

# How long a collective may wait for the slowest rank, for example while rank 0 scores.
DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
# How long ranks wait for each other at the start.
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130
# The exit code of an interrupted rank; the process that spawned it prints the message once for all ranks.
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
    ignore_console_errors()
    debug = any(getattr(arg, "debug", False) for arg in args)
    try:
        job = find_job(num_gpus_per_machine, num_machines, machine_rank, dist_url)
        if job["world_size"] == 1:
            return main_func(*args)
    except KeyboardInterrupt:
        _exit_interrupted()
    except Exception as e:
        print(_describe(e, debug), file=sys.stderr, flush=True)
        sys.exit(1)
    if "rank" in job:
        return _run_rank(0, main_func, args, job, debug)
    return _spawn(main_func, args, job, debug)


def _exit_interrupted():
    message = "interrupted; a training goes on from its last checkpoint with --resume"
    print(message, file=sys.stderr, flush=True)
    sys.exit(_INTERRUPTED)


def _describe(error, debug):
    """Return what is printed about an exception: a sentence about a mistake, the traceback of a bug."""
    if "DataLoader worker" in str(error) and isinstance(error, RuntimeError | MemoryError):
        # PyTorch raises it wherever the training process stands when a worker has gone.
        error = UserError(
            f"a process that loads images has failed ({get_first_line(error)}); if the machine's memory is "
            "full, lower DATALOADER.NUM_WORKERS"
        )
    elif is_out_of_memory(error):
        error = describe_out_of_memory(error)
    if isinstance(error, UserError | FloatingPointError) and not debug:
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def _spawn(main_func, args, job, debug):
    """Run one process for each rank of this machine."""
    ranks = []
    received = []

    def pass_on(number, frame):
        """Send a signal to all ranks; a second Ctrl-C ends them."""
        is_second = number == signal.SIGINT and signal.SIGINT in received
        received.append(number)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL if is_second else number)

    # Before there are ranks: what comes now is theirs too.
    handlers = {number: signal.signal(number, pass_on) for number in get_stop_signals()}
    try:
        arguments = (main_func, args, job, debug)
        context = mp.start_processes(
            _run_rank, arguments, job["local_size"], join=False, start_method="spawn"
        )
        ranks += context.processes
        failed = _first_to_fail(ranks)
        code = failed.exitcode if failed else 0
        if code < 0 and not received:
            _report_killed(job, job["first_rank"] + ranks.index(failed), -code)
        _end_ranks(ranks, job["first_rank"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code == _RANK_INTERRUPTED or (code < 0 and signal.SIGINT in received):
        _exit_interrupted()
    if code < 0:
        code = 128 + received[0] if received else 1
    if code:
        sys.exit(code)


def _first_to_fail(ranks):
    """Return the first process that ends with an error, or None if none does."""
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return process
    return None


def _end_ranks(ranks, first_rank):
    """Wait for processes to end by themselves, and end those that do not."""
    end = time.monotonic() + _GRACE_SECONDS
    for rank, process in enumerate(ranks, start=first_rank):
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            print(f"rank {rank} does not answer: it is killed", file=sys.stderr, flush=True)
            process.kill()
            process.join()


def _report_killed(job, rank, number):
    """Report a rank that could not do so itself."""
    text = f"was ended by {signal.Signals(number).name}"
    if number == signal.SIGKILL:
        text += ": is the memory full?"
    if rank != 0:
        # Rank 0 takes the store with it, which the others notice.
        with contextlib.suppress(RuntimeError, OSError):
            failure = {"machine": job["machine"], "rank": rank, "text": f"it {text}", "hangs": False}
            report_failure(connect(*job["address"]), failure)
    print(f"error: rank {rank} {text}", file=sys.stderr, flush=True)


def _run_rank(local_rank, main_func, args, job, debug):
    """Join the process group as one rank, run, and tell the other ranks when it fails."""
    is_spawned = "rank" not in job
    if is_spawned:
        ignore_console_errors()
        # Where processes are forked, they have the handlers of the one that passes signals on.
        for number in get_stop_signals():
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        job |= {"rank": job["first_rank"] + local_rank, "local_rank": local_rank}
    os.environ["LOCAL_RANK"] = str(job["local_rank"])
    os.environ["LOCAL_WORLD_SIZE"] = str(job["local_size"])
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job["local_size"]))
    watch = None
    try:
        store, watch = _meet(job)
        if torch.cuda.is_available():
            torch.cuda.set_device(job["local_rank"])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=job["rank"], world_size=job["world_size"], timeout=DEFAULT_TIMEOUT
        )
        main_func(*args)
        comm.synchronize()
    except KeyboardInterrupt:
        if job["rank"] == 0 and not is_spawned:
            _exit_interrupted()
        end_at_once(_RANK_INTERRUPTED if is_spawned else _INTERRUPTED)
    except Exception as e:
        text = _describe(e, debug)
        if watch is not None:
            watch.fail(e, text)
        print(f"rank {job['rank']}: {text}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if watch is not None:
            watch.stop()
    dist.destroy_process_group()


def _meet(job):
    """Wait for the other ranks; returns the store of the job, and the watch over its ranks."""
    rank, world_size, address = job["rank"], job["world_size"], job["address"]
    prefix = ""
    if address is None:
        # The store of torchrun's agent.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))[0]
        prefix = agree_on_prefix(store, rank, world_size, _RENDEZVOUS_TIMEOUT.total_seconds())
        store = dist.PrefixStore(prefix, store)
    else:
        try:
            store = dist.TCPStore(*address, world_size, rank == 0, timeout=_RENDEZVOUS_TIMEOUT)
        except (RuntimeError, OSError) as e:
            raise UserError(
                f"rank {rank} cannot meet the {world_size} processes at tcp://{address[0]}:{address[1]}: "
                f"{get_first_line(e)}"
            ) from e
    holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # Before the ranks part: rank 0 takes the store with it when it ends.
    watch = FailureWatch(address, rank, job["machine"], job["local_rank"], prefix, holds_store)
    if job["local_size"] < world_size:
        choose_interface(store, job["machine"], address[0])
    return store, watch


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
