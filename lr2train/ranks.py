"""Which process of a job this is, and how many there are: the one definition.

Choice: the launcher's environment decides, because lines are printed and files are written before a process group
exists. A process group that was made by hand counts where the environment names one process. torch is not imported
here: corpora are prepared without it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lr2train.config import UserError


class PeerGone(RuntimeError):
    """Another rank has died, or has not answered within the time-out. No further message can be exchanged."""


def rank() -> int:
    """This process's global rank; 0 outside a launcher."""
    if _launched() > 1:  # a shell may still have the RANK of an old job
        return int(os.environ.get("RANK", 0))
    group = _group()
    return 0 if group is None else group.get_rank()


def world() -> int:
    """The number of processes of the job; 1 outside a launcher."""
    group = _group()
    return _launched() if _launched() > 1 or group is None else group.get_world_size()


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _group() -> Any:
    """``torch.distributed`` where its process group is initialised, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def refuse_environment() -> None:
    """Refuse a launcher's variable that is no number, such as one that a script has left empty.

    Raises:
        UserError: one of them is no whole number of at least 0.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"{name}={value} in the environment is no whole number of at least 0; unset or correct it")


def refuse_ranks(verb: str) -> None:
    """Refuse several ranks for a verb that works in one process: each rank would do the whole work and write the same
    files.

    Raises:
        UserError: a launcher, or its leftover in the environment, says that there are several ranks.
    """
    if world() > 1:
        raise UserError(
            f"{verb} was started on {world()} ranks (WORLD_SIZE), which would all write the same files; "
            "start it once, without a launcher and without WORLD_SIZE in the environment"
        )
