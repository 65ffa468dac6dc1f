"""The processes of a job, as the command line, torchrun or Slurm has started them, and how they meet."""

import contextlib
import fcntl
import os
import re
import socket
import struct
import time
import uuid

import torch

from plaintrain.utils.errors import UserError

_ADDRESS_KEY = "plaintrain/address"
# Linux' ioctl for the address of an interface.
_SIOCGIFADDR = 0x8915


def find_job(num_gpus, num_machines, machine_rank, dist_url):
    """Return the job that this process is part of.

    Args:
        num_gpus, num_machines, machine_rank, dist_url: see `plaintrain.engine.launch.launch`.

    Returns:
        A dict of `world_size`, `local_size`, `machine`, `address` ((host, port), or None where torchrun
        knows it); of a process that was started as one of several, also `rank` and `local_rank`, else
        `first_rank`, that of the first process of this machine.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 and "RANK" in env:
        job = _torchrun_job(env)
        started = f"torchrun has started {job['local_size']} processes on this machine"
    # sbatch sets SLURM_NTASKS and SLURM_PROCID for its script too; only srun starts that many.
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        job = _slurm_job(env, dist_url)
        started = f"srun has started {job['local_size']} processes on this machine"
    else:
        job = _described_job(num_gpus, num_machines, machine_rank, dist_url)
        started = f"--num-gpus is {num_gpus}"
    if num_gpus not in (1, job["local_size"]):
        raise UserError(f"--num-gpus is {num_gpus}, but {started}; leave --num-gpus out")
    if torch.cuda.is_available() and job.get("local_rank", num_gpus - 1) >= torch.cuda.device_count():
        raise UserError(f"{started}, but this machine has {torch.cuda.device_count()} GPU(s)")
    return job


def _described_job(num_gpus, num_machines, machine_rank, dist_url):
    """Return the job that the command line describes."""
    if num_gpus < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank} do "
            "not fit together: the first two are at least 1, and the rank is below the machines"
        )
    if dist_url == "auto" and num_machines > 1:
        raise UserError("several machines need --dist-url tcp://HOST:PORT of machine 0")
    return {
        "world_size": num_gpus * num_machines,
        "local_size": num_gpus,
        "first_rank": num_gpus * machine_rank,
        "address": ("127.0.0.1", _free_port()) if dist_url == "auto" else _parse_url(dist_url),
        "machine": machine_rank,
    }


def _torchrun_job(env):
    return {
        "rank": int(env["RANK"]),
        "world_size": int(env["WORLD_SIZE"]),
        "local_rank": int(env.get("LOCAL_RANK", 0)),
        "local_size": int(env.get("LOCAL_WORLD_SIZE", 1)),
        "machine": int(env.get("GROUP_RANK", 0)),
        "address": None,
    }


def _slurm_job(env, dist_url):
    node = int(env.get("SLURM_NODEID", 0))
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", ""))
    # Every task computes the same port; jobs beside this one get another.
    port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
    return {
        "rank": int(env["SLURM_PROCID"]),
        "world_size": int(env["SLURM_NTASKS"]),
        "local_rank": int(env.get("SLURM_LOCALID", 0)),
        "local_size": _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[node],
        "machine": node,
        "address": (host, int(port)) if dist_url == "auto" else _parse_url(dist_url),
    }


def _tasks_per_node(text):
    """Return Slurm's short form as a list: `2(x3),1` is 2, 2, 2, 1."""
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks


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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agree_on_prefix(store, rank, world_size, timeout):
    """Return a prefix for the keys of this job alone, the same on all of its ranks.

    The store of torchrun's agents outlives the ranks that they start again, with the addresses and failures
    of those before, and the agents do not count the starts alike. Rank 0 waits for the others for `timeout`
    seconds.
    """
    if rank != 0:
        # What rank 0 answers to a question of this very process is not from an earlier start.
        question = uuid.uuid4().hex
        store.set(f"plaintrain/asks/{rank}", question)
        prefix = store.get(f"plaintrain/answer/{question}").decode()
        store.set(f"{prefix}here/{rank}", "")
        return prefix
    prefix = f"plaintrain/{uuid.uuid4().hex}/"
    end = time.monotonic() + timeout
    for other in range(1, world_size):
        while not store.check([f"{prefix}here/{other}"]):
            if time.monotonic() > end:
                raise UserError(f"rank {other} of {world_size} has not come within {timeout:g} s")
            if store.check([f"plaintrain/asks/{other}"]):
                question = store.get(f"plaintrain/asks/{other}").decode()
                store.set(f"plaintrain/answer/{question}", prefix)
            time.sleep(0.05)
    return prefix


def choose_interface(store, machine, host):
    """Let gloo use the interface from which this machine reaches the others, unless GLOO_SOCKET_IFNAME says.

    Gloo would tell the others the address that this machine's own name has here, which is often one of the
    loopback, such as Debian's 127.0.1.1. `host` is the name or address of machine 0.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if machine == 0:
        # Its own name says nothing here either: the route to another machine does.
        host = store.get(_ADDRESS_KEY).decode()
    address = _address_towards(host)
    if machine != 0:
        store.set(_ADDRESS_KEY, address or host)
    for _, name in socket.if_nameindex() if address else ():
        if _ipv4_of(name) == address:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(host):
    """Return the IPv4 address of this machine that `host` is reached from, "" if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        # For UDP, this looks up the route and sends nothing.
        s.connect((host, 9))
        return s.getsockname()[0]
    return ""


def _ipv4_of(interface):
    """Return the IPv4 address of an interface, "" if it has none."""
    request = struct.pack("256s", interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(s.fileno(), _SIOCGIFADDR, request)[20:24])
    return ""
