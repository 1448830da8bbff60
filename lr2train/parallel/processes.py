"""Join the job: device, network interface, process group, watchdog, CPU threads.

Works under any launcher that sets RANK and WORLD_SIZE, and without a launcher.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lr2train.config import Config, UserError
from lr2train.parallel import control, watchdog
from lr2train.parallel.interface import choose_interface
from lr2train.parallel.launcher import watch_launcher

_HERE, _MASTER = "lr2train/here", "lr2train/master"  # in the store
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}


def start(config: Config) -> torch.device:
    """Pick the device, join the process group (nccl on CUDA, gloo on CPU) and set this rank's CPU threads.

    Raises:
        UserError: CUDA is asked for and torch sees none.
    """
    device = pick_device(config.device)
    watch_launcher()
    # Under a launcher, the launcher sets OMP_NUM_THREADS.
    threads_by_user = "RANK" not in os.environ and "OMP_NUM_THREADS" in os.environ
    if not dist.is_initialized():
        _init_process_group(device, config.parallel.timeout_s)
    watchdog.watch_failures()
    if config.threads or not threads_by_user:  # on CUDA too: AdamW runs on the CPU where its states are offloaded
        torch.set_num_threads(config.threads or _my_cores())
    return device


def pick_device(wanted: str) -> torch.device:
    """The device for ``auto | cpu | cuda``; on CUDA the device of this rank.

    Raises:
        UserError: CUDA is asked for and torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda but torch sees no GPU; set device=cpu, or install a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def add_in_a_fixed_order() -> None:
    """Have torch and attention's kernels take operators that add in a fixed order, before the device computes.

    An operator that has no such form says so in a warning, and runs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]


def _init_process_group(device: torch.device, timeout_s: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # Bound to its device, nccl connects now, and subgroups are split from the first communicator. Without, barriers
    # guess a device from the rank.
    bound = device if device.type == "cuda" else None
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
        if int(os.environ.get("WORLD_SIZE", 1)) <= ranks_per_node():
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
            return
        # Of several machines: they tell each other in the store which address MASTER_ADDR has, before they connect.
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("default_pg", store)
        choose_interface(os.environ["MASTER_ADDR"], lambda mine: tell(store, rank, world, mine))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
        return
    os.environ.update(_ALONE)  # DeepSpeed reads them, with a launcher or without
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=bound)


def tell(store: dist.Store, rank: int, world: int, mine: Sequence[str]) -> Iterator[str]:
    """Write the addresses that MASTER_ADDR has for this rank; returns those of all ranks, each read when it is asked
    for, as soon as its rank has written it.
    """
    store.set(f"{_MASTER}/{rank}", " ".join(mine))
    return (one for other in range(world) for one in store.get(f"{_MASTER}/{other}").decode().split())


def _my_cores() -> int:
    """This rank's share of the cores: a core that several ranks of the machine may use counts in parts."""
    mine = (platform.node(), _allowed_cores())
    return shared_cores(mine, control.from_all(mine))


def shared_cores(mine: tuple[str, frozenset[int]], ranks: Sequence[tuple[str, frozenset[int]]]) -> int:
    """The cores of one rank among the ranks of a job, at least 1.

    Args:
        mine: (machine, cores that the rank may use).
        ranks: the same of every rank, this one's included.
    """
    users = Counter(core for machine, cores in ranks if machine == mine[0] for core in cores)
    return max(1, int(sum(Fraction(1, users[core]) for core in mine[1])))


def _allowed_cores() -> frozenset[int]:
    """The cores that this process may use; srun and containers may restrict them."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def ranks_per_node() -> int:
    """The number of the job's processes on this machine; without a launcher, all of them.

    torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    """
    told = next(
        (os.environ[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE") if os.environ.get(name)), None
    )
    return int(told) if told else dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all(limit_s: float) -> None:
    """Return when every rank has called this function, or after ``limit_s`` seconds. Nothing is raised.

    Before the ranks leave: a launcher ends the others as soon as one has left. The ranks meet in the store, because a
    barrier that is given up would break the process group.
    """
    if control.alone():
        return
    store = _get_default_store()
    with contextlib.suppress(RuntimeError):  # the time-out; or rank 0 has seen all, and its store is gone
        store.set(f"{_HERE}/{dist.get_rank()}", "")
        store.wait([f"{_HERE}/{number}" for number in range(dist.get_world_size())], timedelta(seconds=limit_s))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        watchdog.leave()  # rank 0's store may go before this rank
        dist.destroy_process_group()
