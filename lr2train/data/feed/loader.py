"""Planned segments as batches: a pure function of (corpus, seed, step, data-parallel rank and size).

Which segments a step holds is decided in ``order``; here they become arrays. Choice: a segment is copied piece by piece straight out of the
mapped stores, as they have it, and nothing is made of a token that can be made on the device: only the places where a piece ends are looked at
singly. Cost: a batch is not what a model takes yet (``Batch``).
"""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lr2train.config import DataConfig, LongAttention, UserError
from lr2train.data.batch import IGNORE, LONG, SHORT, WINDOWS, Batch, Loader
from lr2train.data.corpus import Corpus
from lr2train.data.feed.curriculum import CurriculumLoader
from lr2train.data.feed.order import Order, Schedule, default_group, part
from lr2train.data.feed.readahead import ReadAhead
from lr2train.data.plan.segment_table import COLUMNS, SegmentTable
from lr2train.data.store import SourceStore, Store
from lr2train.run import say

Ranges = Sequence[tuple[int, int]]  # half-open, in a segment
_FILES_A_SHARD, _FILES_BESIDES = (
    3,
    256,
)  # that a process keeps open: of a store (.bin mapped, .bin read ahead, .targets.npy), and of everything else


def make_loader(
    corpus: Corpus,
    data: DataConfig,
    seed: int,
    dp_rank: int,
    dp_size: int,
    segments_per_step: int,
    original_window_tokens: int | None = None,
    target_window_tokens: int | None = None,
) -> Loader:
    """The loader that ``data.kind`` names.

    Args:
        corpus: opened; its stores and its tokenizer are shared with whoever else was handed it.
        data: ``group_segments`` 0 takes ``order.default_group``.
        seed: of the order (segments) or of everything (curriculum).
        dp_rank, dp_size: this data-parallel rank and their number.
        segments_per_step: the global batch.
        original_window_tokens: L0 of the model that will train; compared with the corpus'. None skips the comparison.
        target_window_tokens: L; the length of a segment. None skips the comparison.

    Raises:
        UserError: corpus and model disagree, or the batch does not divide over groups and ranks.
    """
    ranks = Ranks(dp_rank, dp_size, segments_per_step)
    if data.kind == "curriculum":
        longest = max((stage.length_tokens for stage in data.stages), default=0)
        if original_window_tokens is not None and longest > original_window_tokens:
            raise UserError(
                f"data.stages has length_tokens={longest}, beyond the original window of {original_window_tokens}; set it to at most that"
            )
        return CurriculumLoader(corpus, data, seed, ranks.rank, ranks.size, ranks.accumulation)
    _check_plan(corpus, data, original_window_tokens)
    if target_window_tokens not in (None, data.segment_tokens):
        raise UserError(
            f"data.segment_tokens={data.segment_tokens} {'exceeds' if data.segment_tokens > target_window_tokens else 'is below'} "
            f"rope.target_window_tokens={target_window_tokens}, and training teaches the window of its segments; set rope.target_window_tokens "
            f"to {data.segment_tokens}, or prepare segments of {target_window_tokens} tokens"
        )
    return SegmentLoader(corpus, data.long_attention, seed, ranks, data.group_segments or default_group(dp_size, segments_per_step))


def _check_plan(corpus: Corpus, data: DataConfig, original_window_tokens: int | None) -> None:
    for key, planned, wanted in (
        ("data.segment_tokens", corpus.segment_tokens, data.segment_tokens),
        ("model.original_window_tokens", corpus.original_window_tokens, original_window_tokens),
    ):
        if wanted is not None and planned != wanted:
            raise UserError(
                f"{key}={wanted}, but the corpus data.path={corpus.folder} was planned for {planned}; run prepare with the same value, or set "
                f"{key}={planned}"
            )


