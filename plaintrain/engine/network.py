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
    """A prefix for the keys of this job alone, the same on all of its ranks.

    The store of torchrun's agents outlives the ranks that they start again, with the addresses and failures
    of those before, and the agents do not count the starts alike.

    Args:
        store: where the ranks meet.
        rank, world_size: this process' and their number.
        timeout: seconds that rank 0 waits for the others.

    Raises:
        UserError: on rank 0, if one does not come.
    """
    if rank != 0:
        # What rank 0 answers to a question of this very process is not from an earlier start.
        question = uuid.uuid4().hex
        store.set(f"plaintrain/asks/{rank}", question)
        prefix = store.get(f"plaintrain/answer/{question}").decode()
        store.set(f"{prefix}here/{rank}", "")
        return prefix
    prefix, end, missing = f"plaintrain/{uuid.uuid4().hex}/", time.monotonic() + timeout, range(1, world_size)
    while missing := [other for other in missing if not store.check([f"{prefix}here/{other}"])]:
        if time.monotonic() > end:
            raise UserError(f"rank {missing[0]} of {world_size} has not come within {timeout:g} s")
        for other in missing:
            if store.check([f"plaintrain/asks/{other}"]):
                question = store.get(f"plaintrain/asks/{other}").decode()
                store.set(f"plaintrain/answer/{question}", prefix)
        time.sleep(0.05)
    return prefix


def choose_interface(store, machine, host):
    """Let gloo use the interface from which this machine reaches the others, unless GLOO_SOCKET_IFNAME says.

    Gloo would tell the others the address that this machine's own name has here, which is often one of the
    loopback, such as Debian's 127.0.1.1.

    Args:
        store: the job's store.
        machine: this machine's number.
        host: name or address of machine 0, where the store is.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if machine == 0:
        # Its own name says nothing here either: the route to another machine does.
        host = store.get(_KEY).decode()
    address = address_towards(host)
    if machine != 0:
        store.set(_KEY, address or host)
    name = interface_of(address)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def address_towards(host):
    """The address of this machine that `host` is reached from, "" where none is."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            # Of UDP, this looks up the route and sends nothing.
            s.connect(address)
            return s.getsockname()[0]
    except OSError:
        return ""


def interface_of(address):
    """The name of the interface that has an IPv4 address, "" where none is found."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        wanted = socket.inet_aton(address)
        for _, name in socket.if_nameindex():
            if _ipv4_of(s, name) == wanted:
                return name
    return ""


def _ipv4_of(s, name):
    try:
        return fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]
    except OSError:
        # It has none.
        return b""
