"""Ring attention (Liu et al., arXiv 2310.01889) over the zigzag layout: keys and values go around, queries stay.

A document is cut in 2 R pieces and rank r of R holds pieces r and 2 R - 1 - r (``parallel.layout`` says of which documents this is so). In
step t rank r attends to what it needs of the shard of rank (r + t) mod R, while the shard of the next step is on its way. Of such a document
it needs, in step 0, its own pieces (causally); from a rank before it, the low piece, for all its queries; from a rank after it, both pieces,
for its high one: in every step the same work on every rank, half a share by a share, and no masked pair is computed.

Choice: a rank sends each other rank exactly the rows that it needs, straight from the shard that owns them, and a rank's share of the
gradients of keys and values goes straight home in the model's own dtype, where it is summed in fp32. Kernels round their gradients to that
dtype anyway, so an accumulator that went around in fp32 would be twice the bytes and no more exact. Documents that lie inside a shard are
not sent at all. Cost: in step t the peers are t ranks apart, where the classic ring speaks to neighbours only; on a machine that joins
nothing but neighbours by fast links that one is better, between nodes they are alike where each node has one rank of the ring
(``ulysses_ring``). And where several documents are cut, half the rows of a shard do not adjoin, and are copied before they are sent or
attend by themselves.

Bytes that rank r sends for a layer, with need(a, b) = the rows of rank b's shard that rank a's queries see:
    forward    2 Hkv D b  sum over a of need(a, r)
    backward   the same, and  2 Hkv D b  sum over a of need(r, a)
with b bytes an element. Of one span over T tokens and n = T / 2 R: need(a, r) is n where r < a and 2 n where r > a, so forward
2 Hkv D b n (R - 1 + r) and backward 2 Hkv D b n 3 (R - 1). LLaMA3-8B (8 key heads of 128, bf16) at T = 128k, R = 8: at most 448 MiB
forward and 672 MiB backward. Documents that are cut one by one and fill a segment together send as much, within rounding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention.kernel import Queries, backward_block, dense_last, forward_block, merge, rows_in
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans, Tile, touching
from lr2train.config import UserError
from lr2train.parallel.comm import Transfer, counter, resume, transfer
from lr2train.parallel.layout import Layout, Ranges
from lr2train.parallel.mesh import Mesh

Fetch = Callable[[int], tuple[Tensor, Tensor]]
"""step -> (k, v) of the rows that the step takes from its rank."""

Give = Callable[[int, Tensor, Tensor], None]
"""(step, dk, dv) of those rows: sends them home."""


@dataclass(frozen=True)
class Step:
    """What a rank does with the shard of rank (rank + t) mod size, in ranges of rows of shards."""

    queries: Ranges  # of this rank, that see anything of it
    take: Ranges  # of it, that they see
    give: Ranges  # of this rank's own shard, that rank (rank - t) mod size takes in the same step
    tiles: tuple[Tile, ...]  # by row of queries and of take, each laid end to end


def ring(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's zigzag shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]; spans of the whole segment."""
    return ring_over(q, k, v, spans, scale, window_tokens, mesh.sp_rank, mesh.sp_size, mesh.sp_group)


def ring_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    window_tokens: int | None,
    rank: int,
    size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """``ring`` over any group of ``size`` ranks in which this one is ``rank``: each holds T / size rows, for any heads."""
    steps = plan(spans, q.shape[0] * size, rank, size, window_tokens)
    return _Ring.apply(q, k, v, steps, scale, window_tokens, rank, group)


@lru_cache(maxsize=64)
def plan(spans: Spans, n_tokens: int, rank: int, size: int, window_tokens: int | None = None) -> tuple[Step, ...]:
    """What ``rank`` of ``size`` does in steps 0 … size - 1 with a segment of ``n_tokens``. Pure."""
    return tuple(_step(spans, n_tokens, rank, size, window_tokens, t) for t in range(size))


def forward_rank(
    q: Tensor, k: Tensor, v: Tensor, steps: Sequence[Step], scale: float, window_tokens: int | None, fetch: Fetch
) -> tuple[Tensor, Tensor]:
    """One rank's forward: out [T/R, Hq, D] and lse [T/R, Hq] of its queries over all keys. Where keys come from is ``fetch``'s affair.

    Blocks are merged in fp32 and rounded once, here.
    """
    out, lse = forward_block(q, k, v, steps[0].tiles, scale, window_tokens)
    for t, step in enumerate(steps[1:], 1):
        keys, values = fetch(t)
        if step.tiles:
            rows = rows_in(step.queries, q.device)
            out = out.to(lse.dtype)
            part = forward_block(q[rows], keys, values, step.tiles, scale, window_tokens)
            out[rows], lse[rows] = merge(out[rows], lse[rows], *part)
    return out.to(q.dtype), lse


