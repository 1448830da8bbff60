"""The interface on the route to rank 0: with the interfaces of this machine, and with tables of other machines."""

import os
import socket
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch.distributed as dist

from lr2train.parallel import interface
from lr2train.parallel.interface import choose_interface, interface_to, reachable_interface
from lr2train.parallel.processes import tell

ROUTES = {  # as the kernel of a node answers; its own addresses are their own source
    "10.0.0.7": "10.0.0.7", "10.0.0.1": "10.0.0.7", "172.16.3.1": "172.16.3.7", "192.0.2.1": "10.0.0.7",
    "127.0.0.1": "127.0.0.1", "127.0.1.1": "127.0.0.1", "fe80::1": "fe80::7%ib0", "172.16.3.7": "172.16.3.7",
}  # fmt: skip


def source(target: str) -> str:
    """As the kernel answers on this node."""
    if target not in ROUTES:
        raise OSError("Network is unreachable")
    return ROUTES[target]


def address(value: str) -> SimpleNamespace:
    return SimpleNamespace(family=socket.AF_INET6 if ":" in value else socket.AF_INET, address=value)


NODE = {
    "lo": [address("127.0.0.1"), address("::1")],
    "docker0": [address("172.17.0.1")],
    "eth0": [SimpleNamespace(family=psutil.AF_LINK, address="02:fc:00:00:00:01"), address("10.0.0.7")],
    "ib0": [address("172.16.3.7"), address("fe80::7%ib0")],
}


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("10.0.0.1", "eth0"),  # another node
        ("10.0.0.7", "eth0"),  # rank 0's own node, by address
        ("172.16.3.1", "ib0"),  # the launcher names the address on the fast network
        ("fe80::1", "ib0"),
        ("127.0.1.1", "eth0"),  # rank 0's own node, by a name that means itself: the default route
    ],
)
def test_the_interface_on_the_route_to_rank_0(master, expected):
    assert reachable_interface(master, (), NODE, source) == expected


def test_where_the_name_of_rank_0_means_itself_the_other_machines_tell_its_address():
    """Rank 1, on another machine, reaches rank 0 by the fast network: rank 0 takes that and not the default route."""
    store = dist.HashStore()
    tell(store, 1, 3, ["172.16.3.7"])
    tell(store, 2, 3, ["172.16.3.7"])
    others = tell(store, 0, 3, ["127.0.1.1"])
    assert reachable_interface("127.0.1.1", others, NODE, source) == "ib0"
    # an address that is not this machine's, behind a translation of addresses
    assert reachable_interface("127.0.1.1", ["203.0.113.5"], NODE, source) == "eth0"


def test_a_machine_without_a_network_has_no_interface_to_choose():
    alone = {"lo": NODE["lo"]}
    assert reachable_interface("127.0.0.1", (), alone, source) is None
    assert interface_to("127.0.0.1", alone, source) == "lo"
    with pytest.raises(OSError, match="no address"):
        interface_to("no-such-host.invalid", NODE, source)
    with pytest.raises(OSError, match="unreachable"):
        interface_to("198.51.100.1", NODE, source)


def test_every_address_of_this_machine_is_found_on_its_own_interface():
    """The kernel routes to an own address from that address; nothing is sent."""
    found = psutil.net_if_addrs()
    for name, ones in found.items():
        for one in ones:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                assert interface_to(one.address) == name
    assert interface_to("127.0.0.1") in found
    assert reachable_interface("127.0.0.1") != interface_to("127.0.0.1")


def chosen(environ: dict[str, str], files=()) -> dict[str, str]:
    with (
        mock.patch.dict(os.environ, environ),
        mock.patch.object(interface, "_NCCL_FILES", files),
        mock.patch.object(interface, "reachable_interface", return_value="eth0"),
    ):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_CONF_FILE"):
            if name not in environ:
                os.environ.pop(name, None)
        choose_interface("node1")
        return {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def test_what_the_user_set_stays(tmp_path, caplog):
    with caplog.at_level("DEBUG", logger="lr2train"):
        assert chosen({}) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert [record.getMessage() for record in caplog.records] == [
        "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0: on the route to MASTER_ADDR=node1"
    ]
    assert chosen({"GLOO_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=eth0"}
    both = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "^docker0"}
    assert chosen(both) == both
    file = tmp_path / "nccl.conf"
    file.write_text("NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=ib0\n")
    assert chosen({}, [str(file)])["NCCL_SOCKET_IFNAME"] is None
    assert chosen({"NCCL_CONF_FILE": str(file)}) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": None}
