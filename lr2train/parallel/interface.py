"""Which network interface gloo and nccl use between machines: the interface on the route to MASTER_ADDR.

Choice: gloo binds to the address of the host name, and many machines resolve their own name to 127.0.0.1, which no
other machine can reach. The launcher's MASTER_ADDR is reachable from every machine, so each rank asks the kernel for
the route there and sets ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` for its own process. A variable of the user
stays, also one in nccl's configuration files. The route is asked for by connecting a UDP socket, which sends nothing.
Cost: nccl's own choice of several interfaces for plain TCP is narrowed to one; InfiniBand and other RDMA traffic does
not depend on the variable.

On the machine of rank 0 the name in MASTER_ADDR may mean 127.0.0.1 too. Such a route says nothing about the other
machines, so the interface of the default route is taken there.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_FAR = (
    "192.0.2.1",
    "2001:db8::1",
)  # addresses for documentation (RFC 5737, RFC 3849): only the default route leads there
_NCCL_FILES = ("~/.nccl.conf", "/etc/nccl.conf")

Addresses = Mapping[str, Sequence[Any]]
"""Interface -> its addresses, as ``psutil.net_if_addrs`` returns them."""


def choose_interface(master: str) -> None:
    """Set the interface of gloo and of nccl in this process's environment, where the user set none.

    Call before the process group exists, in a job of several machines.

    Args:
        master: the name or address of rank 0's machine (MASTER_ADDR).
    """
    unset = [name for name in (_GLOO, _NCCL) if not os.environ.get(name)]
    if _NCCL in unset and _in_nccl_files():
        unset.remove(_NCCL)
    found = interface_to(master) if unset else None
    if found is None:
        return
    values = {_GLOO: found, _NCCL: f"={found}"}  # "=": nccl would take a bare name for a prefix
    chosen = {name: values[name] for name in unset}
    os.environ.update(chosen)
    said = " ".join(f"{name}={value}" for name, value in chosen.items())
    logging.getLogger(__name__).debug("%s: on the route to MASTER_ADDR=%s", said, master)


def interface_to(
    master: str, addresses: Addresses | None = None, source: Callable[[str], str | None] | None = None
) -> str | None:
    """The interface on the route to ``master``; None where no interface can be told.

    Args:
        master: a host name or an address.
        addresses: of this machine; None asks the machine.
        source: the own address that packets to an address leave from; None asks the kernel.
    """
    addresses = psutil.net_if_addrs() if addresses is None else addresses
    for target in (*_resolved(master), *_FAR):
        own = (source or _source)(target)
        if own is not None and not ip_address(own).is_loopback:
            name = _interface_of(own, addresses)
            if name is not None:
                return name
    return None


def _resolved(host: str) -> Iterator[str]:
    """The addresses of a host, in the resolver's order."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return
    yield from (str(where[0]) for *_, where in found)


def _source(target: str) -> str | None:
    """The own address that packets to ``target`` leave from; None without a route. Nothing is sent."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((target, 9))
            return str(asking.getsockname()[0])
    except OSError:
        return None


def _interface_of(own: str, addresses: Addresses) -> str | None:
    """The interface with this address; an IPv6 address may carry its interface as ``%eth0``."""
    wanted = ip_address(own.partition("%")[0])
    for name, ones in addresses.items():
        for one in ones:
            if one.family in (socket.AF_INET, socket.AF_INET6) and ip_address(one.address.partition("%")[0]) == wanted:
                return name
    return None


def _in_nccl_files() -> bool:
    """Whether one of nccl's configuration files names the interface."""
    files = [os.environ["NCCL_CONF_FILE"]] if os.environ.get("NCCL_CONF_FILE") else _NCCL_FILES
    for file in files:
        try:
            if any(line.strip().startswith(_NCCL) for line in Path(file).expanduser().read_text().splitlines()):
                return True
        except OSError:
            continue
    return False
