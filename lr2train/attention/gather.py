"""Gather: contiguous shards; each rank fetches the keys and values of the documents that began before its shard.

Most documents of a packed segment end in the shard in which they began. A rank needs, of the ranks before it, only the
beginning of its own first document (under a sliding window, only the tokens that its first token sees). The rank
fetches those rows, puts its own rows behind them and attends in one kernel call, with a causal mask aligned to the
bottom right. After Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2, which gathers all
keys and values.

Choice: the exchange is an all-to-all of uneven parts, in a few groups of key heads: while one group is computed with,
the next group travels. Rows arrive in the tensor that the kernel reads, before a copy of the rank's own rows, so both
take the memory of two groups. Gradients of fetched rows return to their owners in the same way, in the model's dtype.
They are summed in fp32 when all have come: they take the memory of all groups. Where no document crosses a border
nothing is sent. Cost: the last rank of a long document fetches and computes most, up to twice the mean when one
document fills the segment; ``ring`` and ``ulysses`` are even there.

Bytes that rank r sends for a layer, with need(a, b) = the rows of rank b's shard that rank a fetches:
    forward    2 Hkv D b  sum over a of need(a, r)
    backward   the same, and  2 Hkv D b  sum over a of need(r, a)
with b bytes an element. For one document of T tokens and n = T / sp:
    forward    2 Hkv D b n (sp - 1 - r)
    backward   2 Hkv D b n (sp - 1)
LLaMA3-8B (8 key heads of 128, bf16) at T = 128k, sp = 8: at most 448 MiB forward and 448 MiB backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention.blocks import Block, Queries
from lr2train.attention.kernel import backward_block, dense_last, forward_block
from lr2train.attention.recompute import kept
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.attention.tiles import Spans, Tile, touching
from lr2train.config import UserError
from lr2train.parallel.comm import counter, exchange_rows, resume
from lr2train.parallel.mesh import Mesh

_HEAD_GROUPS = 4  # at most: more would hide more of the exchange behind compute, in smaller messages and kernel calls


@dataclass(frozen=True, eq=False)
class Exchange:
    """The rows that a rank exchanges with every other rank, and the block that the rank computes.

    Fetched rows end at a shard border, so every shard gives a suffix: n rows of a rank are the shard's last n rows.

    Attributes:
        gives: for each rank, how many of this rank's rows that rank fetches.
        takes: for each rank, how many of that rank's rows this rank fetches.
        block: this rank's queries over [the fetched rows, its own rows].
        anyone: whether any rank of the group fetches anything. All ranks meet in the exchange, or none does.
    """

    gives: tuple[int, ...]
    takes: tuple[int, ...]
    block: Block
    anyone: bool

    @property
    def n_fetched(self) -> int:
        """Rows that this rank fetches."""
        return sum(self.takes)


class HeadGroup(NamedTuple):
    """Key heads [kv] with the query heads [q] that read them."""

    q: slice
    kv: slice


Fetch = Callable[[HeadGroup], tuple[Tensor, Tensor]]
"""head group -> (k, v) [n + T/sp, heads, D]: the n fetched rows, this rank's own behind them. Asked for in order."""

Give = Callable[[HeadGroup, Tensor], None]
"""(head group, gradients [n, 2, heads, D] of the fetched rows of k and v): sends them to the owners of the rows."""


@dataclass(frozen=True, eq=False)
class GatherAttention:
    """Attention of this rank's contiguous shard over fetched keys and values and its own."""

    exchange: Exchange
    group: dist.ProcessGroup | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]."""
        return _Gather.apply(q, k, v, scale, self)


def gather(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> GatherAttention:
    """This rank's attention."""
    return GatherAttention(segment.once(exchange_of, mesh.sp_rank, sliding_window), mesh.sp_group)


# ---- who fetches what: plain integers ----


def exchange_of(segment: PackedSegment, rank: int, sliding_window: int | None = None) -> Exchange:
    """The exchange of ``rank``. Pure."""
    sp, n = segment.sp, segment.shard_tokens
    reach = [_reach(segment.spans, other * n, sliding_window) for other in range(sp)]
    gives = tuple(_overlap(reach[other], other * n, rank * n, n) for other in range(sp))
    takes = tuple(_overlap(reach[rank], rank * n, other * n, n) for other in range(sp))
    block = Block(_tiles(segment.spans, rank * n, n, sum(takes)), sliding_window)
    return Exchange(gives, takes, block, any(start < other * n for other, start in enumerate(reach)))


