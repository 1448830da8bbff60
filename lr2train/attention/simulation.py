"""All ranks of a strategy in one process, one after another: for sizes that no machine at hand has, on any device that has a kernel.

Choice: the ranks run the very functions that real ranks run (``ring.forward_rank``, ``gather.backward_rank`` …); only where rows come from
and go to is replaced. Cost: nothing is learnt about the exchange itself, which real processes are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lr2train.attention import gather, ring
from lr2train.attention.kernel import Queries, backward_block, forward_block, rows_in
from lr2train.attention.tiles import Spans, diagonal
from lr2train.attention.ulysses import refuse_heads, spread_kv_heads
from lr2train.parallel.layout import Layout


@dataclass(frozen=True)
class Segment:
    """One layer's attention over a whole segment: q and grad_out [T, Hq, D], k and v [T, Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    spans: Spans
    scale: float
    window_tokens: int | None = None


Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""(out, dq, dk, dv) of the whole segment, in q's dtype."""


def simulate(name: str, segment: Segment, sp: int, rings: int = 1) -> Result:
    """What ``sp`` ranks compute together with strategy ``name`` (ulysses | ring | gather | ulysses_ring with ``rings`` on the ring axis)."""
    if name == "ring":
        return _ring(segment, sp)
    if name == "gather":
        return _gather(segment, sp)
    if name == "ulysses":
        return _ulysses(segment, sp, 1)
    assert name == "ulysses_ring", f"strategy {name!r} cannot be simulated"
    return _ulysses(segment, sp // rings, rings)


def alone(segment: Segment) -> Result:
    """The same on one rank."""
    tiles = diagonal(segment.spans)
    out, lse = forward_block(segment.q, segment.k, segment.v, tiles, segment.scale, segment.window_tokens)
    queries = Queries(segment.q, out.to(segment.q.dtype), lse, segment.grad_out)
    grads = backward_block(queries, segment.k, segment.v, tiles, segment.scale, segment.window_tokens)
    return queries.out, *(grad.to(segment.q.dtype) for grad in grads)  # type: ignore[return-value]


def _ulysses(segment: Segment, size: int, rings: int) -> Result:
    """Heads are independent: every ulysses rank does its own, and key heads that several ranks hold add up their gradients in fp32."""
    n_heads, n_kv_heads = segment.q.shape[1], segment.k.shape[1]
    refuse_heads(n_heads, size)
    spread = spread_kv_heads(n_kv_heads, size)
    k, v = (x.repeat_interleave(spread // n_kv_heads, 1) for x in (segment.k, segment.v))
    parts = []
    for qs, ks, vs, gs in zip(*(x.chunk(size, 1) for x in (segment.q, k, v, segment.grad_out)), strict=True):
        part = Segment(qs, ks, vs, gs, segment.spans, segment.scale, segment.window_tokens)
        parts.append(alone(part) if rings == 1 else _ring(part, rings))
    out, dq, dk, dv = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    dk, dv = (x.unflatten(1, (n_kv_heads, -1)).sum(2) for x in (dk, dv))
    return out, dq, dk, dv


def _ring(segment: Segment, size: int) -> Result:
    layouts = [Layout("zigzag", len(segment.q), rank, size, spans=segment.spans) for rank in range(size)]
    q, k, v, grad_out = ([layout.shard(x, 0) for layout in layouts] for x in (segment.q, segment.k, segment.v, segment.grad_out))
    plans = [ring.plan(segment.spans, len(segment.q), rank, size, segment.window_tokens) for rank in range(size)]
    home = _Home(k, v)

    def fetch(rank: int, t: int) -> tuple[Tensor, Tensor]:
        owner, rows = (rank + t) % size, rows_in(plans[rank][t].take, segment.q.device)
        return k[owner][rows], v[owner][rows]

    def give(rank: int, t: int, dk: Tensor, dv: Tensor) -> None:
        home.add((rank + t) % size, rows_in(plans[rank][t].take, segment.q.device), slice(None), dk, dv)

    outs, dqs = [], []
    for rank, steps in enumerate(plans):
        asked, rest = partial(fetch, rank), (steps, segment.scale, segment.window_tokens)
        out, lse = ring.forward_rank(q[rank], k[rank], v[rank], *rest, asked)
        queries = Queries(q[rank], out, lse, grad_out[rank])
        dq, dk, dv = ring.backward_rank(queries, k[rank], v[rank], *rest, asked, partial(give, rank))
        home.add(rank, slice(None), slice(None), dk, dv)
        outs.append(out)
        dqs.append(dq.to(segment.q.dtype))
    return _whole(layouts[0], outs, dqs, home)


def _gather(segment: Segment, size: int) -> Result:
    layouts = [Layout("contiguous", len(segment.q), rank, size) for rank in range(size)]
    q, k, v, grad_out = ([layout.shard(x, 0) for layout in layouts] for x in (segment.q, segment.k, segment.v, segment.grad_out))
    home = _Home(k, v)

    def fetch(rank: int, fetched: gather.Fetched, heads: gather.HeadGroup) -> tuple[Tensor, Tensor]:
        keys, values = ([x[len(x) - n :] for x, n in zip(xs, fetched.takes, strict=True)] for xs in (k, v))
        return torch.cat([*keys, k[rank]])[:, heads.kv], torch.cat([*values, v[rank]])[:, heads.kv]

    def give(fetched: gather.Fetched, heads: gather.HeadGroup, grads: Tensor) -> None:
        for owner, part in enumerate(grads.split(list(fetched.takes))):
            home.add(owner, slice(len(k[owner]) - len(part), None), heads.kv, part[:, 0], part[:, 1])

    outs, dqs = [], []
    for rank in range(size):
        fetched = gather.plan(segment.spans, len(segment.q), rank, size, segment.window_tokens)
        rest = (fetched, segment.scale, segment.window_tokens, partial(fetch, rank, fetched))
        out, lse = gather.forward_rank(q[rank], k[rank].shape[1], *rest)
        queries = Queries(q[rank], out, lse, grad_out[rank])
        dq, dk, dv = gather.backward_rank(queries, k[rank], v[rank], *rest, partial(give, fetched))
        home.add(rank, slice(None), slice(None), dk, dv)
        outs.append(out)
        dqs.append(dq)
    return _whole(layouts[0], outs, dqs, home)


class _Home:
    """Sums of dk and dv at the ranks that own the keys, in fp32."""

    def __init__(self, k: list[Tensor], v: list[Tensor]) -> None:
        self.dtype = k[0].dtype
        self.dk, self.dv = ([torch.zeros_like(x, dtype=torch.promote_types(torch.float32, x.dtype)) for x in xs] for xs in (k, v))

    def add(self, owner: int, rows: slice | Tensor, heads: slice, dk: Tensor, dv: Tensor) -> None:
        self.dk[owner][rows, heads] += dk
        self.dv[owner][rows, heads] += dv


def _whole(layout: Layout, outs: list[Tensor], dqs: list[Tensor], home: _Home) -> Result:
    dk, dv = (layout.gather([x.to(home.dtype) for x in xs], 0) for xs in (home.dk, home.dv))
    return layout.gather(outs, 0), layout.gather(dqs, 0), dk, dv
