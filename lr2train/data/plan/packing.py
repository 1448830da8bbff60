"""Documents into segments: the plan, a table of pieces. No token is touched here, only lengths.

Choice, short window: a bin is a shard of a segment, and nothing is cut. Most documents fill bins in random order, best-fit decreasing closes
their gaps with the rest, and full bins are dealt into segments at random. Best-fit alone, which would make segments of documents of one
length, serves where documents are too long for that. It runs over *counts of equal lengths*, so its cost grows with the number of distinct
lengths and bins and not with millions of documents. Cost: up to two thousandths more segments than the tightest packing.
Choice, long window: one stream of documents, cut where a segment is full; the document goes on in the next segment, so nothing is thrown
away but the stream's last, incomplete segment. Cost: a document's later part is read without its beginning.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.data.plan.segment_table import COLUMNS, SegmentTable

_KEPT_BACK = (1.1, 1.25)  # tokens that are kept to fill gaps with, in multiples of the room that is expected: the first that does
_WORTH_VARIETY = 0.002  # more segments, as a share


@dataclass(frozen=True)
class Selection:
    """SegmentTable of documents in the order in which they are planned; int32 columns of one length.

    Attributes:
        source: index into the corpus' sources.
        document: index into that source's store.
        start: first token of the piece within its document.
        length: tokens.
    """

    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.length.sum(dtype=np.int64))

    def take(self, index: np.ndarray) -> Selection:
        """The rows of an index or a mask."""
        return Selection(self.source[index], self.document[index], self.start[index], self.length[index])


def whole_documents(source: np.ndarray, document: np.ndarray, length: np.ndarray) -> Selection:
    """Documents from their beginning."""
    columns = (np.asarray(column).astype(np.int32, copy=False) for column in (source, document, np.zeros(len(length), np.int32), length))
    return Selection(*columns)


def concatenate(parts: Sequence[Selection]) -> Selection:
    """One selection after the other."""
    empty = np.zeros(0, np.int32)
    columns = ("source", "document", "start", "length")
    return Selection(*(np.concatenate([empty, *(getattr(part, column) for part in parts)]) for column in columns))


def split(pieces: Selection, limit_tokens: int) -> Selection:
    """The same tokens in pieces of at most ``limit_tokens``: full ones, and what is left over of each."""
    if not len(pieces) or pieces.length.max() <= limit_tokens:
        return pieces
    parts = -(-pieces.length // limit_tokens)
    whole = pieces.take(np.repeat(np.arange(len(pieces)), parts))
    begin = _within(np.full(len(whole), limit_tokens), np.repeat(np.arange(len(pieces)), parts)).astype(np.int32)
    return Selection(whole.source, whole.document, whole.start + begin, np.minimum(whole.length - begin, np.int32(limit_tokens)))


def sequence_shards(align_sp: Any) -> int:
    """Equal shards of a segment whose borders are those of every sp asked for: their least common multiple.

    Args:
        align_sp: ``data.align_sp``, a number or a list of numbers.

    Raises:
        UserError: anything else, or a number below 1.
    """
    asked = list(align_sp) if isinstance(align_sp, list | tuple) else [align_sp]
    if not asked or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in asked):
        raise UserError(f"data.align_sp={align_sp} is not a number of shards, or a list of them, of at least 1; set it to 8 or [8, 16]")
    return lcm(*asked)


def check_sequence_shards(segment_tokens: int, align_sp: int, limit_tokens: int) -> int:
    """Tokens of a shard.

    Raises:
        UserError: T is not divisible by align_sp, or pieces of ``limit_tokens`` do not fit a shard.
    """
    if segment_tokens % align_sp:
        raise UserError(
            f"data.segment_tokens={segment_tokens} is not divisible by {align_sp} shards, which is what data.align_sp asks for (of a list the least "
            f"common multiple); set data.align_sp to such as {max(n for n in range(1, align_sp) if segment_tokens % n == 0)}"
        )
    shard_tokens = segment_tokens // align_sp
    if limit_tokens > shard_tokens:
        raise UserError(
            f"a short document of {limit_tokens} tokens does not fit a shard of data.segment_tokens / data.align_sp = {shard_tokens} tokens; "
            f"set data.align_sp to {max(1, segment_tokens // limit_tokens)} or less"
        )
    return shard_tokens


def pack_short(pieces: Selection, segment_tokens: int, align_sp: int = 1, rng: np.random.Generator | None = None) -> SegmentTable:
    """Whole pieces into segments; none crosses a border of ``align_sp`` equal shards.

    Args:
        pieces: short ones, in planned order.
        segment_tokens: T.
        align_sp: shards of a segment; with sequence parallelism over as many ranks, or a divisor of it, attention inside these documents
            needs no communication.
        rng: mixes lengths inside shards, their order, and shards inside segments. None is plain best-fit decreasing in its own order.

    Raises:
        UserError: T is not divisible by align_sp, or a piece is longer than a shard.
    """
    shard_tokens = check_sequence_shards(segment_tokens, align_sp, int(pieces.length.max(initial=0)))
    shard = best_fit(pieces.length, shard_tokens) if rng is None else _varied(pieces.length, shard_tokens, align_sp, rng)
    if rng is not None and len(shard):
        shuffled = rng.permutation(len(pieces))
        pieces, shard = pieces.take(shuffled), rng.permutation(int(shard.max()) + 1).astype(np.int32)[shard[shuffled]]
    order = np.argsort(shard, kind="stable")
    pieces, shard = pieces.take(order), shard[order]
    offset = _within(pieces.length, shard) + shard % align_sp * shard_tokens
    return _table(shard // align_sp, pieces, pieces.start, pieces.start + pieces.length, offset, segment_tokens)


def _varied(length: np.ndarray, capacity: int, align_sp: int, rng: np.random.Generator) -> np.ndarray:
    """Bins of varied lengths where that makes hardly more segments than best-fit does, else best-fit's."""
    tight = best_fit(length, capacity)
    most = (1 + _WORTH_VARIETY) * -(-(int(tight.max(initial=-1)) + 1) // align_sp)
    for kept_back in _KEPT_BACK:
        varied = varied_fit(length, capacity, rng, kept_back)
        if -(-(int(varied.max(initial=-1)) + 1) // align_sp) <= most:
            return varied
    return tight


def varied_fit(length: np.ndarray, capacity: int, rng: np.random.Generator, kept_back: float) -> np.ndarray:
    """Bin of each length: most documents in random order, each bin closed where the next one does not fit; best-fit of the others into what
    room is left.

    Best-fit alone makes bins of equal lengths. The others are about as many tokens as the room left is expected to be, half of them the
    shortest documents, which fill the last gaps, half a random part of all. That room is half a document a bin, as the end of a bin meets
    documents: the mean square of the lengths over twice their mean (renewal theory).

    Args:
        length: of each document, at most the capacity.
        capacity: of a bin.
        rng: decides the order, and which documents are kept for the gaps.
        kept_back: tokens for the gaps, in multiples of the expected room; too few leave gaps, too many make bins of their own.

    Returns:
        int32, numbered without gaps; every bin holds something.
    """
    if not len(length):
        return np.zeros(0, np.int32)
    tokens, squares = length.sum(dtype=np.int64), np.square(length, dtype=np.float64).sum()
    share = min(kept_back * squares / (2 * tokens) / capacity, 1.0)
    ascending = np.argsort(length, kind="stable")
    shortest = ascending[np.cumsum(length[ascending], dtype=np.int64) <= share / 2 * tokens]
    last = rng.random(len(length)) < share / 2
    last[shortest] = True
    first, others = rng.permutation(np.flatnonzero(~last)), np.flatnonzero(last)
    bin_of = np.empty(len(length), np.int32)
    bin_of[first], rooms = _next_fit(length[first], capacity)
    bin_of[others] = best_fit(length[others], capacity, rooms)
    return bin_of


def _next_fit(length: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin of each length, in the order given, and the room that is left in each bin."""
    ends = np.cumsum(length, dtype=np.int64)
    marks, base, at = ends.tolist(), 0, [0]
    while at[-1] < len(marks):
        at.append(bisect_right(marks, base + capacity, at[-1]))
        base = marks[at[-1] - 1]
    sizes = np.diff(at)
    used = np.diff(ends[np.array(at[1:], int) - 1], prepend=0)
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), capacity - used


def best_fit(length: np.ndarray, capacity: int, rooms: np.ndarray | None = None) -> np.ndarray:
    """Bin of each length by best-fit decreasing: the longest first, each into the fullest bin that still holds it.

    Equal lengths are placed together: a bin with room r takes r // length of them at once, which is what one at a time would do.

    Args:
        length: of each document, at most the capacity.
        capacity: of a bin.
        rooms: left in bins that hold something already; they are numbered first.

    Returns:
        int32, numbered without gaps; every bin holds something.
    """
    bins, bin_of = _Bins(capacity, np.zeros(0, int) if rooms is None else rooms), np.empty(len(length), np.int32)
    order = np.argsort(-length, kind="stable")
    values, counts = np.unique(length, return_counts=True)
    first = 0
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bin_of[order[first : first + count]] = bins.place(value, count)
        first += count
    return bin_of


class _Bins:
    """Bins known by the room that is left in them."""

    def __init__(self, capacity: int, rooms: np.ndarray) -> None:
        self._capacity, self._n_bins = capacity, len(rooms)
        order = np.argsort(rooms, kind="stable").astype(np.int32)
        values, first = np.unique(rooms[order], return_index=True)
        groups = dict(zip(values.tolist(), np.split(order, first[1:]), strict=False))
        self._open: dict[int, list[np.ndarray]] = {room: [bins] for room, bins in groups.items() if room}
        self._rooms: list[int] = list(self._open)  # sorted keys of _open

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
            return self._capacity, np.arange(self._n_bins - needed, self._n_bins, dtype=np.int32)
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


def _within(length: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Where each length begins inside its group, int64; groups are sorted."""
    before = np.cumsum(length, dtype=np.int64) - length
    return before - before[np.searchsorted(group, group)]


def _table(
    segment: np.ndarray, origin: Selection, start: np.ndarray, stop: np.ndarray, offset: np.ndarray, segment_tokens: int
) -> SegmentTable:
    columns = (segment, origin.source, origin.document, start, stop, offset)
    return SegmentTable(*(column.astype(np.int32, copy=False) for column in columns), segment_tokens=segment_tokens)


def pack_long(pieces: Selection, segment_tokens: int) -> SegmentTable:
    """Segments filled by one document each, then one stream of all the rest, cut into full segments.

    A piece of at least T tokens fills segments of its own from its beginning: the longest dependencies stay whole. What is left of it joins
    the stream. The stream's last, incomplete segment is left out: it would need padding inside a span that covers the whole segment.

    Args:
        pieces: long ones, in planned order.
        segment_tokens: T.
    """
    filled = pieces.length // segment_tokens
    alone = _fill_segments(pieces, filled, segment_tokens)
    left = pieces.length > filled * segment_tokens
    stream = _cut_stream(pieces.take(left), (filled * segment_tokens)[left], segment_tokens)
    shifted = (stream.segment + np.int32(alone.n_segments), *(getattr(stream, column) for column in COLUMNS[1:]))
    columns = (np.concatenate([getattr(alone, name), column]) for name, column in zip(COLUMNS, shifted, strict=True))
    return SegmentTable(*columns, segment_tokens=segment_tokens)


def _fill_segments(pieces: Selection, filled: np.ndarray, segment_tokens: int) -> SegmentTable:
    """``filled[d]`` whole segments of piece d, from its beginning."""
    owner = np.repeat(np.arange(len(pieces)), filled)
    origin = pieces.take(owner)
    start = origin.start + _within(np.full(len(owner), segment_tokens), owner)
    return _table(np.arange(len(owner)), origin, start, start + segment_tokens, np.zeros(len(owner)), segment_tokens)


def _cut_stream(pieces: Selection, first: np.ndarray, segment_tokens: int) -> SegmentTable:
    """The pieces from their token ``first[d]`` on, one after the other. A row begins where a piece or a segment does, and ends where the next begins."""
    length = pieces.length - first
    end = int(length.sum(dtype=np.int64)) // segment_tokens * segment_tokens
    begins = np.cumsum(length, dtype=np.int64) - length
    cuts = np.unique(np.concatenate([begins[begins < end], np.arange(0, end, segment_tokens)]))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    origin = pieces.take(owner)
    start = origin.start + first[owner] + (cuts - begins[owner])
    segment, offset = np.divmod(cuts, segment_tokens)
    return _table(segment, origin, start, start + np.diff(cuts, append=end), offset, segment_tokens)
