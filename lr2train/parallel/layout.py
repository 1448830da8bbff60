"""Which rank holds which tokens of a segment: index maps from (length, rank, size, documents).

Choice: sequence parallelism is a transform of the data. Tokens, labels and positions are sharded by one map before the
model sees them, so model code knows nothing of ranks. A layout takes integers and no process group, so one process can
check all ranks.

``contiguous``     rank r holds tokens [r n, (r + 1) n) with n = length / size. ``local``, ``ulysses`` and ``gather``
                   attention read this.
``zigzag``         a run of tokens is cut in 2 size chunks, and rank r holds chunks r and 2 size - 1 - r: under a causal
                   mask every rank has the same work. The run is the whole segment where that is even for its documents
                   (``spans``), as for one document that fills the segment. Else every document of some length is a run
                   of its own, and so are the tokens between two such documents (short documents and padding). Tokens
                   that do not divide are dealt out in turn, over all runs, so that shards have one size. Cost: two
                   chunks of each run, and a length divisible by 2 size.
``zigzag_nested``  for a mesh of ring x ulysses ranks: the ``inner`` consecutive ranks of one ulysses group cut one part
                   of a zigzag over size / inner ranks among them, contiguously. So the group together holds what one
                   rank of the ring would hold.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Literal, get_args

import torch
from torch import Tensor

from lr2train.config import UserError

Kind = Literal["contiguous", "zigzag", "zigzag_nested"]
Ranges = tuple[tuple[int, int], ...]
"""Half-open (start, stop) ranges of tokens."""

# A finer cut sends more. So the segment is not cut finer while the busiest rank exceeds the mean by at most this part
# of a rank's work of a segment that one document fills.
_EVEN = 0.0025
# Documents shorter than this part of the segment are not cut by themselves. However their lengths mix, a rank gets
# about this part of its work of a whole segment too much. Cutting them would mean ever smaller chunks of ever more
# documents, planned, sent and computed one by one.
_SHORT = 0.01


@dataclass(frozen=True)
class Layout:
    """The sequence shard of rank ``rank`` of ``size``: a part of a segment of ``length`` tokens.

    Attributes:
        kind: how the segment is cut.
        length: tokens of the segment.
        rank: whose shard.
        size: ranks that share the segment.
        inner: zigzag_nested: consecutive ranks that share one zigzag part.
        spans: zigzag, nested or not: the documents, sorted and disjoint. Without documents the segment is cut as one.

    Raises:
        UserError: ``length`` does not divide among the ranks.
    """

    kind: Kind
    length: int
    rank: int
    size: int
    inner: int = 1
    spans: Ranges = ()

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind), f"layout kind {self.kind!r} is none of {get_args(Kind)}"
        assert 0 <= self.rank < self.size, f"rank {self.rank} is not inside a group of {self.size}"
        assert self.size % self.inner == 0, f"{self.inner} inner ranks do not divide a group of {self.size}"
        assert self.inner == 1 or self.kind == "zigzag_nested", f"layout kind {self.kind!r} has no inner ranks"
        assert not self.spans or self.kind != "contiguous", "a contiguous layout does not depend on spans"
        if self.length % self._unit:
            name, unit = {"contiguous": "sp", "zigzag": "2*sp"}.get(self.kind, "2*sp"), self._unit
            longer = -(-self.length // unit) * unit
            sp = next(n for n in range(self.size, 0, -1) if n == 1 or self.length % (unit // self.size * n) == 0)
            refused = f"segment_tokens={self.length} is not divisible by {name}={unit}"
            raise UserError(f"{refused}; set data.segment_tokens to {longer} or parallel.sp to {sp}")

    @property
    def blocks(self) -> Ranges:
        """Half-open (start, stop) ranges of global positions that this rank holds, in ascending order."""
        return self.blocks_by_rank[self.rank]

    @cached_property
    def blocks_by_rank(self) -> tuple[Ranges, ...]:
        """``blocks`` of every rank, in order of rank."""
        share = self.length // self.size
        if self.kind == "contiguous":
            return tuple(((rank * share, (rank + 1) * share),) for rank in range(self.size))
        parts = _zigzag(self.length, self.size // self.inner, self.spans)
        return tuple(_cut(parts[rank // self.inner], rank % self.inner * share, share) for rank in range(self.size))

    @property
    def indices(self) -> Tensor:
        """int64 [length / size]: the global positions of this rank's tokens, in the order in which it holds them."""
        return self.shard(torch.arange(self.length), 0)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x`` along ``dim`` (``length`` entries there). A view for one block, a copy for more."""
        assert x.shape[dim] == self.length, f"dim {dim} of {tuple(x.shape)} is not the layout's {self.length} tokens"
        mine = [x.narrow(dim, start, stop - start) for start, stop in self.blocks]
        return mine[0] if len(mine) == 1 else torch.cat(mine, dim)

    def gather(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole segment from the shards of all ranks, in order of rank: the inverse of ``shard``. Sends nothing."""
        assert len(shards) == self.size, f"{len(shards)} shards for {self.size} ranks"
        found: dict[int, Tensor] = {}
        for blocks, shard in zip(self.blocks_by_rank, shards, strict=True):
            parts = shard.split([stop - start for start, stop in blocks], dim)
            found |= {start: part for (start, _), part in zip(blocks, parts, strict=True)}
        return torch.cat([found[start] for start in sorted(found)], dim)

    @property
    def _unit(self) -> int:
        """The length must be divisible by this. A nested part of two blocks is cut in 2 inner chunks: all cut alike."""
        return self.size if self.kind == "contiguous" else 2 * self.size


