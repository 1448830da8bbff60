"""Tiles: which queries see which keys, in plain integers; and how kernels can take them.

A tile is a rectangle of the attention matrix: some consecutive queries over some consecutive keys. The spans of a packed row are square
tiles on its diagonal; what a rank of a ring computes in one step is a few tiles between its own queries and the keys of another. A round is
as many tiles as one kernel call can take.

Choice: everything about masks is decided here, from Python ints and once for a segment, so that layers neither build masks nor ask a
device. Cost: a mask that is not causal, full or a sliding window cannot be said.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

Spans = tuple[tuple[int, int], ...]
"""Half-open (start, stop) token ranges of a row, sorted and disjoint: the documents that do not see each other."""

_LONGEST_BAND = 256  # queries of a piece under a sliding window on CPU: the mask of a piece is this by (this + the window)


class Tile(NamedTuple):
    """Queries [q_start, q_stop) of a row over keys [k_start, k_stop) of the same or another row, all of one span.

    ``gap`` is the position of the last query minus the position of the last key. 0: a causal triangle aligned to the bottom right, for
    which there must be as many keys as queries or more. At least the number of queries: all keys lie before all queries, and every query
    sees every key, up to a sliding window. Nothing in between is a tile.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    gap: int

    @property
    def n_queries(self) -> int:
        """Rows of queries."""
        return self.q_stop - self.q_start

    @property
    def n_keys(self) -> int:
        """Rows of keys."""
        return self.k_stop - self.k_start

    @property
    def lead(self) -> int:
        """Query i of the tile stands ``lead`` tokens after its key i: without a window it sees keys j <= i + lead."""
        return self.n_keys - self.n_queries + self.gap

    def trimmed(self, window_tokens: int | None) -> Tile | None:
        """Without the keys that no query sees and the queries that see no key under a sliding window; None when nothing is left."""
        if window_tokens is None:
            return self
        unseen = max(0, self.lead - window_tokens + 1)  # keys before the first query's window
        blind = max(0, self.n_queries - 1 + self.lead - window_tokens + 1 - (self.n_keys - 1))  # queries whose window begins after the keys
        if unseen >= self.n_keys or blind >= self.n_queries:
            return None
        return Tile(self.q_start, self.q_stop - blind, self.k_start + unseen, self.k_stop, self.gap - blind)

    def pairs(self, window_tokens: int | None = None) -> int:
        """How many (query, key) pairs it holds."""
        seen = _triangle(self.n_queries, self.lead, self.n_keys)
        return seen if window_tokens is None else seen - _triangle(self.n_queries, self.lead - window_tokens, self.n_keys)


def _triangle(n_queries: int, lead: int, n_keys: int) -> int:
    """sum over queries i of the number of keys j <= i + lead."""
    below = min(max(0, -lead), n_queries)  # queries that see none
    full = min(max(0, n_queries - (n_keys - 1 - lead)), n_queries - below)  # queries that see all
    between = n_queries - below - full
    return full * n_keys + between * (below + lead + 1) + between * (between - 1) // 2


@lru_cache(maxsize=1024)
def check_spans(spans: Spans, n_tokens: int) -> None:
    """Assert what everything here believes of spans: anything else would be computed, to wrong numbers."""
    borders = [0, *(border for span in spans for border in span), n_tokens]
    fits = borders == sorted(borders) and all(start < stop for start, stop in spans)
    assert fits, f"spans {spans} are not sorted, disjoint, non-empty ranges of {n_tokens} tokens"


def touching(spans: Spans, start: int, stop: int) -> Spans:
    """The spans that have a token in [start, stop)."""
    return spans[bisect_right(spans, start, key=itemgetter(1)) : bisect_left(spans, stop, key=itemgetter(0))]


def diagonal(spans: Spans, causal: bool = True) -> tuple[Tile, ...]:
    """The tiles of a packed row that holds its spans whole."""
    return tuple(Tile(start, stop, start, stop, 0 if causal else stop - start) for start, stop in spans)


# ---- rounds: tiles that one kernel call can take ----


@dataclass(frozen=True, eq=False)  # told apart by identity: what hangs on a round is found without looking at its tiles
class Round:
    """Tiles that share no query and no key, and one mask: the input of one kernel call."""

    tiles: tuple[Tile, ...]
    causal: bool
    window_tokens: int | None  # None where no query's window leaves out a key
    fresh: bool  # no query of it stands in an earlier round
    fresh_both: bool  # nor any key


