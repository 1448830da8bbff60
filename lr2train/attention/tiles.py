"""Tiles: which queries see which keys, in plain integers.

A tile is a rectangle of the attention matrix: consecutive queries over consecutive keys, all of one document. The
documents of a packed segment are square tiles on the diagonal: together they are the document mask, whose borders
flash-attn calls cu_seqlens. A step of a ring is a few tiles between one rank's queries and another rank's keys.
``blocks.py`` turns tiles into kernel calls.

Choice: masks are decided here, from Python ints, once for a segment. Layers build no mask and ask no device. Cost: only
causal, full and sliding-window masks can be expressed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import itemgetter
from typing import NamedTuple

Spans = tuple[tuple[int, int], ...]
"""Document spans: half-open (start, stop) token ranges of a segment, sorted and disjoint."""


class Tile(NamedTuple):
    """Queries [q_start, q_stop) over keys [k_start, k_stop), as rows of two tensors that may differ.

    ``gap`` is the position of the last query minus the position of the last key. Two kinds of tile exist:

    - gap = 0: a causal triangle, aligned to the bottom right. It has at least as many keys as queries.
    - gap >= n_queries: all keys lie before all queries. Every query sees every key, up to a sliding window.
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
        """Query i of the tile stands ``lead`` tokens after key i, so query i sees the keys j <= i + lead."""
        return self.n_keys - self.n_queries + self.gap

    def trimmed(self, sliding_window: int | None) -> Tile | None:
        """The tile without keys that no query sees and without queries that see no key; None when nothing is left."""
        if sliding_window is None:
            return self
        unseen = max(0, self.lead - sliding_window + 1)  # keys before the first query's window
        last_window = self.n_queries - 1 + self.lead - sliding_window + 1  # the first key that the last query sees
        blind = max(0, last_window - (self.n_keys - 1))  # queries whose window begins after the last key
        if unseen >= self.n_keys or blind >= self.n_queries:
            return None
        return Tile(self.q_start, self.q_stop - blind, self.k_start + unseen, self.k_stop, self.gap - blind)

    def pairs(self, sliding_window: int | None = None) -> int:
        """Number of (query, key) pairs of the tile."""
        seen = _triangle(self.n_queries, self.lead, self.n_keys)
        if sliding_window is None:
            return seen
        return seen - _triangle(self.n_queries, self.lead - sliding_window, self.n_keys)


def _triangle(n_queries: int, lead: int, n_keys: int) -> int:
    """Sum over queries i of the number of keys j <= i + lead."""
    below = min(max(0, -lead), n_queries)  # queries that see no key
    full = min(max(0, n_queries - (n_keys - 1 - lead)), n_queries - below)  # queries that see every key
    between = n_queries - below - full
    return full * n_keys + between * (below + lead + 1) + between * (between - 1) // 2


def check_spans(spans: Spans, n_tokens: int) -> None:
    """Assert that ``spans`` are sorted, disjoint, non-empty ranges of ``n_tokens`` tokens.

    Other spans would be computed, to wrong numbers.
    """
    borders = [0, *(border for span in spans for border in span), n_tokens]
    fits = borders == sorted(borders) and all(start < stop for start, stop in spans)
    assert fits, f"spans {spans} are not sorted, disjoint, non-empty ranges of {n_tokens} tokens"


def touching(spans: Spans, start: int, stop: int) -> Spans:
    """The spans that have a token in [start, stop)."""
    return spans[bisect_right(spans, start, key=itemgetter(1)) : bisect_left(spans, stop, key=itemgetter(0))]


def diagonal(spans: Spans, causal: bool = True) -> tuple[Tile, ...]:
    """The tiles of a packed segment that one rank holds whole: one square per document."""
    return tuple(Tile(start, stop, start, stop, 0 if causal else stop - start) for start, stop in spans)