def _reach(spans: Spans, border: int, sliding_window: int | None) -> int:
    """The first token before ``border`` that any token from ``border`` on sees; ``border`` where there is none."""
    continued = touching(spans, border, border + 1)
    if not continued or continued[0][0] == border:
        return border
    start = continued[0][0]
    return start if sliding_window is None else max(start, border - sliding_window + 1)


def _overlap(start: int, stop: int, first: int, n: int) -> int:
    """How many of the tokens [start, stop) lie in the shard [first, first + n)."""
    return max(0, min(stop, first + n) - max(start, first))


def _tiles(spans: Spans, first: int, n: int, n_fetched: int) -> tuple[Tile, ...]:
    """The queries of the shard [first, first + n) over the fetched rows and the shard's own rows.

    A document that began before the shard has as many more keys than queries as rows were fetched.
    """
    tiles = []
    for start, stop in touching(spans, first, first + n):
        q_start, q_stop = max(start, first) - first, min(stop, first + n) - first
        k_start = 0 if start < first else n_fetched + q_start  # only one document began before the shard
        tiles.append(Tile(q_start, q_stop, k_start, n_fetched + q_stop, 0))
    return tuple(tiles)


# ---- one rank's computation ----


def forward_rank(q: Tensor, n_kv_heads: int, exchange: Exchange, scale: float, fetch: Fetch) -> tuple[Tensor, Tensor]:
    """One rank's forward: out [T/sp, Hq, D], lse [T/sp, Hq]. ``fetch`` brings the keys and values."""
    outs, lses = [], []
    for group in head_groups(q.shape[1], n_kv_heads):
        # Keys and values get no name here: their memory must be free before the next group is asked for.
        out, lse = forward_block(q[:, group.q], *fetch(group), exchange.block, scale)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def backward_rank(
    queries: Queries, k: Tensor, v: Tensor, exchange: Exchange, scale: float, fetch: Fetch, give: Give
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's backward: dq, and the contributions of the rank's queries to dk and dv of its own rows, in fp32.

    Contributions to fetched rows leave through ``give``, in k's dtype.
    """
    dq = torch.empty_like(queries.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, dtype=queries.lse.dtype, memory_format=torch.contiguous_format) for x in (k, v))
    n = exchange.n_fetched
    for group in head_groups(dq.shape[1], k.shape[1]):
        grads = backward_block(queries.part(slice(None), group.q), *fetch(group), exchange.block, scale)
        give(group, torch.stack([grads[1][:n], grads[2][:n]], 1).to(k.dtype))
        dq[:, group.q], dk[:, group.kv], dv[:, group.kv] = grads[0].to(dq.dtype), grads[1][n:], grads[2][n:]
    return dq, dk, dv


def head_groups(n_heads: int, n_kv_heads: int) -> tuple[HeadGroup, ...]:
    """Key heads in at most four groups of nearly one size, each with the query heads that read them."""
    n_groups, readers = min(_HEAD_GROUPS, n_kv_heads), n_heads // n_kv_heads
    borders = pairwise(n_kv_heads * i // n_groups for i in range(n_groups + 1))
    return tuple(HeadGroup(slice(first * readers, last * readers), slice(first, last)) for first, last in borders)


# ---- on real ranks ----


class _Gather(torch.autograd.Function):
    """``forward_rank`` and ``backward_rank``, with the exchange on the process group."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, attention: GatherAttention) -> Tensor:
        """This rank's q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> out [T/sp, Hq, D].

        Kept for the backward: q, k, v, out and lse. Fetched keys are fetched again.
        """
        q, k, v = (dense_last(x) for x in (q, k, v))

        def compute() -> tuple[Tensor, Tensor]:
            arrivals = _Arrivals(q.shape[1], k, v, attention)
            return forward_rank(q, k.shape[1], attention.exchange, scale, arrivals.fetch)

        out, lse = kept(compute)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.attention, ctx.counts = scale, attention, counter()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [T/sp, Hq, D] -> dq [T/sp, Hq, D], dk and dv [T/sp, Hkv, D] of this rank's rows."""
        q, k, v, out, lse = ctx.saved_tensors
        with resume(ctx.counts):
            arrivals, returns = _Arrivals(q.shape[1], k, v, ctx.attention), _Returns(ctx.attention)
            queries = Queries(q, out, lse, dense_last(grad_out))
            dq, dk, dv = backward_rank(queries, k, v, ctx.attention.exchange, ctx.scale, arrivals.fetch, returns.give)
            returns.add_to(dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


class _Arrivals:
    """Keys and values by head group, one group ahead: the next group is in flight while one is computed with."""

    def __init__(self, n_heads: int, k: Tensor, v: Tensor, attention: GatherAttention) -> None:
        self.k, self.v, self.exchange, self.group = k, v, attention.exchange, attention.group
        self.to_start = iter(head_groups(n_heads, k.shape[1]))
        if self.exchange.anyone:
            self._start(next(self.to_start))

    def fetch(self, heads: HeadGroup) -> tuple[Tensor, Tensor]:
        """(k, v) [n + T/sp, heads, D], the fetched rows first; where n = 0, the rank's own rows without a copy."""
        if self.exchange.anyone:
            self.work.wait()
            arrived = self.arriving
            del self.arriving, self.leaving
            if (following := next(self.to_start, None)) is not None:
                self._start(following)
            if self.exchange.n_fetched:
                return arrived[:, 0], arrived[:, 1]
        return self.k[:, heads.kv], self.v[:, heads.kv]

    def _start(self, heads: HeadGroup) -> None:
        own, exchange, n = (self.k[:, heads.kv], self.v[:, heads.kv]), self.exchange, self.exchange.n_fetched
        parts = [torch.stack([x[len(x) - rows :] for x in own], 1) for rows in exchange.gives]
        self.leaving = torch.cat(parts)  # [given rows, 2, heads, D]
        del parts
        self.arriving = self.leaving.new_empty(n + len(self.k) if n else 0, *self.leaving.shape[1:])
        if n:
            self.arriving[n:, 0], self.arriving[n:, 1] = own
        self.work = exchange_rows(self.leaving, exchange.gives, self.arriving[:n], exchange.takes, self.group)


class _Returns:
    """Gradients on their way to the owners of the rows: sent and received ones, of all head groups until the end."""

    def __init__(self, attention: GatherAttention) -> None:
        self.exchange, self.group = attention.exchange, attention.group
        self.pending: list[tuple[HeadGroup, Tensor, dist.Work, Tensor]] = []

    def give(self, heads: HeadGroup, grads: Tensor) -> None:
        """Send the gradients [n, 2, heads, D] of the fetched rows to the ranks that own the rows."""
        if self.exchange.anyone:
            rows = grads.new_empty(sum(self.exchange.gives), *grads.shape[1:])
            work = exchange_rows(grads, self.exchange.takes, rows, self.exchange.gives, self.group)
            self.pending.append((heads, rows, work, grads))  # grads must live until they have left

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Wait, and add the received gradients to the last rows of dk and dv."""
        for heads, rows, work, _ in self.pending:
            work.wait()
            for part in rows.split(list(self.exchange.gives)):
                for grad, own in ((dk, part[:, 0]), (dv, part[:, 1])):
                    grad[len(grad) - len(part) :, heads.kv] += own


# ---- declarations ----


def _traffic(work: SegmentWork, rank: int) -> Traffic:
    """The formula of the module's docstring."""
    exchange = work.segment.once(exchange_of, rank, work.sliding_window)
    given, taken = sum(exchange.gives) * work.kv_row_bytes, exchange.n_fetched * work.kv_row_bytes
    return Traffic(given, given + taken)


def _pairs(work: SegmentWork, rank: int) -> int:
    return work.n_heads * work.segment.once(exchange_of, rank, work.sliding_window).block.pairs


def _refuse(work: SegmentWork) -> None:
    n_tokens, sp = work.segment.n_tokens, work.segment.sp
    if n_tokens % sp:
        remedy = f"set data.segment_tokens to {-(-n_tokens // sp) * sp}"
        raise UserError(f"segment_tokens={n_tokens} is not divisible by parallel.sp={sp}; {remedy}")


GATHER = Strategy("gather", gather, "contiguous", _refuse, _traffic, _pairs)