@lru_cache(maxsize=256)  # more than a ring of 64 has steps: a round made anew has its indices sent to the device anew
def make_rounds(tiles: tuple[Tile, ...], window_tokens: int | None, cpu: bool, n_queries: int) -> tuple[Round, ...]:
    """The kernel calls that ``tiles`` over ``n_queries`` rows of queries take, in order; ``cpu``: as the CPU kernel needs them cut."""
    pieces = [piece for tile in tiles if (piece := tile.trimmed(window_tokens)) is not None]
    if not any(_is_cut(piece, window_tokens) for piece in pieces):
        window_tokens = None
    if cpu:
        pieces = [part for piece in pieces for part in _cpu_pieces(piece, window_tokens)]
    packed: dict[tuple[Any, ...], list[list[Tile]]] = {}
    for piece in pieces:
        _pack(packed.setdefault(_mask_of(piece, window_tokens, cpu), []), piece)
    return tuple(_judged(packed, window_tokens, n_queries))


def _mask_of(tile: Tile, window_tokens: int | None, cpu: bool) -> tuple[Any, ...]:
    """What tiles of one kernel call must have in common; the first two entries are (causal, whether a window cuts)."""
    cut = _is_cut(tile, window_tokens) if cpu or tile.gap else window_tokens is not None  # CUDA: short spans go along with long ones
    mask = (tile.gap == 0, cut, tile.gap if cut else 0)
    return (*mask, tile.n_queries, tile.n_keys) if cpu else mask


def _is_cut(tile: Tile, window_tokens: int | None) -> bool:
    """Whether the window of the last query begins after the first key."""
    return window_tokens is not None and tile.n_queries - 1 + tile.lead - window_tokens >= 0


def _pack(rows: list[list[Tile]], tile: Tile) -> None:
    """Put a tile behind the last of the first row whose tiles all lie before it; open a row where there is none."""
    for row in rows:
        if row[-1].q_stop <= tile.q_start and row[-1].k_stop <= tile.k_start:
            row.append(tile)
            return
    rows.append([tile])


def _judged(packed: dict[tuple[Any, ...], list[list[Tile]]], window_tokens: int | None, n_queries: int) -> Iterator[Round]:
    n_keys = max((tile.k_stop for rows in packed.values() for row in rows for tile in row), default=0)
    seen_q, seen_k = bytearray(n_queries), bytearray(n_keys)
    for (causal, cut, *_), rows in packed.items():
        for row in rows:
            fresh = not any(1 in seen_q[tile.q_start : tile.q_stop] for tile in row)
            fresh_k = not any(1 in seen_k[tile.k_start : tile.k_stop] for tile in row)
            yield Round(tuple(row), causal, window_tokens if cut else None, fresh, fresh and fresh_k)
            for tile in row:
                seen_q[tile.q_start : tile.q_stop] = b"\1" * tile.n_queries
                seen_k[tile.k_start : tile.k_stop] = b"\1" * tile.n_keys


def _cpu_pieces(tile: Tile, window_tokens: int | None) -> Iterator[Tile]:
    """A tile as the CPU kernel can take it: a window is cut into short bands of queries, whose keys fit a mask of their own."""
    for part in [tile] if window_tokens is None or not _is_cut(tile, window_tokens) else _bands(tile, window_tokens):
        yield from [part] if _is_cut(part, window_tokens) else _squared(part)


def _squared(tile: Tile) -> list[Tile]:
    """The CPU kernel aligns its causal mask to the top left: only squares are causal, and what lies before them is full."""
    if tile.gap or tile.n_keys == tile.n_queries:
        return [tile]
    border = tile.k_stop - tile.n_queries
    return [Tile(tile.q_start, tile.q_stop, tile.k_start, border, tile.n_queries), tile._replace(k_start=border)]


def _bands(tile: Tile, window_tokens: int) -> Iterator[Tile]:
    for first in range(0, tile.n_queries, _LONGEST_BAND):
        last = min(first + _LONGEST_BAND, tile.n_queries) - 1
        n_keys = min(tile.n_keys, last + tile.lead + 1)
        gap = last + tile.lead - (n_keys - 1)
        band = Tile(tile.q_start + first, tile.q_start + last + 1, tile.k_start, tile.k_start + n_keys, gap)
        trimmed = band.trimmed(window_tokens)
        if trimmed is not None:
            yield trimmed
