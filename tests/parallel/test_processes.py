"""Joining a job: which interface gloo uses, which device nccl is bound to, how the cores of a machine are shared."""

import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from lr2train.parallel import control, processes
from lr2train.parallel.processes import shared_cores


def gloo_asks_for_the_interface(rank: int, world: int) -> str:
    """The error of the control messages' group where gloo is told to use an interface that does not exist."""
    os.environ["GLOO_SOCKET_IFNAME"] = "none0"
    with pytest.raises(RuntimeError) as raised:
        control.from_all(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return str(raised.value)


def test_the_group_of_control_messages_uses_the_chosen_interface(tmp_path):
    for said in run_ranks(gloo_asks_for_the_interface, 2, tmp_path=tmp_path):
        assert "none0" in said


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "9", "MASTER_ADDR": "node1"}, ["node1"]),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "RANK": "1", "MASTER_ADDR": "node1"}, []),  # one machine
        ({}, []),  # no launcher
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:3"])
def test_several_machines_choose_an_interface_and_nccl_is_bound_to_its_device(environ, asked, device):
    joined, routes = mock.Mock(), []
    with (
        mock.patch.dict(os.environ, environ),
        mock.patch.object(dist, "init_process_group", joined),
        mock.patch.object(processes, "choose_interface", lambda master, tell: routes.append(master)),
        mock.patch.object(dist, "rendezvous", return_value=iter([(dist.HashStore(), 9, 16)])),
    ):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "RANK", "MASTER_ADDR"):
            if name not in environ:
                os.environ.pop(name, None)
        processes._init_process_group(torch.device(device), 60.0)
    assert routes == asked
    (backend,), keys = joined.call_args
    assert backend == ("gloo" if device == "cpu" else "nccl")
    assert keys["device_id"] == (None if device == "cpu" else torch.device("cuda", 3))
    assert keys["timeout"] == timedelta(seconds=60)


ALL, HALF = frozenset(range(16)), [frozenset(range(8)), frozenset(range(8, 16))]


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [
        ([("a", ALL)], [16]),
        ([("a", ALL)] * 2 + [("b", ALL)], [8, 8, 16]),
        ([("a", HALF[0]), ("a", HALF[1])], [8, 8]),  # srun binds each task to cores of its own
        ([("a", ALL)] * 32, [1] * 32),
        ([("a", ALL), ("a", HALF[0])], [12, 4]),
    ],
)
def test_ranks_share_the_cores_of_their_machine(ranks, shares):
    assert [shared_cores(one, ranks) for one in ranks] == shares


@given(st.lists(st.tuples(st.sampled_from("ab"), st.frozensets(st.integers(0, 9), min_size=1)), min_size=1))
def test_no_core_is_given_twice(ranks):
    for machine in "ab":
        here = [one for one in ranks if one[0] == machine]
        shares = [shared_cores(one, ranks) for one in here]
        assert all(1 <= share <= len(cores) for share, (_, cores) in zip(shares, here, strict=True))
        # A rank gets one thread even where its share is smaller.
        assert sum(share for share in shares if share > 1) <= len(frozenset().union(*(cores for _, cores in here)))


def threads_of(rank: int, world: int) -> int:
    """The threads of a rank that says it computes on CUDA; torch.cuda is not touched."""
    from lr2train.cli.composition import compose

    with (
        mock.patch.object(processes, "pick_device", return_value=torch.device("cuda", rank)),
        mock.patch.object(processes, "_allowed_cores", return_value=frozenset(range(6))),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("OMP_NUM_THREADS", None)  # of the user
        processes.start(compose("train", ["name=x", "device=cuda"]))
    processes.watchdog.leave()
    return torch.get_num_threads()


def test_cpu_threads_are_shared_under_cuda_too(tmp_path):
    assert run_ranks(threads_of, 2, tmp_path=tmp_path) == [3, 3]
