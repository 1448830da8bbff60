"""A planned segment as arrays: its document spans are copied straight out of the mapped token shards.

Choice: ids are copied as they are stored, and nothing is made for a token that the device can make. One by one the host
looks only at the end of each document span, at padding, and at tokens that are not learned. Cost: a model cannot take a
``Batch`` as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lr2train.data.batch import IGNORE, Batch
from lr2train.data.feed.readahead import ReadAhead
from lr2train.data.plan.segment_table import SegmentTable
from lr2train.data.store import SourceStore, Store


class TokenShard(NamedTuple):
    """One token shard of a source as plain arrays over its mapped files.

    Plain, because slicing a numpy.memmap costs as much as copying a small document.
    """

    store: Store
    flat: np.ndarray  # all tokens, back to back
    starts: np.ndarray  # where each document begins in flat
    lengths: np.ndarray
    masked: bool  # some tokens are not learned
    read_ahead: ReadAhead

    @classmethod
    def of(cls, store: Store) -> TokenShard:
        """The arrays of an opened store."""
        flat, starts, lengths = (np.asarray(array) for array in (store.flat, store.starts, store.lengths))
        masked = len(store) > 0 and store.is_target(0, 0, 1) is not None
        return cls(store, flat, starts, lengths, masked, ReadAhead(store.flat))


class SpanTokens(NamedTuple):
    """Where the tokens of a document span lie, and what its labels need beyond these tokens."""

    flat: np.ndarray
    begin: int  # index into flat of the span's first token
    cut: bool  # the document goes on after the span; its next token, perhaps in another segment, is a target
    # bool: which labels are learned (without the IGNORE of a document's end); None where all are
    learned: np.ndarray | None


# [start, stop) in the segment, and the tokens that stand there
PlacedSpans = Sequence[tuple[tuple[int, int], SpanTokens]]


class SourceTokens:
    """The documents of a source, to be copied out of.

    Args:
        store: of the source.
        at_once: opens all token shards now, so that a broken one is found before training; else each when it is read.
    """

    def __init__(self, store: SourceStore, at_once: bool = True) -> None:
        self._store, self._first = store, store.first
        self._shards: dict[int, TokenShard] = {}
        for number in range(len(self._first) - 1 if at_once else 0):
            self._shard(number)

    def _shard(self, number: int) -> TokenShard:
        if number not in self._shards:
            self._shards[number] = TokenShard.of(self._store.shard(number))
        return self._shards[number]

    def find(self, document: int, start: int, stop: int) -> SpanTokens:
        """Tokens [start, stop) of a document; the disk is asked for them without waiting."""
        number = bisect_right(self._first, document) - 1
        shard, local = self._shard(number), document - self._first[number]
        begin, cut = shard.starts.item(local), stop < shard.lengths.item(local)
        shard.read_ahead(begin + start, begin + stop + cut)
        # The label at a place is the next token, so the mask is one token later than the span.
        learned = shard.store.is_target(local, start + 1, stop + cut) if shard.masked else None
        return SpanTokens(shard.flat, begin + start, cut, learned)


def find_spans(table: SegmentTable, segment: int, sources: Sequence[SourceTokens]) -> PlacedSpans:
    """The document spans of a segment in order, and where their tokens lie."""
    rows = table.spans_of(segment)
    columns = (table.source, table.document, table.start, table.stop, table.offset)
    spans = zip(*(column[rows.start : rows.stop].tolist() for column in columns), strict=True)
    return [
        ((at, at + stop - start), sources[source].find(document, start, stop))
        for source, document, start, stop, at in spans
    ]


def assemble(spans: PlacedSpans, segment_tokens: int, window: str, whole: bool, padding: int) -> Batch:
    """The document spans of one segment as a batch.

    Args:
        spans: at least one.
        segment_tokens: T.
        window: ``short`` or ``long``.
        whole: one attention span over the whole segment, with positions 0 … T-1; else an attention span for each
            document span.
        padding: token id where no document span is; there is no target, no attention, and position 0.
    """
    tokens = np.empty(segment_tokens, spans[0][1].flat.dtype)  # one tokenizer, so one dtype in all stores
    gaps, filled = [], 0
    for (at, end), (flat, begin, _, _) in spans:
        if filled < at:
            gaps.append((filled, at))
        tokens[at:end] = flat[begin : begin + end - at]
        filled = end
    if filled < segment_tokens:
        gaps.append((filled, segment_tokens))
    for begin, end in gaps:
        tokens[begin:end] = padding
    attention_spans = ((0, segment_tokens),) if whole else tuple(span for span, _ in spans)
    return Batch(tokens, _breaks(spans, gaps), attention_spans, window)


def _breaks(spans: PlacedSpans, gaps: Sequence[tuple[int, int]]) -> np.ndarray:
    """``Batch.breaks``: ends of document spans, padding, and places before a token that is not learned."""
    ends = np.array([(end - 1, _last_label(end - at, one)) for (at, end), one in spans], np.int64).T
    ignored = [np.arange(begin, end) for begin, end in gaps]
    # The last label of a span is among the ends already.
    ignored += [
        at + np.flatnonzero(~one.learned[: end - at - 1]) for (at, end), one in spans if one.learned is not None
    ]
    if not ignored:
        return ends
    places = np.concatenate(ignored)
    return np.concatenate([ends, np.stack([places, np.full_like(places, IGNORE)])], axis=1)


def _last_label(n_tokens: int, span: SpanTokens) -> int:
    """The label of a span's last token: the next token, where the document is cut there and that token is learned."""
    if not span.cut:
        return IGNORE
    learned = span.learned is None or span.learned[-1]
    return int(span.flat[span.begin + n_tokens]) if learned else IGNORE