def backward_rank(
    queries: Queries, k: Tensor, v: Tensor, steps: Sequence[Step], scale: float, window_tokens: int | None, fetch: Fetch, give: Give
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's backward: dq of its queries, and of dk and dv what they contribute to its own keys; in fp32.

    What they contribute to the keys of others leaves through ``give``, in k's dtype.
    """
    own = backward_block(queries, k, v, steps[0].tiles, scale, window_tokens)
    dq, dk, dv = (grad.to(queries.lse.dtype) for grad in own)
    for t, step in enumerate(steps[1:], 1):
        keys, values = fetch(t)
        rows = rows_in(step.queries, k.device)
        part = backward_block(queries.part(rows), keys, values, step.tiles, scale, window_tokens)
        dq[rows] += part[0]
        give(t, part[1].to(k.dtype), part[2].to(k.dtype))
    return dq, dk, dv


# ---- what each rank needs of each other: plain integers ----


def _step(spans: Spans, n_tokens: int, rank: int, size: int, window_tokens: int | None, t: int) -> Step:
    held = _held(spans, n_tokens, size)
    if t == 0:
        return Step(((0, n_tokens // size),), (), (), _own_tiles(held[rank], window_tokens))
    tiles = _tiles(held[rank], held[(rank + t) % size], window_tokens)
    given = _tiles(held[(rank - t) % size], held[rank], window_tokens)
    queries, take = _joined(tile[:2] for tile in tiles), _joined(tile[2:4] for tile in tiles)
    return Step(queries, take, _joined(tile[2:4] for tile in given), _end_to_end(tiles, queries, take))


class _Piece(NamedTuple):
    """What a block of a shard holds of a span: rows [start, stop) of the shard, the first of which is at ``position`` of the segment."""

    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """Position after its last row."""
        return self.position + self.stop - self.start


_Held = dict[tuple[int, int], list[_Piece]]
"""What a shard holds of each span: at most two pieces, with no row between them."""


@lru_cache(maxsize=16)
def _held(spans: Spans, n_tokens: int, size: int) -> tuple[_Held, ...]:
    """Of every rank, in order."""
    return tuple(_pieces(spans, Layout("zigzag", n_tokens, rank, size, spans=spans).blocks) for rank in range(size))


def _pieces(spans: Spans, blocks: Ranges) -> _Held:
    held: _Held = {}
    row = 0
    for first, last in blocks:
        for span in touching(spans, first, last):
            low, high = max(first, span[0]), min(last, span[1])
            held.setdefault(span, []).append(_Piece(row + low - first, row + high - first, low))
        row += last - first
    return held


def _own_tiles(held: _Held, window_tokens: int | None) -> tuple[Tile, ...]:
    """The tiles between the queries of a rank and its own keys, by row of its shard. Two pieces of a span adjoin, so one causal triangle over
    their rows is the mask over the positions.
    """
    tiles: list[Tile] = []
    for span, pieces in held.items():
        if window_tokens is not None and window_tokens < span[1] - span[0]:
            tiles += _in_pairs(pieces, pieces, window_tokens)
        else:
            tiles.append(Tile(pieces[0].start, pieces[-1].stop, pieces[0].start, pieces[-1].stop, 0))
    return tuple(tiles)


def _tiles(queries: _Held, keys: _Held, window_tokens: int | None) -> list[Tile]:
    """The tiles between the queries of one rank and the keys of another, by row of their shards."""
    tiles: list[Tile] = []
    for span in queries:
        if span not in keys:
            continue
        if window_tokens is not None and window_tokens < span[1] - span[0]:
            tiles += _in_pairs(queries[span], keys[span], window_tokens)
        else:
            tiles += _earlier(queries[span], keys[span])
    return tiles


def _earlier(queries: Sequence[_Piece], keys: Sequence[_Piece]) -> list[Tile]:
    """Full rectangles over the keys of another rank that lie before a piece of queries; pieces that see the same keys share one."""
    tiles: list[Tile] = []
    for piece in queries:
        before = [key for key in keys if key.end <= piece.position]
        if not before:
            continue
        tile = Tile(piece.start, piece.stop, before[0].start, before[-1].stop, piece.stop - piece.start)
        if tiles and (tiles[-1].q_stop, *tiles[-1][2:4]) == (tile.q_start, *tile[2:4]):
            first = tiles.pop().q_start
            tile = tile._replace(q_start=first, gap=tile.q_stop - first)
        tiles.append(tile)
    return tiles


def _in_pairs(queries: Sequence[_Piece], keys: Sequence[_Piece], window_tokens: int) -> list[Tile]:
    """Under a sliding window positions count: a tile for each pair of pieces, cut down to what is seen."""
    pairs = ((a, b) for a in queries for b in keys if b.end <= a.position or b.position == a.position)
    tiles = (Tile(a.start, a.stop, b.start, b.stop, a.end - b.end).trimmed(window_tokens) for a, b in pairs)
    return [tile for tile in tiles if tile is not None]


def _joined(ranges: Iterable[tuple[int, ...]]) -> Ranges:
    """The same rows in order, as few ranges as can be."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _end_to_end(tiles: Sequence[Tile], queries: Ranges, keys: Ranges) -> tuple[Tile, ...]:
    """The tiles by row of those ranges laid end to end."""
    to_q, to_k = _counted(queries), _counted(keys)
    placed = ((to_q(tile.q_start), to_k(tile.k_start), tile) for tile in tiles)
    return tuple(Tile(q, q + tile.n_queries, k, k + tile.n_keys, tile.gap) for q, k, tile in placed)


def _counted(ranges: Ranges) -> Callable[[int], int]:
    """row -> how many rows of ``ranges`` lie before it; it is one of them."""
    starts, before = [start for start, _ in ranges], [0, *accumulate(stop - start for start, stop in ranges)]

    def count(row: int) -> int:
        i = bisect_right(starts, row) - 1
        return before[i] + row - starts[i]

    return count


def _n_rows(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


# ---- on real ranks ----


class _Ring(torch.autograd.Function):
    """``forward_rank`` and ``backward_rank``, with what they fetch and give going through ``group``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        steps: tuple[Step, ...],
        scale: float,
        window_tokens: int | None,
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """This rank's q [T/R, Hq, D], k and v [T/R, Hkv, D] -> its out [T/R, Hq, D]. Kept for the backward: these and lse, no fetched key."""
        q, k, v = dense_last(q), k.contiguous(), v.contiguous()  # whose row ranges are sent as they lie
        out, lse = forward_rank(q, k, v, steps, scale, window_tokens, _Arrivals(k, v, steps, rank, group).fetch)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments, ctx.counts = (steps, scale, window_tokens, rank, group), counter()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [T/R, Hq, D] -> dq [T/R, Hq, D], dk and dv [T/R, Hkv, D] of this rank's rows, whoever's queries saw them."""
        q, k, v, out, lse = ctx.saved_tensors
        steps, scale, window_tokens, rank, group = ctx.arguments
        with resume(ctx.counts):
            arrivals, returns = _Arrivals(k, v, steps, rank, group), _Returns(k, v, steps, rank, group)
            queries = Queries(q, out, lse, dense_last(grad_out))
            dq, dk, dv = backward_rank(queries, k, v, steps, scale, window_tokens, arrivals.fetch, returns.give)
            returns.add_to(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


class _Arrivals:
    """Keys and values of the other ranks, one step ahead of whoever asks: step t + 1 is in flight while t is computed with."""

    def __init__(self, k: Tensor, v: Tensor, steps: Sequence[Step], rank: int, group: dist.ProcessGroup | None) -> None:
        self.k, self.v, self.steps, self.rank, self.group = k, v, steps, rank, group
        if len(steps) > 1:
            self._start(1)

    def fetch(self, t: int) -> tuple[Tensor, Tensor]:
        """(k, v) of the rows of step t, which must be asked for in order."""
        for work in self.works:
            work.wait()
        arrived = self.arriving
        if t + 1 < len(self.steps):
            self._start(t + 1)
        return arrived

    def _start(self, t: int) -> None:
        step, size = self.steps[t], len(self.steps)
        rows, n_rows = rows_in(step.give, self.k.device), _n_rows(step.take)
        self.arriving = self.k.new_empty(n_rows, *self.k.shape[1:]), self.v.new_empty(n_rows, *self.v.shape[1:])
        self.leaving = self.k[rows], self.v[rows]  # which may be copies: they live until they have left
        sent = Transfer((self.rank - t) % size, self.leaving)
        self.works = transfer(sent, Transfer((self.rank + t) % size, self.arriving), self.group, tag=2 * t)


class _Returns:
    """Gradients on their way home: this rank's, of the keys of others, and others', of the keys of this rank. One step is in flight."""

    def __init__(self, k: Tensor, v: Tensor, steps: Sequence[Step], rank: int, group: dist.ProcessGroup | None) -> None:
        self.like, self.steps, self.rank, self.group = (k, v), steps, rank, group
        self.sums = tuple(torch.zeros_like(x, dtype=torch.promote_types(torch.float32, x.dtype)) for x in (k, v))
        self.pending: tuple[int, list[dist.Work], tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def give(self, t: int, dk: Tensor, dv: Tensor) -> None:
        """Send the gradients of the rows that step t took to the rank that owns them, and take in those of the rows that it gave."""
        self._land()
        step, size = self.steps[t], len(self.steps)
        arriving = tuple(x.new_empty(_n_rows(step.give), *x.shape[1:]) for x in self.like)
        sent = Transfer((self.rank + t) % size, (dk, dv))
        works = transfer(sent, Transfer((self.rank - t) % size, arriving), self.group, tag=2 * t + 1)
        self.pending = t, works, arriving, (dk, dv)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Wait for the last, and add what came home."""
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
            total[rows_in(self.steps[t].give, total.device)] += part
        self.pending = None


# ---- what it declares ----


def ring_traffic(work: Work, rank: int) -> Traffic:
    """The formula of the module's docstring."""
    need = needs(work.spans, work.n_tokens, work.sp, work.window_tokens)
    row_bytes = 2 * work.n_kv_heads * work.head_size * work.bytes_per_element
    given, taken = (int(rows) * row_bytes for rows in (need[:, rank].sum(), need[rank].sum()))
    return Traffic(given, given + taken)


@lru_cache(maxsize=64)
def needs(spans: Spans, n_tokens: int, size: int, window_tokens: int | None = None) -> np.ndarray:
    """[size, size]: the rows of rank b's shard that rank a's queries see, b another than a. A choice asks for all at once, so no tile is made.

    Of a piece of keys, the first of a's pieces of queries behind it sees most: all of it, or what its first query's window reaches.
    """
    number = {span: i for i, span in enumerate(spans)}
    held = _held(spans, n_tokens, size)
    queries = np.full((2, size, len(spans)), -1)  # positions of the first and of the last piece that a holds of each span
    for rank, pieces in enumerate(held):
        for span, own in pieces.items():
            queries[:, rank, number[span]] = own[0].position, own[-1].position
    need = np.zeros((size, size), np.int64)
    for rank, pieces in enumerate(held):
        keys = np.array([(number[span], key.position, key.end) for span, own in pieces.items() for key in own], np.int64).reshape(-1, 3)
        of_span, start, end = keys.T
        first, last = queries[..., of_span]
        query = np.where(first >= end, first, last)
        seen_from = start if window_tokens is None else np.maximum(start, query - window_tokens + 1)
        need[:, rank] = np.where(query >= end, np.maximum(end - seen_from, 0), 0).sum(1)
    np.fill_diagonal(need, 0)
    return need


def ring_pairs(work: Work, rank: int) -> int:
    """(query, key) pairs of all heads that ``rank`` computes: what each of its queries sees of its span, wherever that lies."""
    held = _held(work.spans, work.n_tokens, work.sp)[rank]
    rows = ((piece.stop - piece.start, piece.end - span[0]) for span, pieces in held.items() for piece in pieces)
    return work.n_heads * sum(Tile(0, n, 0, seen, 0).pairs(work.window_tokens) for n, seen in rows)


def refuse_uneven(work: Work, unit: int, name: str) -> None:
    """Raises UserError when the segment cannot be cut in ``unit`` equal blocks."""
    if work.n_tokens % unit:
        raise UserError(
            f"segment_tokens={work.n_tokens} cannot be cut in the {unit} blocks that parallel.strategy={name} needs for parallel.sp={work.sp}; "
            "set parallel.strategy to auto"
        )


def _refuse(work: Work) -> None:
    refuse_uneven(work, 2 * work.sp, "ring")


RING = Strategy("ring", ring, "zigzag", _refuse, ring_traffic, ring_pairs)
