"""Gather: contiguous shards, and each rank fetches the keys and values of the documents that began before its shard.

For packed segments most documents end where they began, in one shard. A rank needs, of the ranks before it, only what its first document
has there (under a sliding window, only what its first token sees); it fetches those rows, puts its own behind them and attends in one
kernel call, a causal mask aligned to the bottom right where queries are fewer than keys. After Grattafiori et al., "The Llama 3 Herd of
Models", arXiv 2407.21783, section 3.3.2, which gathers all keys and values.

Choice: the exchange is an all-to-all of uneven parts in a few groups of key heads: while one group is computed with, the next is on its
way. Rows arrive where they are computed with, before a copy of the rank's own, so the memory for both is that of two groups. The shares of
the gradients go home the same way, in the model's dtype, and are summed in fp32 when all have come: their memory is that of all groups.
Where no document crosses a border nothing is sent at all. Cost: the last rank of a long document fetches and computes most, up to twice the
mean when one document fills the segment, where ``ring`` and ``ulysses`` are even.

Bytes that rank r sends for a layer, with need(a, b) = the rows of rank b's shard that rank a fetches:
    forward    2 Hkv D b  sum over a of need(a, r)
    backward   the same, and  2 Hkv D b  sum over a of need(r, a)
with b bytes an element. Of one span over T tokens, n = T / sp: forward 2 Hkv D b n (sp - 1 - r), backward 2 Hkv D b n (sp - 1). LLaMA3-8B
(8 key heads of 128, bf16) at T = 128k, sp = 8: at most 448 MiB forward and 448 MiB backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention.kernel import Queries, backward_block, dense_last, forward_block
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans, Tile, touching
from lr2train.config import UserError
from lr2train.parallel.comm import counter, exchange_rows, resume
from lr2train.parallel.mesh import Mesh

_HEAD_GROUPS = 4  # at most: more would hide more of the exchange behind compute, in smaller messages and kernel calls


@dataclass(frozen=True)
class Fetched:
    """What a rank exchanges with each other, in rows of the owner's shard; every shard gives a suffix, because fetched rows end at a
    border.
    """

    gives: tuple[int, ...]  # to rank a: this many of my last rows
    takes: tuple[int, ...]  # from rank a: this many of its last rows
    tiles: tuple[Tile, ...]  # my queries over [the fetched rows, my own]
    anyone: bool  # whether any rank of the group fetches anything: all must meet in the exchange, or none


class HeadGroup(NamedTuple):
    """Key heads [kv] with the query heads [q] that read them."""

    q: slice
    kv: slice


Fetch = Callable[[HeadGroup], tuple[Tensor, Tensor]]
"""head group -> (k, v) [n + T/sp, heads, D]: the fetched rows, and this rank's own behind them. Groups are asked for in order."""

Give = Callable[[HeadGroup, Tensor], None]
"""(head group, gradients [n, 2, heads, D] of the fetched rows of k and v): sends them home."""


