"""The mesh of ranks: world = data parallel (dp) x sequence parallel (sp).

Choice: ranks of one sequence-parallel group are consecutive, ``rank = dp_rank * sp_size + sp_rank``. Launchers number
the ranks of a node consecutively, and attention's exchange is the traffic that needs the fast links inside a node. A
rank without neighbours on an axis still gets a real process group, of one rank: to torch ``group=None`` means the whole
world, and would turn a reduction over one rank into a reduction over all ranks. Cost: every axis opens one communicator
for each of its groups.

Inside a sequence-parallel group the ranks may form a second mesh, ``sp_rank = ring_rank * ulysses_size +
ulysses_rank``. The ulysses axis, whose all-to-all is the heavier traffic, lies on consecutive ranks; the ring axis
joins the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lr2train.config import UserError


@dataclass(frozen=True)
class Mesh:
    """The place of this rank on both axes.

    Without torch.distributed both sizes are 1 and both groups are None. With torch.distributed neither group is None.
    """

    rank: int = 0
    world: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None  # the sp_size ranks that share this rank's segment, in order of sp_rank
    dp_group: dist.ProcessGroup | None = None  # the dp_size ranks with this sp_rank, in order of dp_rank
    ring_size: int = 1  # of the sp_size ranks, how many on the ring axis
    ring_group: dist.ProcessGroup | None = None  # in order of ring_rank; None where ring_size is 1
    ulysses_group: dist.ProcessGroup | None = None  # in order of ulysses_rank; the sp group where ring_size is 1

    @property
    def ulysses_size(self) -> int:
        """Ranks on the ulysses axis."""
        return self.sp_size // self.ring_size

    @property
    def ulysses_rank(self) -> int:
        """The place of this rank on the ulysses axis."""
        return self.sp_rank % self.ulysses_size

    @property
    def ring_rank(self) -> int:
        """The place of this rank on the ring axis."""
        return self.sp_rank // self.ulysses_size


def make_mesh(sp: int, timeout_s: float | None = None, ring: int = 1) -> Mesh:
    """The mesh of this process. A collective: every rank of the world calls it. Without torch.distributed the world is
    this process.

    Args:
        sp: ranks that share one segment.
        timeout_s: how long the new groups wait for a rank (``parallel.timeout_s``). None takes torch's default for the
            backend, because torch does not hand the world's own timeout down.
        ring: of the ``sp`` ranks, how many stand on the ring axis; sp / ring stand on the ulysses axis.

    Raises:
        UserError: sp does not divide the world, or ring does not divide sp.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if sp < 1 or world % sp:
        remedy = f"set parallel.sp to one of {_divisors(world)}"
        raise UserError(f"parallel.sp={sp} does not divide the {world} ranks of this launch; {remedy}")
    if ring < 1 or sp % ring:
        remedy = f"set parallel.ring to one of {_divisors(sp)}"
        raise UserError(f"parallel.ring={ring} does not divide parallel.sp={sp}; {remedy}")
    place = (rank, world, rank // sp, world // sp, rank % sp, sp)
    if not dist.is_initialized():
        return Mesh(*place)
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    segments = [list(range(first, first + sp)) for first in range(0, world, sp)]
    sp_group = _my_group(segments, timeout)
    dp_group = _my_group([list(range(first, world, sp)) for first in range(sp)], timeout)
    if ring == 1:
        return Mesh(*place, sp_group, dp_group, 1, None, sp_group)
    ulysses = sp // ring
    rings = [ranks[first::ulysses] for ranks in segments for first in range(ulysses)]
    ring_group = _my_group(rings, timeout)
    nodes = [ranks[first : first + ulysses] for ranks in segments for first in range(0, sp, ulysses)]
    ulysses_group = _my_group(nodes, timeout)
    return Mesh(*place, sp_group, dp_group, ring, ring_group, ulysses_group)


def _my_group(partition: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(partition, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # a partition: this rank is in one of them
    if dist.get_backend(group) == "nccl":
        # nccl opens a communicator at its first call, which all ranks must join. A ring's first transfer may not be
        # joined by all. Without a device the barrier would guess one from the rank, and open another device's.
        dist.barrier(group, device_ids=[torch.cuda.current_device()])
    return group


def _divisors(n: int) -> list[int]:
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]
