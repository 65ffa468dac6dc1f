"""How the processes of a job find each other, and by which network interface their machines do."""

import contextlib
import fcntl
import os
import socket
import struct
import time
import uuid

from plaintrain.utils.errors import UserError

_KEY = "plaintrain/address"
# Linux' ioctl for the address of an interface.
_SIOCGIFADDR = 0x8915


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
        host = store.get(_KEY).decode()
    address = _address_towards(host)
    if machine != 0:
        store.set(_KEY, address or host)
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
