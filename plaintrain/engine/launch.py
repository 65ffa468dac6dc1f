"""Launch a function on all processes of a job, or join a job started by torchrun or Slurm."""

import contextlib
import datetime
import inspect
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plaintrain.engine.distributed_env import agree_on_prefix, choose_interface, find_job
from plaintrain.engine.watchdog import FailureWatch, connect, describe_position, report_failure
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.logger import ignore_console_errors
from plaintrain.utils.memory import describe_out_of_memory, is_out_of_memory
from plaintrain.utils.stop import Stopped, end_at_once, get_stop_signals
from plaintrain.utils.text import escape_controls
from plaintrain.utils.user_code import IMPORTED, import_user_code

# Timeout of collectives; other ranks wait in one while rank 0 scores.
DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# A shell's exit code for Ctrl-C.
_INTERRUPTED = 130
# Exit code of an interrupted rank; the process that spawned it prints the message once for all ranks.
_RANK_INTERRUPTED = 128
# Exit code of a rank that has finished; 0 may also come from os._exit(0) in the middle of a run.
_RANK_FINISHED = 127
# Time for the other ranks to exit after one has failed, or has called sys.exit(0).
_GRACE_SECONDS = 8.0


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence[Any] = (),
) -> Any:
    """Run `main_func(*args)`, which must be picklable, on all processes of a job.

    A process started by torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, SLURM_NTASKS, ...) joins
    its job. Otherwise `num_gpus_per_machine` processes are spawned; without GPUs they use the CPU and gloo.
    A `UserError` is printed without a traceback, unless an element of `args` has a true `debug`. All
    processes exit with a nonzero code if any rank fails.

    Args:
        num_machines: machines of the job; run the same command on each.
        machine_rank: this machine, from 0.
        dist_url: tcp://host:port of machine 0; "auto" picks a free port, for a single machine.
    """
    ignore_console_errors()
    debug = any(getattr(arg, "debug", False) for arg in args)
    try:
        job = find_job(num_gpus_per_machine, num_machines, machine_rank, dist_url)
        if job["world_size"] == 1:
            with contextlib.closing(FailureWatch(job)):
                return main_func(*args)
        if "rank" not in job:
            return _spawn(main_func, args, job, debug)
    except KeyboardInterrupt:
        _exit_interrupted()
    except Exception as e:
        print(_describe(e, debug), file=sys.stderr, flush=True)
        sys.exit(1)
    return _run_rank(0, main_func, args, job, debug)


def _exit_interrupted() -> None:
    print("interrupted; continue from the last checkpoint with --resume", file=sys.stderr, flush=True)
    sys.exit(_INTERRUPTED)


def _describe(error: BaseException, debug: bool) -> str:
    """Return the message of a user's mistake, or the traceback of a bug."""
    is_worker = "DataLoader worker" in "".join(traceback.format_exception_only(error))
    if is_worker and isinstance(error, RuntimeError | MemoryError):
        # PyTorch raises it anywhere in the main process when a worker has died.
        error = UserError(
            f"a data loading worker has failed ({get_first_line(error)}); if the machine is out of memory, "
            "lower DATALOADER.NUM_WORKERS"
        )
    elif is_out_of_memory(error):
        error = describe_out_of_memory(error)
    if isinstance(error, UserError | FloatingPointError) and not debug:
        return escape_controls(f"error: {error}")
    return escape_controls("".join(traceback.format_exception(error)).rstrip())


def _spawn(main_func, args, job, debug):
    """Run one process per rank of this machine."""
    # On machine 0, this process holds the store, which thus outlives all ranks.
    store = _open_store(job, is_master=True) if job["machine"] == 0 else None
    ranks = []
    received = []

    def forward(signum, frame):
        """Send a signal to all ranks; kill them after a second Ctrl-C."""
        is_second = signum == signal.SIGINT and signal.SIGINT in received
        received.append(signum)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL if is_second else signum)

    # Handlers are set first, so that no signal is lost while the ranks start.
    handlers = {signum: signal.signal(signum, forward) for signum in get_stop_signals()}
    try:
        job["imports"] = IMPORTED
        context = mp.start_processes(_run_rank, (main_func, args, job, debug), job["local_size"], join=False)
        ranks += context.processes
        failed = _wait_for_failure(ranks)
        code = failed.exitcode if failed else _RANK_FINISHED
        if failed and not received:
            _report_exit(job, store, job["first_rank"] + ranks.index(failed), code)
        _join_ranks(ranks, job["first_rank"])
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if code == _RANK_INTERRUPTED or (code < 0 and signal.SIGINT in received):
        _exit_interrupted()
    if code < 0:
        code = 128 + received[0] if received else 1
    if code != _RANK_FINISHED:
        sys.exit(code or 1)


def _wait_for_failure(ranks):
    """Return the first process that fails, or None when all have finished."""
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != _RANK_FINISHED:
                return process
    return None


