"""Machines that are network namespaces joined by a bridge.

Each has an address and a host name, which it looks up as 127.0.1.1, as Debian writes it into /etc/hosts, and
knows the names of the others. Runs work in them, started by `launch` or by torchrun.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT, Run, write_config

_NEWNS, _NEWUTS, _NEWNET, _PRIVATE, _BIND = 0x20000, 0x4000000, 0x40000000, 0x44000, 0x1000
_IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class NotAllowedError(Exception):
    """This system lets nobody make network namespaces here; says why."""


def _ip(*arguments):
    done = subprocess.run([_IP, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"ip {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


class Machines:
    """A number of machines, until the end of a `with` block; their files are in a folder."""

    def __init__(self, number, folder):
        if _IP is None:
            raise NotAllowedError("there is no ip (Debian's package iproute2)")
        pid = os.getpid()
        self._prefix, self._folder = f"plaintrain-{pid}", Path(folder)
        net = f"10.{64 + pid // 256 % 128}.{pid % 256}"
        self.names = [f"host{k}" for k in range(number)]
        self.addresses = [f"{net}.{k + 1}" for k in range(number)]
        self._port = 20000 + pid % 10000

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_):
        self._remove()

    def _make(self):
        # The bridge is in a namespace too: no rule of this machine's firewall holds there.
        switch = f"{self._prefix}-switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for k, address in enumerate(self.addresses):
            space = self.space(k)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            ends = ["wire", "type", "veth", "peer", "name", f"port{k}", "netns", switch]
            _ip("-n", space, "link", "add", *ends)
            _ip("-n", switch, "link", "set", f"port{k}", "master", "bridge", "up")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "wire")
            self.set_network(k, "up")
            others = zip(self.addresses, self.names, strict=True)
            rows = ["127.0.0.1 localhost", f"127.0.1.1 {self.names[k]}"]
            rows += [f"{a} {name}" for a, name in others if a != address]
            self.home(k).mkdir()
            (self._folder / f"hosts-{k}").write_text("\n".join(rows) + "\n")

    def _remove(self):
        for name in (f"{self._prefix}-switch", *map(self.space, range(len(self.names)))):
            _remove(name)

    def space(self, k):
        """Return the name of the network namespace of machine k."""
        return f"{self._prefix}-{k}"

    def home(self, k):
        """Return the home folder of machine k."""
        return self._folder / self.names[k]

    def pids(self, k):
        """Return the processes at work on machine k."""
        return [int(pid) for pid in _ip("netns", "pids", self.space(k)).split()]

    def wait_for_the_end(self, timeout):
        """Wait until no process is left on any machine."""
        begin = time.monotonic()
        while any(left := [self.pids(k) for k in range(len(self.names))]):
            assert time.monotonic() - begin < timeout, f"after {timeout} s these are left: {left}"
            time.sleep(0.1)

    def kill(self, k, but=None):
        """Kill all processes of machine k, but one."""
        for pid in {*self.pids(k)} - {but}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def set_network(self, k, state):
        """Unplug the network of machine k, "down", or plug it in again, "up"."""
        _ip("-n", self.space(k), "link", "set", "wire", state)

    def free_port(self):
        """Return a port that no run so far has been given."""
        self._port += 1
        return self._port

    def enter(self, k):
        """Move this process, and what it will start, to machine k."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.space(k)}") as space:
            done = [libc.setns(space.fileno(), _NEWNET), libc.unshare(_NEWNS | _NEWUTS)]
        hosts = str(self._folder / f"hosts-{k}").encode()
        done += [
            libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None),
            libc.mount(hosts, b"/etc/hosts", None, ctypes.c_ulong(_BIND), None),
        ]
        socket.sethostname(self.names[k])
        os.environ["HOME"] = str(self.home(k))
        if any(done):
            raise OSError(ctypes.get_errno(), f"cannot enter machine {k}: {done}")


def _remove(name):
    with contextlib.suppress(NotAllowedError):
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)


# ---- runs on them -----------------------------------------------------------------------------------


def _torchrun(machines, k, arguments):
    machines.enter(k)
    from torch.distributed.run import main

    main(arguments)
    sys.exit(0)


def start(machines, folders, options, *, flags=(), num_gpus=1):
    """Start the script on every machine, each with its OUTPUT_DIR; returns a `Run` for each."""
    url = f"tcp://{machines.names[0]}:{machines.free_port()}"
    launch = [*flags, "--num-machines", len(folders), "--dist-url", url, "--machine-rank"]
    runs = []
    for k, folder in enumerate(folders):
        in_machine = functools.partial(machines.enter, k)
        runs.append(Run(folder, options, flags=[*launch, k], faults=in_machine, ranks=num_gpus))
    return runs


def start_torchrun(machines, k, port, folder, options):
    """Start the script on machine k of two, by torchrun; returns a `Run`."""
    config = write_config(Path(folder).parent)
    arguments = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    arguments += ["--rdzv-endpoint", f"{machines.names[0]}:{port}", "--monitor-interval", "0.1"]
    arguments += [str(ROOT / "scripts" / "plain_train_net.py"), "--config-file"]
    arguments += [str(config), "--resume", "OUTPUT_DIR", str(folder)]
    arguments += map(str, options)
    return Run(folder, [], faults=functools.partial(_torchrun, machines, k, arguments))
