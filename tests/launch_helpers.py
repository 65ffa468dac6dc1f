"""Starts `launch` in processes of their own, and holds the functions that those processes run.

The processes are forked from a server that has imported torch once, so that one costs a tenth of
a second instead of two; `launch` starts its ranks there too. Nothing of the calling process but
`sys.path` reaches them.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import multiprocessing as torch_mp

from plaintrain.launch import launch
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

_SERVER = multiprocessing.get_context("forkserver")
# What a scheduler around the tests may have set.
_SCHEDULER_KEYS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """One process that calls `launch(main_func, args=(args,), **kwargs)`, and what it prints."""

    def __init__(self, main_func, folder, *, env=None, debug=False, **kwargs):
        """
        Args:
            main_func: function of this module (or another importable one) that takes `args`.
            folder: new folder for the job's files; `args.folder`.
            env: environment variables to set before.
            debug: `args.debug`.
            kwargs: arguments of `launch`.
        """
        self._log = Path(folder) / "output.txt"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        _SERVER.set_forkserver_preload(["torch", "torch.distributed", "plaintrain.launch"])
        args = SimpleNamespace(folder=str(folder), debug=debug)
        self._process = _SERVER.Process(
            target=_call_launch, args=(str(self._log), env or {}, main_func, args, kwargs)
        )
        self._start = time.monotonic()
        self._process.start()

    @property
    def pid(self):
        return self._process.pid

    def wait(self, timeout=60):
        """Wait until the process has ended; then `code`, `output` and `seconds` are set."""
        self._process.join(timeout)
        self.seconds = time.monotonic() - self._start
        running = self._process.is_alive()
        if running:
            self._process.kill()
            self._process.join()
        self.code, self.output = self._process.exitcode, self._log.read_text()
        assert not running, f"still running after {timeout} s; it printed:\n{self.output}"
        return self


def _call_launch(log, env, main_func, args, kwargs):
    _redirect(log)
    for key in [*_SCHEDULER_KEYS, *(key for key in os.environ if key.startswith("SLURM_"))]:
        os.environ.pop(key, None)
    os.environ.update(OMP_NUM_THREADS="1", **env)
    start_processes = torch_mp.start_processes
    torch_mp.start_processes = lambda *a, **kw: start_processes(*a, **{**kw, "start_method": "fork"})
    launch(main_func, args=(args,), **kwargs)


def _redirect(log):
    """Send what this process prints to the end of a file."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def both_user(args):
    raise UserError("both ranks find this")


def report(args):
    """Write what this rank knows of itself to `rank-N.json`."""
    facts = {
        "world_size": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "main": comm.is_main_process(),
        "backend": dist.get_backend(),
        "sum": comm.reduce_dict({"ranks": torch.tensor(float(comm.get_rank()))}, average=False)["ranks"].item(),
    }
    Path(args.folder, f"rank-{comm.get_rank()}.json").write_text(json.dumps(facts))


def fail_on_1_while_0_works(args):
    if comm.get_rank() == 1:
        raise RuntimeError("rank 1 broke")
    time.sleep(100)


def fail_on_0_while_1_works(args):
    if comm.get_rank() == 0:
        raise RuntimeError("rank 0 broke")
    time.sleep(100)


def fail_on_1_while_0_waits(args):
    if comm.get_rank() == 1:
        time.sleep(0.5)
        raise RuntimeError("rank 1 broke")
    comm.synchronize()


def kill_1(args):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()