def _zigzag(length: int, size: int, spans: Ranges) -> tuple[Ranges, ...]:
    """The blocks of every rank, in ascending order: the coarsest cut that is even."""
    whole = _dealt([(0, length)], size)
    work = [_pairs(blocks, spans) for blocks in whole]
    is_even = max(work) * size - sum(work) <= _EVEN * length * (length + 1) / 2
    return whole if is_even else _dealt(_runs(length, spans), size)


def _runs(length: int, spans: Ranges) -> list[tuple[int, int]]:
    """Every document that is not short, and the tokens between two such documents."""
    runs, end = [], 0
    for start, stop in (*(span for span in spans if span[1] - span[0] >= _SHORT * length), (length, length)):
        runs += [run for run in ((end, start), (start, stop)) if run[0] < run[1]]
        end = stop
    return runs


def _dealt(runs: Sequence[tuple[int, int]], size: int) -> tuple[Ranges, ...]:
    """A zigzag over each run: up through the ranks with the low chunks of their shares, down with the high chunks."""
    held: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    turn = 0
    for at, stop in runs:
        base, extra = divmod(stop - at, size)
        shares = [base + ((rank - turn) % size < extra) for rank in range(size)]
        turn += extra
        # The odd token of a share goes to the low or the high chunk by turns. If all were low, the work of rank r would
        # exceed the work of rank 0 by r keys a query.
        lows = [(share + rank % 2) // 2 for rank, share in enumerate(shares)]
        for rank, n in (*enumerate(lows), *((rank, shares[rank] - lows[rank]) for rank in reversed(range(size)))):
            held[rank].append((at, at + n))
            at += n
    return tuple(_cut(blocks, 0, blocks[-1][1]) for blocks in held)


def _pairs(blocks: Ranges, spans: Ranges) -> int:
    """(query, key) pairs of the queries in ``blocks``: each query sees its document up to itself."""
    total = 0
    for first, last in blocks:
        begin, end = bisect_right(spans, first, key=itemgetter(1)), bisect_left(spans, last, key=itemgetter(0))
        for start, stop in spans[begin:end]:
            low, high = max(first, start), min(last, stop)
            total += (high - low) * (low + high + 1 - 2 * start) // 2
    return total


def _cut(blocks: Sequence[tuple[int, int]], first: int, n_tokens: int) -> Ranges:
    """Rows [first, first + n_tokens) of ``blocks`` laid end to end, as ranges of positions. Adjoining ranges join."""
    cut: list[tuple[int, int]] = []
    for start, stop in blocks:
        low, high = max(start, start + first), min(stop, start + first + n_tokens)
        if low < high and cut and cut[-1][1] == low:
            cut[-1] = (cut[-1][0], high)
        elif low < high:
            cut.append((low, high))
        first -= stop - start
    return tuple(cut)
