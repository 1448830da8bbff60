"""Documents into segments: the plan, a table of pieces. No token is touched here, only lengths.

Choice, short window: best-fit decreasing over *counts of equal lengths*, so the cost grows with the number of distinct lengths and bins and
not with millions of documents, and no document is cut. Cost: documents of like length meet in one segment (the loader permutes segments).
Choice, long window: one stream of documents, cut where a segment is full; the document goes on in the next segment, so nothing is thrown
away but the stream's last, incomplete segment. Cost: a document's later part is read without its beginning.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lr2train.config import OverLong, UserError
from lr2train.data.buckets import Selection

COLUMNS = ("segment", "source", "document", "start", "stop", "offset")


@dataclass(frozen=True)
class Pieces:
    """The plan of one window: tokens [start, stop) of a document stand at ``offset`` of a segment. Sorted by (segment, offset), every
    segment occupied.

    Attributes:
        segment, document, start, stop, offset: int64 [pieces].
        source: int16 [pieces], index into the corpus' sources.
        segment_tokens: T.
    """

    segment: np.ndarray
    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    offset: np.ndarray
    segment_tokens: int

    @property
    def n_segments(self) -> int:
        """Segments of this window."""
        return int(self.segment[-1]) + 1 if len(self.segment) else 0

    @property
    def tokens(self) -> int:
        """Planned tokens, padding not counted."""
        return int((self.stop - self.start).sum())

    @property
    def padding_share(self) -> float:
        """Positions that hold no token, as a share of all."""
        room = self.n_segments * self.segment_tokens
        return 1.0 - self.tokens / room if room else 0.0

    @cached_property
    def _first(self) -> np.ndarray:
        return np.searchsorted(self.segment, np.arange(self.n_segments + 1))

    def rows(self, segment: int) -> range:
        """Rows of the table that make up one segment."""
        return range(int(self._first[segment]), int(self._first[segment + 1]))


def pack_short(documents: Selection, segment_tokens: int, align_sp: int = 1) -> Pieces:
    """Whole documents into segments; none crosses a border of ``align_sp`` equal shards.

    Args:
        documents: short ones, in planned order.
        segment_tokens: T.
        align_sp: shards of a segment; with sequence parallelism over as many ranks, attention inside these documents needs no
            communication.

    Raises:
        UserError: T is not divisible by align_sp, or a document is longer than a shard.
    """
    if segment_tokens % align_sp:
        raise UserError(
            f"data.segment_tokens={segment_tokens} is not divisible by data.align_sp={align_sp}; set data.align_sp to a divisor"
        )
    shard_tokens = segment_tokens // align_sp
    longest = int(documents.length.max(initial=0))
    if longest > shard_tokens:
        raise UserError(
            f"a short document of {longest} tokens does not fit a shard of data.segment_tokens / data.align_sp = {shard_tokens} tokens; "
            f"set data.align_sp to {max(1, segment_tokens // longest)} or less"
        )
    shard = best_fit(documents.length, shard_tokens)
    order = np.argsort(shard, kind="stable")
    documents, shard = documents.take(order), shard[order]
    offset = _offsets_within(documents.length, shard) + shard % align_sp * shard_tokens
    zeros = np.zeros(len(documents), np.int64)
    return Pieces(shard // align_sp, documents.source, documents.document, zeros, documents.length, offset, segment_tokens)


def best_fit(length: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each document by best-fit decreasing: the longest first, each into the fullest bin that still holds it.

    Equal lengths are placed together: a bin with room r takes r // length of them at once, which is what one at a time would do.
    """
    bins, bin_of = _Bins(capacity), np.empty(len(length), np.int64)
    order = np.argsort(-length, kind="stable")
    values, counts = np.unique(length, return_counts=True)
    first = 0
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bin_of[order[first : first + count]] = bins.place(value, count)
        first += count
    return bin_of


