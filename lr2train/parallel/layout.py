"""Who holds which tokens of a segment: index maps from (length, rank, size), and nothing else.

Choice: sequence parallelism is a transform of the data. Tokens, labels and positions are sharded by the same map before the model sees
them, so model code knows nothing of ranks; and because a layout takes integers and no process group, one process can check all ranks.

``contiguous``     rank r holds tokens [r n, (r + 1) n) with n = length / size. What ``local``, ``ulysses`` and ``gather`` attention read.
``zigzag``         the segment is cut in 2 size blocks and rank r holds blocks r and 2 size - 1 - r, so that under a causal mask every rank
                   of a ring has the same work. Cost: two pieces instead of one, and a length divisible by 2 size.
``zigzag_nested``  for a mesh of rings x ulysses: the ``inner`` consecutive ranks of one ulysses group cut one zigzag part (of
                   size / inner) among them, contiguously, so that the group together holds what one rank of the ring would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lr2train.config import UserError

Kind = Literal["contiguous", "zigzag", "zigzag_nested"]


@dataclass(frozen=True)
class Layout:
    """The part of a segment of ``length`` tokens that rank ``rank`` of ``size`` holds. Raises UserError when it cannot be cut evenly."""

    kind: Kind
    length: int
    rank: int
    size: int
    inner: int = 1  # zigzag_nested: consecutive ranks that share one zigzag part

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind), f"layout kind {self.kind!r} is none of {get_args(Kind)}"
        assert 0 <= self.rank < self.size, f"rank {self.rank} is not inside a group of {self.size}"
        assert self.size % self.inner == 0, f"{self.inner} inner ranks do not divide a group of {self.size}"
        assert self.inner == 1 or self.kind == "zigzag_nested", f"layout kind {self.kind!r} has no inner ranks"
        if self.length % self._unit:
            name, unit = {"contiguous": "sp", "zigzag": "2*sp"}.get(self.kind, "2*sp"), self._unit
            longer = -(-self.length // unit) * unit
            sp = next(n for n in range(self.size, 0, -1) if n == 1 or self.length % (unit // self.size * n) == 0)
            refused = f"segment_tokens={self.length} is not divisible by {name}={unit}"
            raise UserError(f"{refused}; set data.segment_tokens to {longer} or parallel.sp to {sp}")

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Half-open (start, stop) ranges of global positions that this rank holds, in the order in which it holds them."""
        if self.kind == "contiguous":
            return (self._range(self.rank, self.size),)
        ring, place = self.size // self.inner, self.rank // self.inner
        low, high = self._range(place, 2 * ring), self._range(2 * ring - 1 - place, 2 * ring)
        share = self.length // self.size
        return _cut((low, high), self.rank % self.inner * share, share)

    @property
    def indices(self) -> Tensor:
        """int64 [length / size]: the global positions of this rank's tokens, in the order in which it holds them."""
        return self.shard(torch.arange(self.length), 0)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x`` along ``dim`` (size ``length`` there). A view for one block, a copy for two."""
        assert x.shape[dim] == self.length, f"dim {dim} of {tuple(x.shape)} is not the layout's {self.length} tokens"
        mine = [x.narrow(dim, start, stop - start) for start, stop in self.blocks]
        return mine[0] if len(mine) == 1 else torch.cat(mine, dim)

    def gather(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole from all ranks' parts, in order of rank: the inverse of ``shard``. Pure: the parts are already here."""
        assert len(shards) == self.size, f"{len(shards)} shards for {self.size} ranks"
        pieces: dict[int, Tensor] = {}
        for rank, shard in enumerate(shards):
            blocks = Layout(self.kind, self.length, rank, self.size, self.inner).blocks
            parts = shard.split([stop - start for start, stop in blocks], dim)
            pieces |= {start: part for (start, _), part in zip(blocks, parts, strict=True)}
        return torch.cat([pieces[start] for start in sorted(pieces)], dim)

    @property
    def _unit(self) -> int:
        """What the length must be divisible by. A nested part of two blocks is cut into 2 inner pieces, so that all ranks cut alike."""
        return self.size if self.kind == "contiguous" else 2 * self.size

    def _range(self, block: int, n_blocks: int) -> tuple[int, int]:
        tokens = self.length // n_blocks
        return block * tokens, (block + 1) * tokens


def _cut(blocks: Sequence[tuple[int, int]], first: int, n_tokens: int) -> tuple[tuple[int, int], ...]:
    """The ranges that rows [first, first + n_tokens) of ``blocks``, laid end to end, come from. Adjoining ones are joined."""
    cut: list[tuple[int, int]] = []
    for start, stop in blocks:
        low, high = max(start, start + first), min(stop, start + first + n_tokens)
        if low < high and cut and cut[-1][1] == low:
            cut[-1] = (cut[-1][0], high)
        elif low < high:
            cut.append((low, high))
        first -= stop - start
    return tuple(cut)
