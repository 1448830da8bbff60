"""Who holds which tokens of a segment: index maps from (length, rank, size), and nothing else.

Choice: sequence parallelism is a transform of the data. Tokens, labels and positions are sharded by the same map before the model sees
them, so model code knows nothing of ranks; and because a layout takes two integers and no process group, one process can check all ranks.

``contiguous``  rank r holds tokens [r n, (r + 1) n) with n = length / size. What ``local`` and ``ulysses`` attention read.
``zigzag``      the segment is cut in 2 size blocks and rank r holds blocks r and 2 size - 1 - r, so that under a causal mask every rank
                of a ring has the same work. Cost: two pieces instead of one, and a length divisible by 2 size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lr2train.config import UserError

_BLOCKS_PER_RANK = {"contiguous": 1, "zigzag": 2}


@dataclass(frozen=True)
class Layout:
    """The part of a segment of ``length`` tokens that rank ``rank`` of ``size`` holds. Raises UserError when it cannot be cut evenly."""

    kind: Literal["contiguous", "zigzag"]
    length: int
    rank: int
    size: int

    def __post_init__(self) -> None:
        assert self.kind in _BLOCKS_PER_RANK, f"layout kind {self.kind!r} is none of {sorted(_BLOCKS_PER_RANK)}"
        assert 0 <= self.rank < self.size, f"rank {self.rank} is not inside a group of {self.size}"
        n_blocks = self._n_blocks
        if self.length % n_blocks:
            unit = "sp" if self.kind == "contiguous" else "2*sp"
            longer = -(-self.length // n_blocks) * n_blocks
            sp = next(n for n in range(self.size, 0, -1) if self.length % (n * _BLOCKS_PER_RANK[self.kind]) == 0 or n == 1)
            refused = f"segment_tokens={self.length} is not divisible by {unit}={n_blocks}"
            raise UserError(f"{refused}; set data.segment_tokens to {longer} or parallel.sp to {sp}")

    @property
    def indices(self) -> Tensor:
        """int64 [length / size]: the global positions of this rank's tokens, in the order in which it holds them."""
        return self.shard(torch.arange(self.length), 0)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x`` along ``dim`` (size ``length`` there). A view for a contiguous layout, a copy for zigzag."""
        assert x.shape[dim] == self.length, f"dim {dim} of {tuple(x.shape)} is not the layout's {self.length} tokens"
        blocks = x.chunk(self._n_blocks, dim)
        mine = [blocks[b] for b in self._blocks_of(self.rank)]
        return mine[0] if len(mine) == 1 else torch.cat(mine, dim)

    def gather(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole from all ranks' parts, in order of rank: the inverse of ``shard``. Pure: the parts are already here."""
        assert len(shards) == self.size, f"{len(shards)} shards for {self.size} ranks"
        blocks: list[Tensor] = [shards[0]] * self._n_blocks
        for rank, shard in enumerate(shards):
            owned = self._blocks_of(rank)
            for b, block in zip(owned, shard.chunk(len(owned), dim), strict=True):
                blocks[b] = block
        return torch.cat(blocks, dim)

    @property
    def _n_blocks(self) -> int:
        return self.size * _BLOCKS_PER_RANK[self.kind]

    def _blocks_of(self, rank: int) -> tuple[int, ...]:
        return (rank,) if self.kind == "contiguous" else (rank, 2 * self.size - 1 - rank)
