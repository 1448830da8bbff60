"""The mesh of ranks: world = data parallel (dp) x sequence parallel (sp).

Choice: ranks of one sequence-parallel group are consecutive, ``rank = dp_rank * sp_size + sp_rank``, because launchers number the ranks of
a node consecutively and attention's exchange is the traffic that wants the fast links inside a node. A rank with one neighbour or none
still gets real process groups (of one rank): to torch, ``group=None`` means the whole world, and a mesh that said ``None`` would turn a
reduction over one rank into one over all. Cost: every axis opens one communicator for each of its groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lr2train.config import UserError


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands on both axes. Without torch.distributed both sizes are 1 and both groups None; with it neither is None."""

    rank: int = 0
    world: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None  # the sp_size ranks that share this rank's segment, in order of sp_rank
    dp_group: dist.ProcessGroup | None = None  # the dp_size ranks that hold the same shard of other segments, in order of dp_rank


def make_mesh(sp: int, timeout_s: float | None = None) -> Mesh:
    """The mesh of this process, with ``sp`` ranks sharing one segment. A collective: every rank of the world calls it.

    ``timeout_s`` is how long the new groups wait for a rank (``parallel.timeout_s``); None takes torch's default for the backend, for torch
    does not hand the world's own timeout down. Without torch.distributed the world is this process. Raises UserError when sp does not
    divide the world.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if sp < 1 or world % sp:
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(f"parallel.sp={sp} does not divide the {world} ranks of this launch; set parallel.sp to one of {divisors}")
    sp_group, dp_group = _groups(sp, world, timeout_s) if dist.is_initialized() else (None, None)
    return Mesh(rank, world, rank // sp, world // sp, rank % sp, sp, sp_group, dp_group)


def _groups(sp: int, world: int, timeout_s: float | None) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    of_sp = [list(range(first, first + sp)) for first in range(0, world, sp)]
    of_dp = [list(range(first, world, sp)) for first in range(sp)]
    sp_group, _ = dist.new_subgroups_by_enumeration(of_sp, timeout=timeout)
    dp_group, _ = dist.new_subgroups_by_enumeration(of_dp, timeout=timeout)
    assert isinstance(sp_group, dist.ProcessGroup)  # this rank is in one group of each kind
    assert isinstance(dp_group, dist.ProcessGroup)
    return sp_group, dp_group
