"""Packing: documents into segments, as a segment table. No token is touched here, only lengths.

Choice, short window: a bin is a sequence shard of a segment, and no document is cut. Most documents fill bins in random
order, best-fit decreasing closes the gaps with the rest, and full bins are dealt into segments at random. Best-fit
alone would make segments of documents of one length; it serves where documents are too long for the varied packing. It
runs over *counts of equal lengths*, so its time grows with distinct lengths and bins, not with millions of documents.
Cost: up to two thousandths more segments than the tightest packing.

Choice, long window: a document longer than a segment first fills segments of its own. All rests form one stream, which
is cut where a segment is full and goes on in the next, so only the last, incomplete segment is lost. Cost: a later part
of a document is read without its beginning.
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

# tokens kept to fill gaps, in multiples of the expected room; the second is tried where the first is too few
_KEPT_BACK = (1.1, 1.25)
_WORTH_VARIETY = 0.002  # share of segments that the varied packing may need more than best-fit


@dataclass(frozen=True)
class Selection:
    """Documents, or parts of documents, in the order in which they are packed; int32 columns of one length.

    Attributes:
        source: index into the corpus' sources.
        document: index into the source's store.
        start: first token of the part within its document.
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
        """The entries of an index or a mask."""
        return Selection(self.source[index], self.document[index], self.start[index], self.length[index])


def whole_documents(source: np.ndarray, document: np.ndarray, length: np.ndarray) -> Selection:
    """Documents from their beginning."""
    columns = (
        np.asarray(column).astype(np.int32, copy=False)
        for column in (source, document, np.zeros(len(length), np.int32), length)
    )
    return Selection(*columns)


def concatenate(parts: Sequence[Selection]) -> Selection:
    """One selection after the other."""
    empty = np.zeros(0, np.int32)
    columns = ("source", "document", "start", "length")
    return Selection(*(np.concatenate([empty, *(getattr(part, column) for part in parts)]) for column in columns))