@dataclass(frozen=True)
class Ranks:
    """Which part of a step's segments this data-parallel rank takes.

    Raises:
        UserError: the step's segments do not divide over the ranks.
    """

    rank: int
    size: int
    segments_per_step: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size
        if self.segments_per_step % self.size:
            raise UserError(
                f"optim.segments_per_step={self.segments_per_step} is not divisible by the {self.size} data-parallel ranks; "
                f"set optim.segments_per_step to {-(-self.segments_per_step // self.size) * self.size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-steps of a step."""
        return self.segments_per_step // self.size

    def check_groups(self, group_segments: int) -> None:
        """Refuse groups that a step does not hold whole, or that do not divide over the ranks.

        Raises:
            UserError: the sizes that fit are named.
        """
        total = self.segments_per_step
        if group_segments < 1 or total % group_segments:
            fitting = [size for size in _divisors(total) if size % self.size == 0]
            raise UserError(
                f"data.group_segments={group_segments} does not divide optim.segments_per_step={total}; set data.group_segments to one of "
                f"{_listed(fitting)}"
            )
        if group_segments % self.size:
            raise UserError(
                f"{self.size} data-parallel ranks do not divide data.group_segments={group_segments}, which decides what each step holds "
                f"and is settled at the first start; start with {_listed(_divisors(group_segments))} of them (ranks / parallel.sp)"
            )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


class SegmentLoader:
    """Batches of planned segments.

    Raises:
        UserError: the plan holds no segment, groups do not fit the ranks, or the system does not let so many files be open.
    """

    def __init__(self, corpus: Corpus, long_attention: LongAttention, seed: int, ranks: Ranks, group_segments: int) -> None:
        ranks.check_groups(group_segments)
        self._pieces = {window: _plain(corpus.segment_table(window)) for window in WINDOWS}
        if not any(pieces.n_segments for pieces in self._pieces.values()):
            raise UserError(f"the corpus {corpus.folder} has no segment; prepare more documents, or a smaller data.segment_tokens")
        stores = corpus.stores()
        self._names = [source["name"] for source in corpus.manifest["sources"]]
        _allow_open_files(sum(len(store.first) - 1 for store in stores))
        self._texts = [Texts(store) for store in stores]
        self._whole = {SHORT: False, LONG: long_attention is LongAttention.segment}
        self._ranks = ranks
        self._padding = corpus.tokenizer.eos
        costs = {window: attention_costs(pieces, self._whole[window]) for window, pieces in self._pieces.items()}
        self._schedule = Schedule({window: pieces.n_segments for window, pieces in self._pieces.items()}, group_segments)
        self._order = Order(self._schedule, costs, seed)
        self._groups_per_step = ranks.segments_per_step // group_segments
        self._say_repeats(group_segments)
        self.fingerprint = f"{corpus.fingerprint}-{long_attention.name}-{group_segments}"

    def _say_repeats(self, group_segments: int) -> None:
        for window in WINDOWS:
            if 0 < self.n_segments(window) < group_segments:
                say(
                    "data",
                    f"only {self.n_segments(window)} {window} segments for groups of {group_segments}: every step that holds a {window} group "
                    "repeats some; prepare more of them, or set data.group_segments lower",
                )

    def n_segments(self, window: str) -> int:
        """Planned segments of a window."""
        return self._pieces[window].n_segments

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every segment was seen at least once."""
        return -(-sum(self._schedule.groups_before(1, window) for window in WINDOWS) // self._groups_per_step)

    def segments(self, step: int, rank: int | None = None) -> list[tuple[str, int]]:
        """Window and number of this rank's segments of a step, or of another data-parallel rank's, one a micro-step."""
        rank = self._ranks.rank if rank is None else rank
        groups = (self._order.group(step * self._groups_per_step + nth) for nth in range(self._groups_per_step))
        return [(window, int(segment)) for window, segments in groups for segment in part(segments, rank, self._ranks.size)]

    def batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step, short and long interleaved."""
        return self.load(self.segments(step))

    def described(self, step: int) -> list[str]:
        """Window, number and sources of each of this rank's segments of a step."""
        return [f"{window} {segment} ({', '.join(self._sources_of(window, segment))})" for window, segment in self.segments(step)]

    def _sources_of(self, window: str, segment: int) -> list[str]:
        pieces = self._pieces[window]
        rows = pieces.spans_of(segment)
        return [self._names[source] for source in dict.fromkeys(pieces.source[rows.start : rows.stop].tolist())]

    def load(self, segments: Sequence[tuple[str, int]]) -> list[Batch]:
        """Batches of planned segments, by window and number; the disk is asked for all of them before the first is waited for."""
        found = [_find(self._pieces[window], segment, self._texts) for window, segment in segments]
        return [
            _made(self._pieces[window].segment_tokens, one, window, self._whole[window], self._padding)
            for (window, _), one in zip(segments, found, strict=True)
        ]


def _allow_open_files(n_shards: int) -> None:
    """Raise this process' limit of open files, which begins at 1024 on many systems, so that all shards fit: a mapped file stays open.

    Raises:
        UserError: the system's own limit is lower.
    """
    needed = _FILES_A_SHARD * n_shards + _FILES_BESIDES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"the corpus has {n_shards} shards, which takes {needed} open files where this system allows a process {hard}; raise the limit "
            "(`ulimit -Hn`, nofile in limits.conf), or prepare another corpus with a greater data.shard_bytes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _plain(pieces: SegmentTable) -> SegmentTable:
    """The same table as plain arrays: slicing a numpy.memmap costs as much as copying a small document."""
    return SegmentTable(*(np.asarray(getattr(pieces, column)) for column in COLUMNS), segment_tokens=pieces.segment_tokens)


def attention_costs(pieces: SegmentTable, whole: bool) -> np.ndarray:
    """What attention over each segment costs, up to a factor: the sum of its spans' squared lengths, float64 [segments]."""
    if whole:
        return np.full(pieces.n_segments, float(pieces.segment_tokens) ** 2)
    spans = np.asarray(pieces.stop, np.float64) - pieces.start
    return np.bincount(pieces.segment, weights=spans**2, minlength=pieces.n_segments)


class Shard(NamedTuple):
    """One store of a source, as plain arrays over its mapped files."""

    store: Store
    flat: np.ndarray  # all tokens, back to back
    begins: np.ndarray  # where each document begins in it
    lengths: np.ndarray
    masked: bool  # some tokens are not learned
    read_ahead: ReadAhead


def _shard(store: Store) -> Shard:
    flat, begins, lengths = (np.asarray(array) for array in (store.flat, store.starts, store.lengths))
    return Shard(store, flat, begins, lengths, store.is_target(0, 0, 1) is not None if len(store) else False, ReadAhead(store.flat))


class Found(NamedTuple):
    """Where a piece of a document lies, and what its labels need beyond its own tokens."""

    flat: np.ndarray
    begin: int  # the piece's first token in it
    cut: bool  # the document goes on after the piece: its next token, which may stand in another segment, is a target
    learned: np.ndarray | None  # bool of the piece's labels but an IGNORE at its end; None where all are


Pieced = Sequence[tuple[tuple[int, int], Found]]  # span in the segment, and where its tokens lie


class Texts:
    """The documents of a source, for copying out of. All its shards are opened, so that one which cannot be is found before training."""

    def __init__(self, store: SourceStore | Store) -> None:
        shards = store.shards if isinstance(store, SourceStore) else [store]
        self._first = store.first if isinstance(store, SourceStore) else [0, len(store)]
        self._shards = [_shard(one) for one in shards]

    def find(self, document: int, start: int, stop: int) -> Found:
        """Tokens [start, stop) of a document."""
        number = bisect_right(self._first, document) - 1
        shard, local = self._shards[number], document - self._first[number]
        begin, cut = shard.begins.item(local), stop < shard.lengths.item(local)
        shard.read_ahead(begin + start, begin + stop + cut)
        learned = shard.store.is_target(local, start + 1, stop + cut) if shard.masked else None
        return Found(shard.flat, begin + start, cut, learned)


def materialise(pieces: SegmentTable, segment: int, stores: Sequence[SourceStore | Store], window: str, whole: bool, padding: int) -> Batch:
    """One planned segment as a batch.

    Args:
        pieces: the plan of the window.
        segment: index into it.
        stores: one a source.
        window: the tag.
        whole: one span over the whole segment with positions 0 … T-1; else a span a piece, positions restarting.
        padding: token id where no piece is; outside every span, without target, at position 0.
    """
    return _made(pieces.segment_tokens, _find(pieces, segment, [Texts(store) for store in stores]), window, whole, padding)


def _find(pieces: SegmentTable, segment: int, texts: Sequence[Texts]) -> Pieced:
    """The span of each piece in a segment, and where its tokens lie."""
    rows = pieces.spans_of(segment)
    columns = (pieces.source, pieces.document, pieces.start, pieces.stop, pieces.offset)
    table = zip(*(column[rows.start : rows.stop].tolist() for column in columns), strict=True)
    return [((at, at + stop - start), texts[source].find(document, start, stop)) for source, document, start, stop, at in table]


def _made(size: int, pieces: Pieced, window: str, whole: bool, padding: int) -> Batch:
    tokens = np.empty(size, pieces[0][1].flat.dtype)  # one tokenizer, so one dtype in all stores
    gaps, filled = [], 0
    for (at, end), (flat, begin, _, _) in pieces:
        if filled < at:
            gaps.append((filled, at))
        tokens[at:end] = flat[begin : begin + end - at]
        filled = end
    if filled < size:
        gaps.append((filled, size))
    for begin, end in gaps:
        tokens[begin:end] = padding
    spans = ((0, size),) if whole else tuple(span for span, _ in pieces)
    return Batch(tokens, _breaks(pieces, gaps), spans, window)


def _breaks(pieces: Pieced, gaps: Ranges) -> np.ndarray:
    """Where a piece ends, where no piece is, and where the store says that a token is not learned: int64 [2, n]."""
    ends = np.array([(end - 1, _last_label(end - at, one)) for (at, end), one in pieces], np.int64).T
    ignored = [np.arange(begin, end) for begin, end in gaps]
    ignored += [at + np.flatnonzero(~one.learned[: end - at - 1]) for (at, end), one in pieces if one.learned is not None]
    if not ignored:
        return ends
    places = np.concatenate(ignored)
    return np.concatenate([ends, np.stack([places, np.full_like(places, IGNORE)])], axis=1)


def _last_label(n_tokens: int, found: Found) -> int:
    """Of a piece: its document's next token where it was cut and that token is learned."""
    learned = found.learned is None or found.learned[-1]
    return int(found.flat[found.begin + n_tokens]) if found.cut and learned else IGNORE
