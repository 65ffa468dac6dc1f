"""Rendezvous of the processes of a job started by the command line, torchrun or Slurm."""

import contextlib
import fcntl
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from plaintrain.utils.errors import UserError

_ADDRESS_KEY = "plaintrain/address"
# Linux ioctl that returns the address of a network interface.
_SIOCGIFADDR = 0x8915
# Slurm steps from this id on are interactive shells, batch scripts and other special steps.
_SPECIAL_STEP = 0xFFFFFFF0


def find_job(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> dict[str, Any]:
    """Return the job of this process; the arguments are those of `plaintrain.engine.launch.launch`.

    A job is a dict of `world_size`, `local_size`, `machine` and `address` ((host, port); None with torchrun).
    A process started by torchrun or srun also has `rank` and `local_rank`, one that spawns the processes of
    this machine has `first_rank`.
    """
    env = os.environ
    # Slurm scripts often export WORLD_SIZE, but not RANK.
    world_size = _get_int(env, "WORLD_SIZE", 1, default="" if "RANK" in env else 1)
    if "RANK" not in env and _is_srun_task(env, num_gpus):
        job = _get_slurm_job(env, dist_url)
        started = f"srun has started {job['local_size']} processes on this machine"
    elif world_size > 1:
        job = _get_torchrun_job(env, world_size)
        started = f"torchrun has started {job['local_size']} processes on this machine"
    else:
        _get_int(env, "RANK", 0, 0, 0)
        job = _get_local_job(num_gpus, num_machines, machine_rank, dist_url)
        started = f"--num-gpus is {num_gpus}"
    if num_gpus not in (1, job["local_size"]):
        raise UserError(f"--num-gpus must be {job['local_size']} or omitted, got {num_gpus}; {started}")
    if torch.cuda.is_available() and job.get("local_rank", num_gpus - 1) >= torch.cuda.device_count():
        raise UserError(f"{started}, but this machine has {torch.cuda.device_count()} GPU(s)")
    return job


def _get_local_job(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> dict[str, Any]:
    if num_gpus < 1:
        raise UserError(f"--num-gpus must be at least 1, got {num_gpus}")
    if num_machines < 1:
        raise UserError(f"--num-machines must be at least 1, got {num_machines}")
    if not 0 <= machine_rank < num_machines:
        raise UserError(f"--machine-rank must be from 0 to {num_machines - 1}, got {machine_rank}")
    if dist_url == "auto" and num_machines > 1:
        raise UserError("--dist-url must be tcp://HOST:PORT of machine 0 for several machines, got auto")
    return {
        "world_size": num_gpus * num_machines,
        "local_size": num_gpus,
        "first_rank": num_gpus * machine_rank,
        # Port 0 is any free port.
        "address": ("127.0.0.1", 0) if dist_url == "auto" else _parse_url(dist_url),
        "machine": machine_rank,
    }


def _get_int(env: Mapping[str, str], name: str, low: int, high: int = 2**16, default: int | str = "") -> int:
    """Return an integer variable of torchrun or Slurm; without a default, it must be set."""
    value = str(env.get(name, default))
    if not (re.fullmatch("[0-9]{1,10}", value) and low <= int(value) <= high):
        raise UserError(
            f"the environment variable {name} must be from {low} to {high}, got {value!r}; torchrun sets "
            "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, srun sets SLURM_*: use one of them, or unset all"
        )
    return int(value)


def _get_torchrun_job(env: Mapping[str, str], world_size: int) -> dict[str, Any]:
    local_rank = _get_int(env, "LOCAL_RANK", 0, world_size - 1)
    _get_int(env, "MASTER_PORT", 1, 2**16 - 1)
    if not env.get("MASTER_ADDR"):
        raise UserError("the environment variable MASTER_ADDR must be the host of rank 0; torchrun sets it")
    return {
        "rank": _get_int(env, "RANK", 0, world_size - 1),
        "world_size": world_size,
        "local_rank": local_rank,
        "local_size": _get_int(env, "LOCAL_WORLD_SIZE", local_rank + 1, world_size, local_rank + 1),
        "machine": _get_int(env, "GROUP_RANK", 0, default=0),
        "address": None,
    }


def _is_srun_task(env: Mapping[str, str], num_gpus: int) -> bool:
    """Return whether srun has started this process as one of several."""
    # sbatch also sets SLURM_NTASKS and SLURM_PROCID, but runs its script once; only srun starts all tasks.
    is_step = "SLURM_PROCID" in env and "SLURM_STEP_ID" in env
    if not is_step or _get_int(env, "SLURM_NTASKS", 1, default=1) == 1:
        return False
    is_shell = _get_int(env, "SLURM_STEP_ID", 0, 2**32) >= _SPECIAL_STEP or "SLURM_PTY_PORT" in env
    if is_shell and num_gpus == 1:
        raise UserError(
            f"this is an interactive shell of a Slurm job with {env['SLURM_NTASKS']} tasks; start them with "
            "srun, or give --num-gpus, or unset SLURM_NTASKS for one process"
        )
    return not is_shell


def _get_slurm_job(env: Mapping[str, str], dist_url: str) -> dict[str, Any]:
    world_size = _get_int(env, "SLURM_NTASKS", 1)
    tasks = _parse_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _get_int(env, "SLURM_NODEID", 0, len(tasks) - 1, 0)
    host = env.get("MASTER_ADDR") or _get_first_host(env.get("SLURM_STEP_NODELIST", ""))
    # The port is the same for all tasks of a job, but differs between jobs.
    default_port = 20000 + _get_int(env, "SLURM_JOB_ID", 0, 2**32, 0) % 20000
    port = _get_int(env, "MASTER_PORT", 1, 2**16 - 1, default_port)
    return {
        "rank": _get_int(env, "SLURM_PROCID", 0, world_size - 1),
        "world_size": world_size,
        "local_rank": _get_int(env, "SLURM_LOCALID", 0, default=0),
        "local_size": tasks[node],
        "machine": node,
        "address": (host, port) if dist_url == "auto" else _parse_url(dist_url),
    }


def _parse_tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's run lengths, `2(x3),1`, to a list, 2, 2, 2, 1."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks


def _get_first_host(nodelist: str) -> str:
    """Return the first host of Slurm's node list: `node03` of `node[03-05,9],other`."""
    return "".join(re.findall(r"^([^\[,]*)(?:\[(\w+))?", nodelist)[0]) or "127.0.0.1"


def _parse_url(dist_url: str) -> tuple[str, int]:
    match = re.fullmatch(r"tcp://\[?([^\[\]]+?)\]?:(\d+)", dist_url)
    if not match or not 0 < int(match.group(2)) < 2**16:
        raise UserError(f"--dist-url must be tcp://HOST:PORT, got {dist_url!r}")
    return match.group(1), int(match.group(2))


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """Return a key prefix that is unique to this start of the job and the same on all ranks.

    The store of torchrun's agents survives restarts of the ranks and still contains the keys of earlier
    starts. Rank 0 waits up to `timeout` seconds for the other ranks.
    """
    if rank != 0:
        # A new request has no reply from an earlier start.
        request = uuid.uuid4().hex
        store.set(f"plaintrain/request/{rank}", request)
        prefix = store.get(f"plaintrain/reply/{request}").decode()
        store.set(f"{prefix}joined/{rank}", "")
        return prefix
    prefix = f"plaintrain/{uuid.uuid4().hex}/"
    deadline = time.monotonic() + timeout
    for other in range(1, world_size):
        while not store.check([f"{prefix}joined/{other}"]):
            if time.monotonic() > deadline:
                raise UserError(f"rank {other} of {world_size} has not joined within {timeout:g} s")
            if store.check([f"plaintrain/request/{other}"]):
                request = store.get(f"plaintrain/request/{other}").decode()
                store.set(f"plaintrain/reply/{request}", prefix)
            time.sleep(0.05)
    return prefix


def choose_interface(store: dist.Store, machine: int, host: str) -> None:
    """Set GLOO_SOCKET_IFNAME, unless set, to the interface that reaches the other machines.

    By default, gloo publishes the address of this machine's host name, which is often a loopback address
    such as Debian's 127.0.1.1. `host` is machine 0.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if machine == 0:
        # Machine 0 takes the route to another machine, since its own name may also be a loopback address.
        host = store.get(_ADDRESS_KEY).decode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        address = ""
        with contextlib.suppress(OSError):
            # connect() of a UDP socket looks up the route and sends nothing.
            s.connect((host, 9))
            address = s.getsockname()[0]
        if machine != 0:
            store.set(_ADDRESS_KEY, address or host)
        for _, name in socket.if_nameindex():
            # An interface may have no IPv4 address.
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(reply[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