def split_short(documents: Selection, limit_tokens: int) -> Selection:
    """The same tokens in parts of at most ``limit_tokens``: of each document, full parts and then its rest."""
    if not len(documents) or documents.length.max() <= limit_tokens:
        return documents
    owner = np.repeat(np.arange(len(documents)), -(-documents.length // limit_tokens))  # the document of each part
    parts = documents.take(owner)
    begin = _within(np.full(len(parts), limit_tokens), owner).astype(np.int32)
    return Selection(
        parts.source, parts.document, parts.start + begin, np.minimum(parts.length - begin, np.int32(limit_tokens))
    )


def sequence_shards(align_sp: Any) -> int:
    """Number of equal sequence shards of a segment whose borders serve each sp asked for: the least common multiple.

    Args:
        align_sp: ``data.align_sp``, a number or a list of numbers.

    Raises:
        UserError: the value is neither a number nor a list of numbers, or a number is below 1.
    """
    asked = list(align_sp) if isinstance(align_sp, list | tuple) else [align_sp]
    if not asked or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in asked):
        raise UserError(
            f"data.align_sp={align_sp} is not a number of sequence shards of at least 1, or a list of such numbers; "
            "set it to 8 or [8, 16]"
        )
    return lcm(*asked)


def check_sequence_shards(segment_tokens: int, align_sp: int, limit_tokens: int) -> int:
    """Tokens of a sequence shard.

    Args:
        segment_tokens: T.
        align_sp: sequence shards of a segment.
        limit_tokens: longest document.

    Raises:
        UserError: T is not divisible by align_sp, or the longest document does not fit a sequence shard.
    """
    if segment_tokens % align_sp:
        raise UserError(
            f"data.segment_tokens={segment_tokens} is not divisible by the {align_sp} sequence shards of data.align_sp "
            "(for a list: its least common multiple); set data.align_sp to such as "
            f"{max(n for n in range(1, align_sp) if segment_tokens % n == 0)}"
        )
    shard_tokens = segment_tokens // align_sp
    if limit_tokens > shard_tokens:
        raise UserError(
            f"a short document of {limit_tokens} tokens does not fit a sequence shard of data.segment_tokens / "
            f"data.align_sp = {shard_tokens} tokens; set data.align_sp to {max(1, segment_tokens // limit_tokens)} or "
            "less"
        )
    return shard_tokens


def pack_short(
    documents: Selection, segment_tokens: int, align_sp: int = 1, rng: np.random.Generator | None = None
) -> SegmentTable:
    """Uncut documents into segments; no document crosses a border between sequence shards.

    Args:
        documents: short ones, in the order in which they are packed.
        segment_tokens: T.
        align_sp: equal sequence shards of a segment. Under sequence parallelism over as many ranks, or a divisor of
            them, attention inside these documents needs no communication.
        rng: mixes lengths inside sequence shards, orders them, and deals sequence shards into segments. None is plain
            best-fit decreasing.

    Raises:
        UserError: T is not divisible by align_sp, or a document is longer than a sequence shard.
    """
    shard_tokens = check_sequence_shards(segment_tokens, align_sp, int(documents.length.max(initial=0)))
    shard = (
        best_fit(documents.length, shard_tokens)
        if rng is None
        else _varied(documents.length, shard_tokens, align_sp, rng)
    )
    if rng is not None and len(shard):
        shuffled = rng.permutation(len(documents))
        documents, shard = (
            documents.take(shuffled),
            rng.permutation(int(shard.max()) + 1).astype(np.int32)[shard[shuffled]],
        )
    order = np.argsort(shard, kind="stable")
    documents, shard = documents.take(order), shard[order]
    offset = _within(documents.length, shard) + shard % align_sp * shard_tokens
    return _table(
        shard // align_sp, documents, documents.start, documents.start + documents.length, offset, segment_tokens
    )


def _varied(length: np.ndarray, capacity: int, align_sp: int, rng: np.random.Generator) -> np.ndarray:
    """Bins of varied lengths where they make hardly more segments than best-fit, else the bins of best-fit."""
    tight = best_fit(length, capacity)
    most = (1 + _WORTH_VARIETY) * -(-(int(tight.max(initial=-1)) + 1) // align_sp)
    for kept_back in _KEPT_BACK:
        varied = varied_fit(length, capacity, rng, kept_back)
        if -(-(int(varied.max(initial=-1)) + 1) // align_sp) <= most:
            return varied
    return tight


def varied_fit(length: np.ndarray, capacity: int, rng: np.random.Generator, kept_back: float) -> np.ndarray:
    """Bin of each length: most documents fill bins in random order, and best-fit closes the gaps with the others.

    Best-fit alone makes bins of equal lengths. In random order, a bin is closed where the next document does not fit.
    The documents that are kept for the gaps have about as many tokens as the expected room: half of them are the
    shortest documents, which fill the last gaps, and half are a random part of all. The expected room of a bin is the
    mean square of the lengths over twice their mean (renewal theory).

    Args:
        length: of each document, at most the capacity.
        capacity: of a bin.
        rng: decides the order, and which documents are kept for the gaps.
        kept_back: tokens for the gaps, in multiples of the expected room; too few leave gaps, too many make bins of
            their own.

    Returns:
        int32 [documents], bins numbered without gaps; no bin is empty.
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
    """Bin of each length by best-fit decreasing: the longest first, each into the fullest bin that has room for it.

    Equal lengths are placed together: a bin with room r takes r // length of them at once. One at a time would give the
    same.

    Args:
        length: of each document, at most the capacity.
        capacity: of a bin.
        rooms: room left in bins that are partly filled; these bins are numbered first.

    Returns:
        int32 [documents], bins numbered without gaps; no bin is empty.
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
        """The smallest sufficient room and enough of its bins for ``count`` documents; new bins where none suffices."""
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
        """Note the room of bins; a full bin is forgotten."""
        if not len(bins) or not room:
            return
        if room not in self._open:
            insort(self._rooms, room)
        self._open.setdefault(room, []).append(bins)


def _within(length: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int64: where each length begins inside its group; groups are sorted."""
    before = np.cumsum(length, dtype=np.int64) - length
    return before - before[np.searchsorted(group, group)]


def _table(
    segment: np.ndarray, origin: Selection, start: np.ndarray, stop: np.ndarray, offset: np.ndarray, segment_tokens: int
) -> SegmentTable:
    columns = (segment, origin.source, origin.document, start, stop, offset)
    return SegmentTable(*(column.astype(np.int32, copy=False) for column in columns), segment_tokens=segment_tokens)


def pack_long(documents: Selection, segment_tokens: int) -> SegmentTable:
    """Segments that one document fills each, then one stream of the rest, cut into full segments.

    A document of at least T tokens fills segments of its own from its beginning, so the longest dependencies stay
    whole. Its rest joins the stream. The stream's last, incomplete segment is left out: its padding would lie inside an
    attention span over the whole segment.

    Args:
        documents: long ones, in the order in which they are packed.
        segment_tokens: T.
    """
    filled = documents.length // segment_tokens
    alone = _fill_segments(documents, filled, segment_tokens)
    left = documents.length > filled * segment_tokens
    stream = _cut_stream(documents.take(left), (filled * segment_tokens)[left], segment_tokens)
    shifted = (stream.segment + np.int32(alone.n_segments), *(getattr(stream, column) for column in COLUMNS[1:]))
    columns = (np.concatenate([getattr(alone, name), column]) for name, column in zip(COLUMNS, shifted, strict=True))
    return SegmentTable(*columns, segment_tokens=segment_tokens)


def _fill_segments(documents: Selection, filled: np.ndarray, segment_tokens: int) -> SegmentTable:
    """``filled[d]`` whole segments of document d, from its beginning."""
    owner = np.repeat(np.arange(len(documents)), filled)
    origin = documents.take(owner)
    start = origin.start + _within(np.full(len(owner), segment_tokens), owner)
    return _table(np.arange(len(owner)), origin, start, start + segment_tokens, np.zeros(len(owner)), segment_tokens)


def _cut_stream(documents: Selection, first: np.ndarray, segment_tokens: int) -> SegmentTable:
    """Each document from its token ``first[d]`` on, one after the other, cut into full segments."""
    length = documents.length - first
    end = int(length.sum(dtype=np.int64)) // segment_tokens * segment_tokens
    begins = np.cumsum(length, dtype=np.int64) - length
    # A document span begins where a document or a segment begins, and ends where the next span begins.
    cuts = np.unique(np.concatenate([begins[begins < end], np.arange(0, end, segment_tokens)]))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    origin = documents.take(owner)
    start = origin.start + first[owner] + (cuts - begins[owner])
    segment, offset = np.divmod(cuts, segment_tokens)
    return _table(segment, origin, start, start + np.diff(cuts, append=end), offset, segment_tokens)
