"""Network interfaces, the one that leads to MASTER_ADDR, and what a multi-node run would trip over.

Choice: no packet is sent and no name is asked of a server but MASTER_ADDR and this host's own. A public address is
shown as such and not in digits, because the output is made to be pasted.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import psutil

from lr2train.diagnosis.findings import Findings
from lr2train.parallel.interface import interface_to, is_loopback

SECTION = "Network"
_CHOSEN_BY = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def look(found: Findings) -> None:
    """Note interfaces, the host name's address and the route to MASTER_ADDR."""
    stats = psutil.net_if_stats()
    for name, addresses in addresses_of_interfaces().items():
        found.note(SECTION, f"interface {name}", _interface(stats.get(name), addresses))
    for device, text in _infiniband().items():
        found.note(SECTION, f"InfiniBand {device}", text)
    _own_name(found)
    _master(found)
    _named_interfaces(found, set(stats))


def addresses_of_interfaces() -> dict[str, list[str]]:
    """Interface -> its IPv4 and IPv6 addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.partition("%")[0] for one in every if one.family in families]
        for name, every in psutil.net_if_addrs().items()
    }


def _interface(stats: object, addresses: list[str]) -> str:
    up = "up" if getattr(stats, "isup", False) else "down"
    speed = getattr(stats, "speed", 0)
    parts = [up, f"{speed / 1000:g} Gbit/s" if speed else "", f"MTU {getattr(stats, 'mtu', '?')}"]
    shown = dict.fromkeys(_shown(one) for one in addresses if not ipaddress.ip_address(one).is_link_local)
    return ", ".join([*filter(None, parts), *(shown or ["no address"])])


def _shown(address: str) -> str:
    """An address as it may be pasted: a public one without its digits."""
    one = ipaddress.ip_address(address)
    return address if one.is_private or one.is_loopback or one.is_link_local else f"a public IPv{one.version} address"


def _infiniband() -> dict[str, str]:
    """InfiniBand and RoCE ports -> state and rate, as the kernel tells."""
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    return {f"{port.parents[1].name}/{port.name}": f"{_line(port / 'state')}, {_line(port / 'rate')}" for port in ports}


def _line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return "?"


def _own_name(found: Findings) -> None:
    """Note what this host's name resolves to: a loopback address hides the host from other machines."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        found.note(SECTION, "host name resolves to", "nothing")
        return
    found.note(SECTION, "host name resolves to", _shown(address))


def _master(found: Findings) -> None:
    master = os.environ.get("MASTER_ADDR")
    if not master:
        found.note(SECTION, "MASTER_ADDR", "not set: no launcher, or one machine")
        return
    try:
        name = interface_to(master)
    except OSError as error:
        found.note(SECTION, "MASTER_ADDR", "no route")
        found.problem(
            f"MASTER_ADDR={_host(master)} cannot be reached ({error.strerror or error})",
            "set it to an address that this machine has a route to",
            stops=True,
        )
        return
    found.note(SECTION, "MASTER_ADDR", f"{_host(master)}, by interface {name or 'unknown'}")
    spread = int(os.environ.get("WORLD_SIZE", 1)) > _ranks_here()
    interfaces = psutil.net_if_addrs()
    if spread and name is not None and interfaces.keys() - {name} and is_loopback(name, interfaces):
        found.problem(
            f"MASTER_ADDR={_host(master)} leads to the loopback interface, and the job has ranks on other machines",
            "set it to an address of the first machine that the others reach",
            stops=True,
        )


def _host(master: str) -> str:
    try:
        return _shown(master)
    except ValueError:  # a name
        return master


def _ranks_here() -> int:
    told = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))
    return int(next(filter(None, told), 1))


def _named_interfaces(found: Findings, there: set[str]) -> None:
    """Name a variable that asks for an interface which this machine does not have."""
    for variable in _CHOSEN_BY:
        asked = os.environ.get(variable, "")
        if not asked or asked.startswith("^"):  # ^lo: all but these
            continue
        exact, names = asked.startswith("="), asked.lstrip("=").split(",")
        if not any(name == one if exact else one.startswith(name) for name in names for one in there):
            found.problem(
                f"{variable}={asked} names no interface of this machine",
                f"set {variable} to one of {', '.join(sorted(there - {'lo'}) or ['lo'])}",
                stops=True,
            )
