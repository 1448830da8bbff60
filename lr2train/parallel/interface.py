"""Which network interface gloo and nccl use between machines: the interface on the route to MASTER_ADDR.

Choice: gloo binds to the address of the host name, and many machines resolve their own name to 127.0.0.1, which no
other machine can reach. The launcher's MASTER_ADDR is reachable from every machine, so each rank asks the kernel for
the route there and sets ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` for its own process. A variable of the user
stays, also one in nccl's configuration files. The route is asked for by connecting a UDP socket, which sends nothing.
Cost: nccl's own choice of several interfaces for plain TCP is narrowed to one; InfiniBand and other RDMA traffic does
not depend on the variable.

On the machine of rank 0 the name in MASTER_ADDR may mean 127.0.0.1. The other machines know better: every rank writes
the address that MASTER_ADDR has for it into the job's store, and the interface with such an address is taken. Only
where no rank tells one, it is the interface of the default route.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from itertools import chain
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

Source = Callable[[str], str]
"""An address -> the own address that packets to it leave from; raises OSError without a route."""


def choose_interface(master: str, tell: Callable[[Sequence[str]], Iterable[str]] = lambda _: ()) -> None:
    """Set the interface of gloo and of nccl in this process's environment, where the user set none.

    Call before the process group exists, in a job of several machines.

    Args:
        master: the name or address of rank 0's machine (MASTER_ADDR).
        tell: called once, with the addresses that ``master`` has here; returns those that it has for all ranks.
    """
    others = tell(_resolved(master))  # even where the user chose: other machines may need them
    unset = [name for name in (_GLOO, _NCCL) if not os.environ.get(name)]
    if _NCCL in unset and _in_nccl_files():
        unset.remove(_NCCL)
    found = reachable_interface(master, others) if unset else None
    if found is None:
        return
    values = {_GLOO: found, _NCCL: f"={found}"}  # "=": nccl would take a bare name for a prefix
    chosen = {name: values[name] for name in unset}
    os.environ.update(chosen)
    said = " ".join(f"{name}={value}" for name, value in chosen.items())
    logging.getLogger(__name__).debug("%s: on the route to MASTER_ADDR=%s", said, master)


def reachable_interface(
    master: str, others: Iterable[str] = (), addresses: Addresses | None = None, source: Source | None = None
) -> str | None:
    """The interface on the route to ``master`` that other machines can reach; None where no interface can be told.

    Args:
        master: a host name or an address.
        others: addresses that ``master`` has for other machines; read where the first ones do not do.
        addresses: of this machine; None asks the machine.
        source: the own address that packets to an address leave from; None asks the kernel.
    """
    addresses = psutil.net_if_addrs() if addresses is None else addresses
    for target in chain(_resolved(master), others, _FAR):
        with contextlib.suppress(OSError):
            name = interface_to(target, addresses, source)
            if name is not None and not is_loopback(name, addresses):
                return name
    return None


def interface_to(host: str, addresses: Addresses | None = None, source: Source | None = None) -> str | None:
    """The interface that packets to a host leave by, the loopback interface included; None where no interface has the
    address that they leave from.

    Raises:
        OSError: the name has no address, or there is no route.
    """
    addresses = psutil.net_if_addrs() if addresses is None else addresses
    refused = OSError("the name has no address")
    for target in _resolved(host):
        try:
            return _interface_of((source or _source)(target), addresses)
        except OSError as error:
            refused = error
    raise refused


def is_loopback(name: str, addresses: Addresses) -> bool:
    """Whether an interface leads to its own machine alone."""
    return any(ip_address(one).is_loopback for one in _internet(addresses.get(name, ())))


def _resolved(host: str) -> list[str]:
    """The addresses of a host, in the resolver's order; none where the name is not known."""
    try:
        return [str(where[0]) for *_, where in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)]
    except OSError:
        return []


def _source(target: str) -> str:
    """The own address that packets to ``target`` leave from. Nothing is sent.

    Raises:
        OSError: there is no route.
    """
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect((target, 9))
        return str(asking.getsockname()[0])


def _interface_of(own: str, addresses: Addresses) -> str | None:
    """The interface with this address; an IPv6 address may carry its interface as ``%eth0``."""
    wanted = ip_address(own.partition("%")[0])
    return next((name for name, ones in addresses.items() if wanted in map(ip_address, _internet(ones))), None)


def _internet(ones: Sequence[Any]) -> Iterator[str]:
    """The IPv4 and IPv6 addresses of an interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return (one.address.partition("%")[0] for one in ones if one.family in families)


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
