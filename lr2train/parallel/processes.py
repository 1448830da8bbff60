"""Join the job: device, process group, CPU threads.

Works under any launcher that sets RANK and WORLD_SIZE, and without a launcher.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lr2train.config import Config, UserError
from lr2train.parallel.launcher import watch_launcher

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
    if device.type == "cpu" and (config.threads or not threads_by_user):
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks_per_node()))
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


def _init_process_group(device: torch.device, timeout_s: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    os.environ.update(_ALONE)  # DeepSpeed reads them, with a launcher or without
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def ranks_per_node() -> int:
    """The number of the job's processes on this machine; without a launcher, all of them.

    torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    """
    told = next(
        (os.environ[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE") if os.environ.get(name)), None
    )
    return int(told) if told else dist.get_world_size() if dist.is_initialized() else 1


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