def _join_ranks(ranks, first_rank):
    """Wait for all processes to exit; kill those that do not."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank, process in enumerate(ranks, start=first_rank):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            print(f"rank {rank} does not respond; killing it", file=sys.stderr, flush=True)
            process.kill()
            process.join()


def _report_exit(job, store, rank, code):
    """Report the end of a rank, unless a failure has been reported or a signal has stopped the job."""
    is_reported = code == 1 and store is None
    if is_reported or code == _RANK_INTERRUPTED or code - 128 in get_stop_signals():
        return
    text = f"has exited with code {code} and without a message, as by os._exit({code})"
    if code < 0:
        text = f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        text += "; the machine may be out of memory"
    failure = {"machine": job["machine"], "rank": rank, "text": f"it {text}", "asks": False}
    try:
        first = report_failure(dist.PrefixStore("", store) if store else connect(*job["address"]), failure)
    except (RuntimeError, OSError):
        # The store is on another machine, which has failed or finished.
        first = failure if code < 0 else None
    if first == failure:
        print(f"error: rank {rank} {text}", file=sys.stderr, flush=True)


def _run_rank(local_rank, main_func, args, job, debug):
    """Join the process group as one rank, run the function, and report its failure to the other ranks."""
    is_spawned = "rank" not in job
    _prepare_process(job, local_rank)
    watch = None
    try:
        import_user_code(job.pop("imports", ()))
        store, watch = _rendezvous(job, is_spawned)
        if torch.cuda.is_available():
            torch.cuda.set_device(job["local_rank"])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=job["rank"], world_size=job["world_size"], timeout=DEFAULT_TIMEOUT
        )
        _call_main(main_func, args, watch)
        comm.synchronize()
    except KeyboardInterrupt:
        if job["rank"] == 0 and not is_spawned:
            _exit_interrupted()
        end_at_once(_RANK_INTERRUPTED if is_spawned else _INTERRUPTED)
    except Stopped:
        raise
    except BaseException as e:
        text = _describe(e, debug)
        if watch is not None:
            watch.fail(e, text)
        print(f"rank {job['rank']}: {text}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if watch is not None:
            watch.close()
    dist.destroy_process_group()
    if is_spawned:
        sys.exit(_RANK_FINISHED)


def _prepare_process(job, local_rank):
    """Set signal handlers, environment variables and threads of a rank."""
    if "rank" not in job:
        ignore_console_errors()
        # A forked process has inherited the handlers of its parent.
        for signum in get_stop_signals():
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        job |= {"rank": job["first_rank"] + local_rank, "local_rank": local_rank}
    os.environ["LOCAL_RANK"] = str(job["local_rank"])
    os.environ["LOCAL_WORLD_SIZE"] = str(job["local_size"])
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job["local_size"]))


def _call_main(main_func, args, watch):
    """Call the function; sys.exit(0) on all ranks is a return, and any other sys.exit a failure."""
    try:
        main_func(*args)
    except SystemExit as e:
        if isinstance(e, Stopped):
            raise
        call = f"sys.exit({e.code!r}) in {describe_position(traceback.extract_tb(e.__traceback__))}"
        if e.code or not watch.finish(_GRACE_SECONDS, f"has called {call}"):
            raise UserError(f"it called {call}, before the other ranks have finished; return instead") from e
    else:
        watch.finish(0.0, "has returned from the function that was launched")


def _open_store(job, is_master, rank=None):
    """Start the job's store, or connect to it; a rank waits until all ranks have."""
    host, port = job["address"]
    try:
        store = dist.TCPStore(host, port, None, is_master, _RENDEZVOUS_TIMEOUT, wait_for_workers=False)
        if rank is not None:
            store.set(f"plaintrain/joined/{rank}", "")
            store.wait([f"plaintrain/joined/{other}" for other in range(job["world_size"])])
    except (RuntimeError, OSError) as e:
        raise UserError(
            f"cannot join the {job['world_size']} processes at tcp://{host}:{port}: {get_first_line(e)}"
        ) from e
    job["address"] = host, store.port
    return store


def _rendezvous(job, is_spawned):
    """Wait for the other ranks; return the store of the job and the watch over its ranks."""
    prefix = ""
    holds_store = job["rank"] == 0 and not is_spawned
    if job["address"] is None:
        # The store of torchrun's agent.
        job["address"] = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))[0]
        timeout = _RENDEZVOUS_TIMEOUT.total_seconds()
        prefix = agree_on_prefix(store, job["rank"], job["world_size"], timeout)
        store = dist.PrefixStore(prefix, store)
        holds_store &= os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    else:
        store = _open_store(job, holds_store, job["rank"])
    # The watch starts first, since the store may die with rank 0.
    watch = FailureWatch(job, prefix, holds_store)
    if job["local_size"] < job["world_size"]:
        choose_interface(store, job["machine"], job["address"][0])
    return store, watch


def create_ddp_model(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    # torch 2.14 renamed broadcast_buffers.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True, **options)
