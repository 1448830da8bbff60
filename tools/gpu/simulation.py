"""All ranks of a strategy in one process, one after another: for more ranks than devices, on any device with a kernel.

Choice: the ranks run the very functions that real ranks run (``ring.forward_rank``, ``gather.backward_rank`` …). Only
the exchange is replaced: rows come from lists and go to sums. Cost: nothing is learnt about the exchange, which real
processes are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lr2train.attention import gather, ring
from lr2train.attention.blocks import Block, Queries
from lr2train.attention.kernel import backward_block, forward_block
from lr2train.attention.ring_steps import steps_of
from lr2train.attention.strategy import PackedSegment
from lr2train.attention.tiles import Spans, diagonal
from lr2train.attention.ulysses import refuse_heads, spread_kv_heads
from lr2train.parallel.layout import Layout


@dataclass(frozen=True)
class LayerInputs:
    """One layer's attention over a whole segment: q and grad_out [T, Hq, D], k and v [T, Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    spans: Spans
    scale: float
    sliding_window: int | None = None


Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""(out, dq, dk, dv) of the whole segment, in q's dtype."""


def simulate(name: str, inputs: LayerInputs, sp: int, rings: int = 1) -> Result:
    """The joint result of ``sp`` ranks under strategy ``name``: ulysses | ring | gather | ulysses_ring.

    ``rings``: of the ranks of ulysses_ring, how many are on the ring axis.
    """
    if name == "ring":
        return _ring(inputs, sp)
    if name == "gather":
        return _gather(inputs, sp)
    if name == "ulysses":
        return _ulysses(inputs, sp, 1)
    assert name == "ulysses_ring", f"strategy {name!r} cannot be simulated"
    return _ulysses(inputs, sp // rings, rings)


def alone(inputs: LayerInputs) -> Result:
    """The same on one rank."""
    block = Block(diagonal(inputs.spans), inputs.sliding_window)
    out, lse = forward_block(inputs.q, inputs.k, inputs.v, block, inputs.scale)
    queries = Queries(inputs.q, out.to(inputs.q.dtype), lse, inputs.grad_out)
    grads = backward_block(queries, inputs.k, inputs.v, block, inputs.scale)
    return queries.out, *(grad.to(inputs.q.dtype) for grad in grads)  # type: ignore[return-value]


def _ulysses(inputs: LayerInputs, size: int, rings: int) -> Result:
    """Every ulysses rank does its own heads. Key heads that several ranks hold add up their gradients in fp32."""
    n_heads, n_kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    refuse_heads(n_heads, size)
    spread = spread_kv_heads(n_kv_heads, size)
    k, v = (x.repeat_interleave(spread // n_kv_heads, 1) for x in (inputs.k, inputs.v))
    parts = []
    for qs, ks, vs, gs in zip(*(x.chunk(size, 1) for x in (inputs.q, k, v, inputs.grad_out)), strict=True):
        part = LayerInputs(qs, ks, vs, gs, inputs.spans, inputs.scale, inputs.sliding_window)
        parts.append(alone(part) if rings == 1 else _ring(part, rings))
    out, dq, dk, dv = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    dk, dv = (x.unflatten(1, (n_kv_heads, -1)).sum(2) for x in (dk, dv))
    return out, dq, dk, dv


def _ring(inputs: LayerInputs, size: int) -> Result:
    segment = PackedSegment(inputs.spans, len(inputs.q), size)
    layouts = [segment.layout("zigzag", rank) for rank in range(size)]
    q, k, v, grad_out = (_shards(x, layouts) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    steps_by_rank = [steps_of(segment, rank, inputs.sliding_window) for rank in range(size)]
    sums, device = _Sums(k, v), inputs.q.device

    def fetch(rank: int, t: int) -> tuple[Tensor, Tensor]:
        owner, rows = (rank + t) % size, steps_by_rank[rank][t].take.on(device)
        return k[owner][rows], v[owner][rows]

    def give(rank: int, t: int, dk: Tensor, dv: Tensor) -> None:
        sums.add((rank + t) % size, steps_by_rank[rank][t].take.on(device), slice(None), dk, dv)

    outs, dqs = [], []
    for rank, steps in enumerate(steps_by_rank):
        asked = partial(fetch, rank)
        out, lse = ring.forward_rank(q[rank], k[rank], v[rank], steps, inputs.scale, asked)
        queries = Queries(q[rank], out, lse, grad_out[rank])
        dq, dk, dv = ring.backward_rank(queries, k[rank], v[rank], steps, inputs.scale, asked, partial(give, rank))
        sums.add(rank, slice(None), slice(None), dk, dv)
        outs.append(out)
        dqs.append(dq.to(inputs.q.dtype))
    return _whole(layouts[0], outs, dqs, sums)


def _gather(inputs: LayerInputs, size: int) -> Result:
    segment = PackedSegment(inputs.spans, len(inputs.q), size)
    layouts = [segment.layout("contiguous", rank) for rank in range(size)]
    q, k, v, grad_out = (_shards(x, layouts) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    sums = _Sums(k, v)

    def fetch(rank: int, exchange: gather.Exchange, heads: gather.HeadGroup) -> tuple[Tensor, Tensor]:
        keys, values = ([x[len(x) - n :] for x, n in zip(xs, exchange.takes, strict=True)] for xs in (k, v))
        return torch.cat([*keys, k[rank]])[:, heads.kv], torch.cat([*values, v[rank]])[:, heads.kv]

    def give(exchange: gather.Exchange, heads: gather.HeadGroup, grads: Tensor) -> None:
        for owner, part in enumerate(grads.split(list(exchange.takes))):
            sums.add(owner, slice(len(k[owner]) - len(part), None), heads.kv, part[:, 0], part[:, 1])

    outs, dqs = [], []
    for rank in range(size):
        exchange = gather.exchange_of(segment, rank, inputs.sliding_window)
        rest = (exchange, inputs.scale, partial(fetch, rank, exchange))
        out, lse = gather.forward_rank(q[rank], k[rank].shape[1], *rest)
        queries = Queries(q[rank], out, lse, grad_out[rank])
        dq, dk, dv = gather.backward_rank(queries, k[rank], v[rank], *rest, partial(give, exchange))
        sums.add(rank, slice(None), slice(None), dk, dv)
        outs.append(out)
        dqs.append(dq)
    return _whole(layouts[0], outs, dqs, sums)


def _shards(x: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    return [layout.shard(x, 0) for layout in layouts]


class _Sums:
    """Sums of dk and dv at the ranks that own the keys, in fp32."""

    def __init__(self, k: list[Tensor], v: list[Tensor]) -> None:
        self.dtype = k[0].dtype
        fp32 = torch.promote_types(torch.float32, self.dtype)
        self.dk, self.dv = ([torch.zeros_like(x, dtype=fp32) for x in xs] for xs in (k, v))

    def add(self, owner: int, rows: slice | Tensor, heads: slice, dk: Tensor, dv: Tensor) -> None:
        self.dk[owner][rows, heads] += dk
        self.dv[owner][rows, heads] += dv


def _whole(layout: Layout, outs: list[Tensor], dqs: list[Tensor], sums: _Sums) -> Result:
    dk, dv = (layout.gather([x.to(sums.dtype) for x in xs], 0) for xs in (sums.dk, sums.dv))
    return layout.gather(outs, 0), layout.gather(dqs, 0), dk, dv
