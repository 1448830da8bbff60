"""The steps of a ring: which rows each rank needs of every other rank. Plain integers, pure functions of a segment.

A rank's sequence shard holds at most two chunks of a document, with no row between them (``parallel.layout``, zigzag).
Positions are of the segment, rows are of a shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from lr2train.attention.blocks import Block, Rows
from lr2train.attention.strategy import PackedSegment
from lr2train.attention.tiles import Spans, Tile, touching
from lr2train.parallel.layout import Ranges


@dataclass(frozen=True, eq=False)
class Step:
    """Step t of a rank: attention to the shard of its peer, rank (rank + t) mod R.

    Attributes:
        queries: this rank's rows that see a row of the peer.
        take: the peer's rows that they see.
        give: this rank's rows that rank (rank - t) mod R takes in the same step.
        block: queries over take, each laid end to end.
    """

    queries: Rows
    take: Rows
    give: Rows
    block: Block


def steps_of(segment: PackedSegment, rank: int, sliding_window: int | None = None) -> tuple[Step, ...]:
    """Steps 0 … R - 1 of ``rank`` among the R = ``segment.sp`` ranks."""
    return tuple(_step(segment, rank, sliding_window, t) for t in range(segment.sp))


def _step(segment: PackedSegment, rank: int, sliding_window: int | None, t: int) -> Step:
    held, size = segment.once(held_by), segment.sp
    if t == 0:
        whole = Rows(((0, segment.shard_tokens),))
        return Step(whole, Rows(()), Rows(()), Block(_own_tiles(held[rank], sliding_window), sliding_window))
    tiles = _tiles(held[rank], held[(rank + t) % size], sliding_window)
    given = _tiles(held[(rank - t) % size], held[rank], sliding_window)
    queries, take = _joined(tile[:2] for tile in tiles), _joined(tile[2:4] for tile in tiles)
    block = Block(_end_to_end(tiles, queries, take), sliding_window)
    return Step(Rows(queries), Rows(take), Rows(_joined(tile[2:4] for tile in given)), block)


# ---- what each rank holds ----


class Chunk(NamedTuple):
    """Rows [start, stop) of a shard that are consecutive tokens of one document, from position ``position`` on."""

    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """Position after its last row."""
        return self.position + self.stop - self.start


Held = dict[tuple[int, int], list[Chunk]]
"""document span -> the chunks of it that a shard holds: at most two, with no row between them."""


def held_by(segment: PackedSegment) -> tuple[Held, ...]:
    """The chunks that every rank holds, in order of rank."""
    return tuple(_chunks(segment.spans, blocks) for blocks in segment.layout("zigzag", 0).blocks_by_rank)


def _chunks(spans: Spans, blocks: Ranges) -> Held:
    held: Held = {}
    row = 0
    for first, last in blocks:
        for span in touching(spans, first, last):
            low, high = max(first, span[0]), min(last, span[1])
            held.setdefault(span, []).append(Chunk(row + low - first, row + high - first, low))
        row += last - first
    return held


def needs(segment: PackedSegment, sliding_window: int | None = None) -> np.ndarray:
    """int64 [R, R]: how many rows of rank b's shard rank a's queries see; 0 for a = b.

    A choice among strategies asks for all ranks at once, so no tile is made. The first of a's chunks behind a
    chunk of keys sees most of it: all keys, or the keys that its first query's window reaches.
    """
    number = {span: i for i, span in enumerate(segment.spans)}
    held, size = segment.once(held_by), segment.sp
    queries = np.full((2, size, len(number)), -1)  # positions of a's first and last chunk of each document
    for rank, chunks_of in enumerate(held):
        for span, own in chunks_of.items():
            queries[:, rank, number[span]] = own[0].position, own[-1].position
    need = np.zeros((size, size), np.int64)
    for rank, chunks_of in enumerate(held):
        keys = [(number[span], chunk.position, chunk.end) for span, own in chunks_of.items() for chunk in own]
        of_span, start, end = np.array(keys, np.int64).reshape(-1, 3).T
        first, last = queries[..., of_span]
        query = np.where(first >= end, first, last)
        seen_from = start if sliding_window is None else np.maximum(start, query - sliding_window + 1)
        need[:, rank] = np.where(query >= end, np.maximum(end - seen_from, 0), 0).sum(1)
    np.fill_diagonal(need, 0)
    return need


# ---- chunks -> tiles ----


def _own_tiles(held: Held, sliding_window: int | None) -> tuple[Tile, ...]:
    """The tiles between a rank's queries and its own keys, by row of its shard.

    Two chunks of a document adjoin in the shard, so one causal triangle over their rows is the mask over their
    positions.
    """
    tiles: list[Tile] = []
    for span, chunks in held.items():
        if sliding_window is not None and sliding_window < span[1] - span[0]:
            tiles += _in_pairs(chunks, chunks, sliding_window)
        else:
            tiles.append(Tile(chunks[0].start, chunks[-1].stop, chunks[0].start, chunks[-1].stop, 0))
    return tuple(tiles)


def _tiles(queries: Held, keys: Held, sliding_window: int | None) -> list[Tile]:
    """The tiles between the queries of one rank and the keys of another, by row of their shards."""
    tiles: list[Tile] = []
    for span in queries:
        if span not in keys:
            continue
        if sliding_window is not None and sliding_window < span[1] - span[0]:
            tiles += _in_pairs(queries[span], keys[span], sliding_window)
        else:
            tiles += _earlier(queries[span], keys[span])
    return tiles


def _earlier(queries: Sequence[Chunk], keys: Sequence[Chunk]) -> list[Tile]:
    """Full rectangles over another rank's keys that lie before a chunk of queries.

    Chunks that see the same keys share a rectangle.
    """
    tiles: list[Tile] = []
    for chunk in queries:
        before = [key for key in keys if key.end <= chunk.position]
        if not before:
            continue
        tile = Tile(chunk.start, chunk.stop, before[0].start, before[-1].stop, chunk.stop - chunk.start)
        if tiles and (tiles[-1].q_stop, *tiles[-1][2:4]) == (tile.q_start, *tile[2:4]):
            first = tiles.pop().q_start
            tile = tile._replace(q_start=first, gap=tile.q_stop - first)
        tiles.append(tile)
    return tiles


def _in_pairs(queries: Sequence[Chunk], keys: Sequence[Chunk], sliding_window: int) -> list[Tile]:
    """Under a sliding window: a tile for each pair of chunks, trimmed to the rows that see or are seen."""
    pairs = ((a, b) for a in queries for b in keys if b.end <= a.position or b.position == a.position)
    tiles = (Tile(a.start, a.stop, b.start, b.stop, a.end - b.end).trimmed(sliding_window) for a, b in pairs)
    return [tile for tile in tiles if tile is not None]


def _joined(ranges: Iterable[tuple[int, ...]]) -> Ranges:
    """The same rows in ascending order, as few ranges as possible."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _end_to_end(tiles: Sequence[Tile], queries: Ranges, keys: Ranges) -> tuple[Tile, ...]:
    """The tiles by row of ``queries`` and ``keys``, each laid end to end."""
    to_q, to_k = _counted(queries), _counted(keys)
    placed = ((to_q(tile.q_start), to_k(tile.k_start), tile) for tile in tiles)
    return tuple(Tile(q, q + tile.n_queries, k, k + tile.n_keys, tile.gap) for q, k, tile in placed)


def _counted(ranges: Ranges) -> Callable[[int], int]:
    """row of ``ranges`` -> how many rows of ``ranges`` lie before it."""
    starts, before = [start for start, _ in ranges], [0, *accumulate(stop - start for start, stop in ranges)]

    def count(row: int) -> int:
        i = bisect_right(starts, row) - 1
        return before[i] + row - starts[i]

    return count