class _Bins:
    """Bins known by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._n_bins = 0
        self._rooms: list[int] = []  # sorted keys of _open
        self._open: dict[int, list[np.ndarray]] = {}

    def place(self, length: int, count: int) -> np.ndarray:
        """The bins of ``count`` documents of one length."""
        placed = []
        while count:
            room, bins = self._tightest(length, count)
            each = room // length
            documents = np.repeat(bins, each)[:count]
            last = len(documents) - each * (len(bins) - 1)  # the last bin may get fewer
            self._put(room - each * length, bins[:-1])
            self._put(room - last * length, bins[-1:])
            placed.append(documents)
            count -= len(documents)
        return np.concatenate(placed)

    def _tightest(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """The smallest room that holds the length, with as many of its bins as ``count`` documents need; new bins where there is none."""
        at = bisect_left(self._rooms, length)
        if at == len(self._rooms):
            needed = -(-count // (self._capacity // length))
            self._n_bins += needed
            return self._capacity, np.arange(self._n_bins - needed, self._n_bins)
        room = self._rooms.pop(at)
        bins = np.concatenate(self._open.pop(room))
        needed = -(-count // (room // length))
        self._put(room, bins[needed:])
        return room, bins[:needed]

    def _put(self, room: int, bins: np.ndarray) -> None:
        if not len(bins) or not room:
            return
        if room not in self._open:
            insort(self._rooms, room)
        self._open.setdefault(room, []).append(bins)


def _offsets_within(length: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Where each length begins inside its group; groups are sorted."""
    before = np.cumsum(length) - length
    return before - before[np.searchsorted(group, group)]


@dataclass(frozen=True)
class Lost:
    """Tokens of long documents that no segment holds, by cause."""

    tail: int = 0  # after the last full segment
    truncated: int = 0  # over_long=truncate
    dropped: int = 0  # over_long=drop


def pack_long(documents: Selection, segment_tokens: int, over_long: OverLong = OverLong.split) -> tuple[Pieces, Lost]:
    """Segments filled by one document each, then one stream of all the rest, cut into full segments.

    A document of at least T tokens fills segments of its own from its beginning: the longest dependencies stay whole. What is left of it joins the stream.

    Args:
        documents: long ones, in planned order.
        segment_tokens: T.
        over_long: a document longer than T goes on in the next segments (split), keeps its first T tokens (truncate), or is left out (drop).
    """
    total = documents.tokens
    dropped = truncated = 0
    if over_long is OverLong.drop:
        documents = documents.take(documents.length <= segment_tokens)
        dropped = total - documents.tokens
    elif over_long is OverLong.truncate:
        documents = Selection(documents.source, documents.document, np.minimum(documents.length, segment_tokens))
        truncated = total - documents.tokens
    filled = documents.length // segment_tokens
    alone = _fill_segments(documents, filled, segment_tokens)
    rest = documents.take(documents.length > filled * segment_tokens)
    stream = _cut_stream(rest, rest.length // segment_tokens * segment_tokens, segment_tokens)
    pieces = Pieces(
        *(
            np.concatenate([getattr(alone, column), getattr(stream, column) + (alone.n_segments if column == "segment" else 0)])
            for column in COLUMNS
        ),
        segment_tokens=segment_tokens,
    )
    return pieces, Lost(documents.tokens - pieces.tokens, truncated, dropped)


def _fill_segments(documents: Selection, filled: np.ndarray, segment_tokens: int) -> Pieces:
    """``filled[d]`` whole segments of document d, from its beginning."""
    owner = np.repeat(np.arange(len(documents)), filled)
    start = _offsets_within(np.full(len(owner), segment_tokens), owner)
    zeros = np.zeros(len(owner), np.int64)
    return Pieces(
        np.arange(len(owner)), documents.source[owner], documents.document[owner], start, start + segment_tokens, zeros, segment_tokens
    )


def _cut_stream(documents: Selection, first: np.ndarray, segment_tokens: int) -> Pieces:
    """The documents from token ``first[d]`` on, one after the other. A piece begins where a document or a segment does, and ends where the next begins."""
    length = documents.length - first
    end = int(length.sum()) // segment_tokens * segment_tokens
    begins = np.cumsum(length) - length
    cuts = np.unique(np.concatenate([begins[begins < end], np.arange(0, end, segment_tokens)]))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    start = cuts - begins[owner] + first[owner]
    stop = start + np.diff(cuts, append=end)
    segment, offset = np.divmod(cuts, segment_tokens)
    return Pieces(segment, documents.source[owner], documents.document[owner], start, stop, offset, segment_tokens)
