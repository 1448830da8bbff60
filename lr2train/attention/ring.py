"""Ring attention (Liu et al., arXiv 2310.01889) over the zigzag layout: keys and values travel, queries stay.

A document is cut in 2 R chunks and rank r of R holds chunks r and 2 R - 1 - r (``parallel.layout`` says which documents
are cut). In step t rank r attends to the rows that it needs of the shard of rank (r + t) mod R, while the rows of the
next step travel. The rows that it needs:

    step 0                      its own chunks, causally
    from a rank before it       the low chunk, for all its queries
    from a rank after it        both chunks, for the queries of its high chunk

So every rank has the same work in every step, half a share by a share, and no masked pair is computed.

Choice: a rank sends every other rank exactly the rows that the other rank needs, straight from the shard that owns the
rows. Gradients of keys and values return straight to the owner in the model's dtype and are summed there in fp32.
Kernels round their gradients to that dtype anyway, so an accumulator that travels around the ring in fp32 would be
twice the bytes and no more exact. Documents that lie inside a shard are not sent. Cost: in step t the peers are t ranks
apart, where the classic ring speaks to neighbours only. The classic ring is better on a machine that has fast links
between neighbours only; between nodes both are alike where each node has one rank of the ring (``ulysses_ring``). Where
several documents are cut, half the rows of a shard do not adjoin, and are copied before they are sent or attend.

Bytes that rank r sends for a layer, with need(a, b) = the rows of rank b's shard that rank a's queries see:
    forward    2 Hkv D b  sum over a of need(a, r)
    backward   the same, and  2 Hkv D b  sum over a of need(r, a)
with b bytes an element. For one document of T tokens and n = T / 2 R: need(a, r) is n where r < a and 2 n where r > a,
so forward 2 Hkv D b n (R - 1 + r) and backward 2 Hkv D b n 3 (R - 1). LLaMA3-8B (8 key heads of 128, bf16) at T = 128k,
R = 8: at most 448 MiB forward and 672 MiB backward. Documents that are cut one by one and fill a segment together send
as much, within rounding.

``ring_steps.py`` computes the steps from plain integers; this file runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention.blocks import Queries
from lr2train.attention.kernel import backward_block, dense_last, forward_block, merge_into
from lr2train.attention.recompute import kept
from lr2train.attention.ring_steps import Step, held_by, needs, steps_of
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.attention.tiles import Tile
from lr2train.config import UserError
from lr2train.parallel.comm import Transfer, counter, resume, transfer
from lr2train.parallel.mesh import Mesh

Fetch = Callable[[int], tuple[Tensor, Tensor]]
"""step -> (k, v) of the rows that the step takes from its peer."""

Give = Callable[[int, Tensor, Tensor], None]
"""(step, dk, dv) of those rows: sends them to the owner."""


@dataclass(frozen=True, eq=False)
class RingAttention:
    """Attention of this rank's zigzag shard: rank ``rank`` of a ring, whose process group is ``group``."""

    steps: tuple[Step, ...]
    rank: int
    group: dist.ProcessGroup | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/R, Hq, D], k and v [T/R, Hkv, D], for any heads -> [T/R, Hq, D]."""
        return _Ring.apply(q, k, v, scale, self)


def ring(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> RingAttention:
    """This rank's attention."""
    return ring_over(segment, mesh.sp_rank, mesh.sp_group, sliding_window)


def ring_over(
    segment: PackedSegment,
    rank: int,
    group: dist.ProcessGroup | None,
    sliding_window: int | None,
) -> RingAttention:
    """``ring`` over any group: rank ``rank`` of the ``segment.sp`` ranks."""
    return RingAttention(segment.once(steps_of, rank, sliding_window), rank, group)


# ---- one rank's computation ----


def forward_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Sequence[Step],
    scale: float,
    fetch: Fetch,
) -> tuple[Tensor, Tensor]:
    """One rank's forward: out [T/R, Hq, D] and lse [T/R, Hq] of its queries over all keys. ``fetch`` brings the keys of
    other ranks.

    Blocks are merged in fp32 and rounded once, here.
    """
    out, lse = forward_block(q, k, v, steps[0].block, scale)
    for t, step in enumerate(steps[1:], 1):
        keys, values = fetch(t)
        if step.block.tiles:
            rows = step.queries.on(q.device)
            out = out.to(lse.dtype)
            part = forward_block(q[rows], keys, values, step.block, scale)
            merge_into(out, lse, rows, *part)
    return out.to(q.dtype), lse