def gather(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's contiguous shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]; spans of the whole segment."""
    fetched = plan(spans, q.shape[0] * mesh.sp_size, mesh.sp_rank, mesh.sp_size, window_tokens)
    return _Gather.apply(q, k, v, fetched, scale, window_tokens, mesh.sp_group)


@lru_cache(maxsize=256)
def plan(spans: Spans, n_tokens: int, rank: int, size: int, window_tokens: int | None = None) -> Fetched:
    """What ``rank`` of ``size`` gives, takes and computes for a segment of ``n_tokens``. Pure."""
    shard = n_tokens // size
    reach = [_reach(spans, other * shard, window_tokens) for other in range(size)]
    gives = tuple(_overlap(reach[other], other * shard, rank * shard, shard) for other in range(size))
    takes = tuple(_overlap(reach[rank], rank * shard, other * shard, shard) for other in range(size))
    tiles = _tiles(spans, rank * shard, shard, sum(takes))
    return Fetched(gives, takes, tiles, any(start < other * shard for other, start in enumerate(reach)))


def forward_rank(
    q: Tensor, n_kv_heads: int, fetched: Fetched, scale: float, window_tokens: int | None, fetch: Fetch
) -> tuple[Tensor, Tensor]:
    """One rank's forward: out [T/sp, Hq, D], lse [T/sp, Hq]. Where keys come from is ``fetch``'s affair."""
    outs, lses = [], []
    for group in head_groups(q.shape[1], n_kv_heads):  # no name for keys and values: they are let go before the next group is asked for
        out, lse = forward_block(q[:, group.q], *fetch(group), fetched.tiles, scale, window_tokens)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def backward_rank(
    queries: Queries,
    k: Tensor,
    v: Tensor,
    fetched: Fetched,
    scale: float,
    window_tokens: int | None,
    fetch: Fetch,
    give: Give,
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's backward: dq, and of dk and dv (in fp32) what its queries contribute to its own rows.

    What they contribute to fetched rows leaves through ``give``, in k's dtype.
    """
    dq = torch.empty_like(queries.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, dtype=queries.lse.dtype, memory_format=torch.contiguous_format) for x in (k, v))
    n = sum(fetched.takes)
    for group in head_groups(dq.shape[1], k.shape[1]):
        grads = backward_block(queries.part(slice(None), group.q), *fetch(group), fetched.tiles, scale, window_tokens)
        give(group, torch.stack([grads[1][:n], grads[2][:n]], 1).to(k.dtype))
        dq[:, group.q], dk[:, group.kv], dv[:, group.kv] = grads[0].to(dq.dtype), grads[1][n:], grads[2][n:]
    return dq, dk, dv


def head_groups(n_heads: int, n_kv_heads: int) -> tuple[HeadGroup, ...]:
    """Key heads in at most four runs as even as can be, each with the query heads that read them."""
    n_groups, readers = min(_HEAD_GROUPS, n_kv_heads), n_heads // n_kv_heads
    borders = [n_kv_heads * i // n_groups for i in range(n_groups + 1)]
    return tuple(HeadGroup(slice(first * readers, last * readers), slice(first, last)) for first, last in pairwise(borders))


def _reach(spans: Spans, border: int, window_tokens: int | None) -> int:
    """The first token before ``border`` that any token from it on sees; the border itself where there is none."""
    continued = touching(spans, border, border + 1)
    if not continued or continued[0][0] == border:
        return border
    start = continued[0][0]
    return start if window_tokens is None else max(start, border - window_tokens + 1)


def _overlap(start: int, stop: int, first: int, shard: int) -> int:
    """How many of the tokens [start, stop) lie in the shard that begins at ``first``."""
    return max(0, min(stop, first + shard) - max(start, first))


def _tiles(spans: Spans, first: int, shard: int, n_fetched: int) -> tuple[Tile, ...]:
    """This rank's queries over the fetched rows and its own: of a span that began before the shard, as many keys as were fetched more than
    queries.
    """
    mine = [
        (max(start, first) - first, min(stop, first + shard) - first, start < first)
        for start, stop in touching(spans, first, first + shard)
    ]
    return tuple(Tile(start, stop, 0 if continued else n_fetched + start, n_fetched + stop, 0) for start, stop, continued in mine)


# ---- on real ranks ----


class _Gather(torch.autograd.Function):
    """``forward_rank`` and ``backward_rank``, with what they fetch and give going through ``group``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fetched: Fetched,
        scale: float,
        window_tokens: int | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """This rank's q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> its out [T/sp, Hq, D]. Kept for the backward: these and lse, no fetched key."""
        q, k, v = (dense_last(x) for x in (q, k, v))
        arrivals = _Arrivals(q.shape[1], k, v, fetched, group)
        out, lse = forward_rank(q, k.shape[1], fetched, scale, window_tokens, arrivals.fetch)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments, ctx.counts = (fetched, scale, window_tokens, group), counter()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [T/sp, Hq, D] -> dq [T/sp, Hq, D], dk and dv [T/sp, Hkv, D] of this rank's rows, whoever's queries saw them."""
        q, k, v, out, lse = ctx.saved_tensors
        fetched, scale, window_tokens, group = ctx.arguments
        with resume(ctx.counts):
            arrivals, returns = _Arrivals(q.shape[1], k, v, fetched, group), _Returns(fetched, group)
            queries = Queries(q, out, lse, dense_last(grad_out))
            dq, dk, dv = backward_rank(queries, k, v, fetched, scale, window_tokens, arrivals.fetch, returns.give)
            returns.add_to(dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Arrivals:
    """Keys and values by head group, one group ahead of whoever asks: the next is in flight while one is computed with."""

    def __init__(self, n_heads: int, k: Tensor, v: Tensor, fetched: Fetched, group: dist.ProcessGroup | None) -> None:
        self.k, self.v, self.fetched, self.group = k, v, fetched, group
        self.to_start = iter(head_groups(n_heads, k.shape[1]))
        if fetched.anyone:
            self._start(next(self.to_start))

    def fetch(self, heads: HeadGroup) -> tuple[Tensor, Tensor]:
        """(k, v) [n + T/sp, heads, D], the fetched rows first; where there are none, the rank's own as they lie."""
        if self.fetched.anyone:
            self.work.wait()
            arrived = self.arriving
            del self.arriving, self.leaving
            if (following := next(self.to_start, None)) is not None:
                self._start(following)
            if sum(self.fetched.takes):
                return arrived[:, 0], arrived[:, 1]
        return self.k[:, heads.kv], self.v[:, heads.kv]

    def _start(self, heads: HeadGroup) -> None:
        own, fetched, n = (self.k[:, heads.kv], self.v[:, heads.kv]), self.fetched, sum(self.fetched.takes)
        self.leaving = torch.cat([torch.stack([x[len(x) - rows :] for x in own], 1) for rows in fetched.gives])
        self.arriving = self.leaving.new_empty(n + len(self.k) if n else 0, *self.leaving.shape[1:])
        if n:
            self.arriving[n:, 0], self.arriving[n:, 1] = own
        self.work = exchange_rows(self.leaving, fetched.gives, self.arriving[:n], fetched.takes, self.group)


class _Returns:
    """Gradients on their way home, of all head groups until the end: this rank's, of fetched rows, and others', of this rank's rows."""

    def __init__(self, fetched: Fetched, group: dist.ProcessGroup | None) -> None:
        self.fetched, self.group = fetched, group
        self.pending: list[tuple[HeadGroup, Tensor, dist.Work, Tensor]] = []

    def give(self, heads: HeadGroup, grads: Tensor) -> None:
        """Send the gradients [n, 2, heads, D] of the fetched rows to the ranks that own them."""
        if self.fetched.anyone:
            rows = grads.new_empty(sum(self.fetched.gives), *grads.shape[1:])
            work = exchange_rows(grads, self.fetched.takes, rows, self.fetched.gives, self.group)
            self.pending.append((heads, rows, work, grads))

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Wait, and add what came home to the last rows of dk and dv."""
        for heads, rows, work, _ in self.pending:
            work.wait()
            for part in rows.split(list(self.fetched.gives)):
                for grad, own in ((dk, part[:, 0]), (dv, part[:, 1])):
                    grad[len(grad) - len(part) :, heads.kv] += own


# ---- what it declares ----


def _traffic(work: Work, rank: int) -> Traffic:
    """The formula of the module's docstring."""
    fetched = plan(work.spans, work.n_tokens, rank, work.sp, work.window_tokens)
    row_bytes = 2 * work.n_kv_heads * work.head_size * work.bytes_per_element
    given, taken = sum(fetched.gives) * row_bytes, sum(fetched.takes) * row_bytes
    return Traffic(given, given + taken)


def _pairs(work: Work, rank: int) -> int:
    fetched = plan(work.spans, work.n_tokens, rank, work.sp, work.window_tokens)
    return work.n_heads * sum(tile.pairs(work.window_tokens) for tile in fetched.tiles)


def _refuse(work: Work) -> None:
    if work.n_tokens % work.sp:
        longer = -(-work.n_tokens // work.sp) * work.sp
        raise UserError(f"segment_tokens={work.n_tokens} is not divisible by parallel.sp={work.sp}; set data.segment_tokens to {longer}")


GATHER = Strategy("gather", gather, "contiguous", _refuse, _traffic, _pairs)
