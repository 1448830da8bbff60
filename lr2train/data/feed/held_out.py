"""Held-out segments: documents that no training segment holds, packed as training packs the segments of each window.

Short segments hold documents of at most L0 tokens under the document mask. Where these do not fill the segments that
are asked for, parts of longer documents follow, of at most L0 tokens each. Long segments hold documents over L0: parts
of T tokens fill segments of their own, and the rests form one stream.

Choice: the segments depend on the corpus, L0, T and their number alone. So every measurement reads the same tokens: on
any ranks, after any restart, under any seed of the run. Documents and parts are drawn at random, such that the sources
have about their shares of the window's planned tokens. Cost: the planner's exact mix of buckets is not repeated, and
needle documents are missing, because none is held out. ``needle_batches`` makes them from held-out text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lr2train.config import NeedleConfig, UserError
from lr2train.data.batch import IGNORE, LONG, SHORT, Batch
from lr2train.data.corpus import Corpus, source_store
from lr2train.data.feed.assembly import SourceTokens, assemble, find_spans
from lr2train.data.needles import NeedleDocument, needle_set
from lr2train.data.plan.packing import Selection, concatenate, pack_long, pack_short, split_short, whole_documents
from lr2train.data.plan.segment_table import SegmentTable
from lr2train.data.store import HOLDOUT, SourceStore, allow_open_files
from lr2train.run import stream

_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEED = 0  # not the run's: runs of other seeds measure the same segments


class HeldOutSegments:
    """The held-out segments of one window. Token shards are opened when they are read, and closed with this object.

    Args:
        corpus: opened.
        window: ``short`` or ``long``.
        original_window_tokens: L0.
        segment_tokens: T.
        most: segments that are asked for; there are fewer where documents are missing.

    Attributes:
        window: ``short`` or ``long``.
        numbers: of the segments in their table.
    """

    def __init__(
        self, corpus: Corpus, window: str, original_window_tokens: int, segment_tokens: int, most: int
    ) -> None:
        self.window = window
        self._stores = [source_store(corpus.folder, name, HOLDOUT) for name in corpus.source_names]
        self._sources = [SourceTokens(store, at_once=False) for store in self._stores]
        self._padding = corpus.tokenizer.eos
        planned = corpus.manifest["windows"][window]["sources"]
        shares = np.array([planned.get(name, {}).get("planned_tokens", 0) for name in corpus.source_names], np.float64)
        rng = stream(_SEED, "held out", window)
        documents = _documents(self._stores)
        self._table = _packed(documents, shares, window, original_window_tokens, segment_tokens, most, rng)
        self.numbers = range(min(most, self._table.n_segments))

    def batches(self, rank: int, size: int, whole: bool) -> list[Batch]:
        """The segments of one of ``size`` data-parallel ranks; the same number of batches on every rank.

        A rank without a segment of its own in the last round gets a segment without targets.

        Args:
            rank, size: of data parallelism.
            whole: one attention span over each segment, else a document mask.

        Raises:
            UserError: a token shard cannot be read.
        """
        with contextlib.suppress(UserError):  # where the system allows fewer files, they may still be enough
            allow_open_files(2 * sum(len(store.first) - 1 for store in self._stores))  # as many are open for training
        rounds = range(0, len(self.numbers), size)
        return [
            self._batch(self.numbers[first + rank], whole)
            if first + rank < len(self.numbers)
            else _without_targets(self._batch(self.numbers[first], whole))
            for first in rounds
        ]

    def _batch(self, segment: int, whole: bool) -> Batch:
        spans = find_spans(self._table, segment, self._sources)
        return assemble(spans, self._table.segment_tokens, self.window, whole, self._padding)


def needle_batches(
    corpus: Corpus, needles: NeedleConfig, n_documents: int, length_tokens: int, rank: int, size: int
) -> list[Batch]:
    """Needle documents of one of ``size`` data-parallel ranks, one a batch; the answers alone are targets.

    They hold ``needles.max_pairs`` needles and ask for ``needles.max_questions`` of them, at five depths in turn.
    As with segments, every rank has the same number of batches, whatever the seed of the run.

    Raises:
        UserError: nothing is held out, or the length has no room for the needles.
    """
    of_depth, questions = -(-n_documents // len(_DEPTHS)), min(needles.max_questions, needles.max_pairs)
    rng = stream(_SEED, "held out", "needles")
    distractors = needles.max_pairs - questions
    made = needle_set(corpus, needles, of_depth, length_tokens, _DEPTHS, rng, questions, distractors)
    in_turn = [made[place] for number in range(of_depth) for place in range(number, len(made), of_depth)]
    batches = [_asked(document) for document in in_turn[:n_documents]]
    return [
        batches[first + rank] if first + rank < n_documents else _without_targets(batches[first])
        for first in range(0, n_documents, size)
    ]


def _asked(document: NeedleDocument) -> Batch:
    """One attention span; labels of the answers alone."""
    n_tokens = len(document.tokens)
    answers = [np.arange(start - 1, stop - 1) for start, stop in document.answer_spans]  # predicted one place earlier
    places = np.setdiff1d(np.arange(n_tokens), np.concatenate(answers))
    breaks = np.stack([places, np.full_like(places, IGNORE)])
    return Batch(document.tokens.astype(np.int32), breaks, ((0, n_tokens),), LONG)


def _without_targets(batch: Batch) -> Batch:
    """The same work for attention, and nothing to predict."""
    places = np.arange(len(batch.tokens))
    return replace(batch, breaks=np.stack([places, np.full_like(places, IGNORE)]))


def _documents(stores: Sequence[SourceStore]) -> Selection:
    """All documents that may be used."""
    parts = []
    for number, store in enumerate(stores):
        lengths, usable = store.lengths, store.usable
        kept = np.flatnonzero(np.ones(len(lengths), bool) if usable is None else usable)
        parts.append(whole_documents(np.full(len(kept), number), kept, lengths[kept]))
    return concatenate(parts)


def _packed(
    documents: Selection,
    shares: np.ndarray,
    window: str,
    original_window_tokens: int,
    segment_tokens: int,
    most: int,
    rng: np.random.Generator,
) -> SegmentTable:
    wanted, limit = most * segment_tokens, min(original_window_tokens, segment_tokens)
    is_short = documents.length <= original_window_tokens
    longer = documents.take(~is_short)
    if window == LONG:
        return pack_long(_drawn(split_short(longer, segment_tokens), wanted, shares, rng), segment_tokens)
    assert window == SHORT
    chosen = _drawn(split_short(documents.take(is_short), limit), wanted, shares, rng)
    chosen = concatenate([chosen, _drawn(split_short(longer, limit), wanted - chosen.tokens, shares, rng)])
    return pack_short(chosen, segment_tokens, _sequence_shards(segment_tokens, limit), rng)


def _sequence_shards(segment_tokens: int, limit_tokens: int) -> int:
    """The most sequence shards that hold a document of ``limit_tokens`` each, whatever the ranks of this run are."""
    return max(n for n in range(1, segment_tokens // limit_tokens + 1) if segment_tokens % n == 0)


def _drawn(documents: Selection, tokens: int, shares: np.ndarray, rng: np.random.Generator) -> Selection:
    """Documents (or parts) in random order until they have ``tokens`` tokens, none twice.

    The tokens of the sources are in about the ratio of ``shares``, as long as a source has documents left. A source
    without a share gives nothing, unless no source has one. A document's chance is proportional to its source's share
    over its source's tokens (Efraimidis and Spirakis, 2006: ascending Exp(1) / weight).
    """
    there = np.bincount(documents.source, weights=documents.length, minlength=len(shares))
    shares = np.where(there > 0, shares, 0.0)
    if not shares.any():
        shares = there
    documents = documents.take(shares[documents.source] > 0)
    if tokens <= 0 or not len(documents):
        return documents.take(np.zeros(0, np.int64))
    weights = (shares / np.maximum(there, 1.0))[documents.source]
    order = np.argsort(rng.exponential(size=len(documents)) / weights, kind="stable")
    ends = np.cumsum(documents.length[order], dtype=np.int64)
    return documents.take(order[: np.searchsorted(ends, tokens) + 1])