def backward_rank(
    queries: Queries, k: Tensor, v: Tensor, steps: Sequence[Step], scale: float, fetch: Fetch, give: Give
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's backward: dq of its queries, and their contributions to dk and dv of its own keys; in fp32.

    Contributions to the keys of other ranks leave through ``give``, in k's dtype.
    """
    own = backward_block(queries, k, v, steps[0].block, scale)
    dq, dk, dv = (grad.to(queries.lse.dtype) for grad in own)
    for t, step in enumerate(steps[1:], 1):
        keys, values = fetch(t)
        rows = step.queries.on(k.device)
        part = backward_block(queries.part(rows), keys, values, step.block, scale)
        dq[rows] += part[0]
        give(t, part[1].to(k.dtype), part[2].to(k.dtype))
    return dq, dk, dv


# ---- on real ranks ----


class _Ring(torch.autograd.Function):
    """``forward_rank`` and ``backward_rank``, with the transfers on the process group."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, attention: RingAttention) -> Tensor:
        """This rank's q [T/R, Hq, D], k and v [T/R, Hkv, D] -> out [T/R, Hq, D].

        Kept for the backward: q, k, v, out and lse. Keys of other ranks are fetched again.
        """
        q, k, v = dense_last(q), k.contiguous(), v.contiguous()  # row ranges of k and v are sent as they lie
        out, lse = kept(lambda: forward_rank(q, k, v, attention.steps, scale, _Arrivals(k, v, attention).fetch))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.attention, ctx.counts = scale, attention, counter()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [T/R, Hq, D] -> dq [T/R, Hq, D], dk and dv [T/R, Hkv, D]: this rank's rows, all ranks' queries."""
        q, k, v, out, lse = ctx.saved_tensors
        with resume(ctx.counts):
            arrivals, returns = _Arrivals(k, v, ctx.attention), _Returns(k, v, ctx.attention)
            queries = Queries(q, out, lse, dense_last(grad_out))
            dq, dk, dv = backward_rank(queries, k, v, ctx.attention.steps, ctx.scale, arrivals.fetch, returns.give)
            returns.add_to(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _Arrivals:
    """Keys and values of the other ranks, one step ahead: step t + 1 is in flight while step t is computed with."""

    def __init__(self, k: Tensor, v: Tensor, attention: RingAttention) -> None:
        self.k, self.v, self.steps, self.rank, self.group = k, v, attention.steps, attention.rank, attention.group
        if len(self.steps) > 1:
            self._start(1)

    def fetch(self, t: int) -> tuple[Tensor, Tensor]:
        """(k, v) of the rows of step t. Steps must be asked for in order."""
        for work in self.works:
            work.wait()
        arrived = self.arriving
        if t + 1 < len(self.steps):
            self._start(t + 1)
        return arrived

    def _start(self, t: int) -> None:
        step, size = self.steps[t], len(self.steps)
        rows, n_rows = step.give.on(self.k.device), len(step.take)
        self.arriving = self.k.new_empty(n_rows, *self.k.shape[1:]), self.v.new_empty(n_rows, *self.v.shape[1:])
        self.leaving = self.k[rows], self.v[rows]  # possibly copies: they must live until they have left
        sent = Transfer((self.rank - t) % size, self.leaving)
        self.works = transfer(sent, Transfer((self.rank + t) % size, self.arriving), self.group, tag=2 * t)


class _Returns:
    """Gradients on their way to the owners of the keys. One step's are in flight, sent and received."""

    def __init__(self, k: Tensor, v: Tensor, attention: RingAttention) -> None:
        self.like, self.steps, self.rank, self.group = (k, v), attention.steps, attention.rank, attention.group
        self.sums = tuple(torch.zeros_like(x, dtype=torch.promote_types(torch.float32, x.dtype)) for x in (k, v))
        self.pending: tuple[int, list[dist.Work], tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def give(self, t: int, dk: Tensor, dv: Tensor) -> None:
        """Send the gradients of the rows that step t took, and receive those of the rows that step t gave."""
        self._land()
        step, size = self.steps[t], len(self.steps)
        arriving = tuple(x.new_empty(len(step.give), *x.shape[1:]) for x in self.like)
        sent = Transfer((self.rank + t) % size, (dk, dv))
        works = transfer(sent, Transfer((self.rank - t) % size, arriving), self.group, tag=2 * t + 1)
        self.pending = t, works, arriving, (dk, dv)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Wait for the last step, and add the received gradients."""
        self._land()
        dk += self.sums[0]
        dv += self.sums[1]

    def _land(self) -> None:
        if self.pending is None:
            return
        t, works, arrived, _ = self.pending
        for work in works:
            work.wait()
        for total, part in zip(self.sums, arrived, strict=True):
            total[self.steps[t].give.on(total.device)] += part
        self.pending = None


# ---- declarations ----


def ring_traffic(work: SegmentWork, rank: int) -> Traffic:
    """The formula of the module's docstring."""
    need = work.segment.once(needs, work.sliding_window)
    given, taken = (int(rows) * work.kv_row_bytes for rows in (need[:, rank].sum(), need[rank].sum()))
    return Traffic(given, given + taken)


def ring_pairs(work: SegmentWork, rank: int) -> int:
    """(query, key) pairs of all heads that ``rank`` computes: the keys that its queries see, on any rank."""
    held = work.segment.once(held_by)[rank]
    rows = ((chunk.stop - chunk.start, chunk.end - span[0]) for span, chunks in held.items() for chunk in chunks)
    return work.n_heads * sum(Tile(0, n, 0, seen, 0).pairs(work.sliding_window) for n, seen in rows)


def refuse_uneven(segment: PackedSegment, n_blocks: int, name: str) -> None:
    """Raises UserError when the segment cannot be cut in ``n_blocks`` equal blocks."""
    if segment.n_tokens % n_blocks:
        raise UserError(
            f"segment_tokens={segment.n_tokens} cannot be cut in the {n_blocks} blocks that parallel.strategy={name} "
            f"needs for parallel.sp={segment.sp}; set parallel.strategy to auto"
        )


def _refuse(work: SegmentWork) -> None:
    refuse_uneven(work.segment, 2 * work.segment.sp, "ring")


RING = Strategy("ring", ring, "zigzag", _refuse, ring_traffic, ring_pairs)
