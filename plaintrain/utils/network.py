"""The network interface by which the machines of a job reach each other."""

import contextlib
import fcntl
import os
import socket
import struct

_KEY = "plaintrain/address"
# Linux' ioctl for the address of an interface.
_SIOCGIFADDR = 0x8915


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
