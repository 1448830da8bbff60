"""The loader: batches of planned segments as a pure function of (corpus, seed, step, data-parallel rank and size).

``order`` decides which segments a step holds, and ``assembly`` makes arrays of them. This file checks that corpus,
model, global batch and ranks fit each other.

Choice: no state, so the resume state of the data is the step's number, and any rank can make any step. Cost: the
segment tables of both windows stay mapped, and all token shards stay open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lr2train.config import DataConfig, LongAttention, LongPositions, UserError
from lr2train.data.batch import LONG, SHORT, WINDOWS, Batch, Loader
from lr2train.data.corpus import Corpus
from lr2train.data.feed.assembly import SourceTokens, assemble, find_spans
from lr2train.data.feed.curriculum import CurriculumLoader
from lr2train.data.feed.order import Order, Schedule, default_group, part
from lr2train.data.feed.positions import drawn_jumps
from lr2train.data.plan.segment_table import COLUMNS, SegmentTable
from lr2train.data.store import allow_open_files
from lr2train.progress import say
from lr2train.run import stream


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
        corpus: opened; its stores and its tokenizer are shared with the loader.
        data: ``group_segments`` 0 takes ``order.default_group``.
        seed: of the order (segments) or of everything (curriculum).
        dp_rank, dp_size: this data-parallel rank and their number.
        segments_per_step: the global batch.
        original_window_tokens: L0 of the model that will train, compared with the corpus' L0; None skips the
            comparison.
        target_window_tokens: L, compared with the length of a segment; the reach of jumping positions. None skips the
            comparison, and no position jumps.

    Raises:
        UserError: corpus and model disagree, or the global batch does not divide over groups and ranks.
    """
    ranks = Ranks(dp_rank, dp_size, segments_per_step)
    if data.kind == "curriculum":
        longest = max((stage.length_tokens for stage in data.stages), default=0)
        if original_window_tokens is not None and longest > original_window_tokens:
            raise UserError(
                f"data.stages has length_tokens={longest}, above the original window of {original_window_tokens} "
                f"tokens; set each length_tokens of data.stages to at most {original_window_tokens}"
            )
        return CurriculumLoader(corpus, data, seed, ranks.rank, ranks.size, ranks.accumulation)
    _check_windows(corpus, data, original_window_tokens, target_window_tokens)
    return SegmentLoader(
        corpus,
        LongAttention(data.long_attention),
        seed,
        ranks,
        data.group_segments or default_group(dp_size, segments_per_step),
        target_window_tokens if data.long_positions == LongPositions.skip else None,
    )


def _check_windows(
    corpus: Corpus, data: DataConfig, original_window_tokens: int | None, target_window_tokens: int | None
) -> None:
    for key, planned, wanted in (
        ("data.segment_tokens", corpus.segment_tokens, data.segment_tokens),
        ("model.original_window_tokens", corpus.original_window_tokens, original_window_tokens),
    ):
        if wanted is not None and planned != wanted:
            raise UserError(
                f"{key}={wanted}, but the corpus data.path={corpus.folder} was planned for {planned}; run prepare with "
                f"the same value, or set {key}={planned}"
            )
    if target_window_tokens is not None and data.long_positions == LongPositions.skip:
        if data.segment_tokens >= target_window_tokens:
            raise UserError(
                f"data.long_positions=skip wants segments below rope.target_window_tokens={target_window_tokens}, and "
                f"data.segment_tokens={data.segment_tokens}; set data.long_positions to full, or prepare a corpus of "
                "shorter segments"
            )
    elif target_window_tokens not in (None, data.segment_tokens):
        raise UserError(
            f"data.segment_tokens={data.segment_tokens} "
            f"{'exceeds' if data.segment_tokens > target_window_tokens else 'is below'} "
            f"rope.target_window_tokens={target_window_tokens}, and training teaches the window of its segments; set "
            f"rope.target_window_tokens to {data.segment_tokens}, or prepare segments of {target_window_tokens} tokens"
        )


@dataclass(frozen=True)
class Ranks:
    """The part of a global batch that one data-parallel rank takes.

    Attributes:
        rank, size: of data parallelism.
        segments_per_step: the global batch.

    Raises:
        UserError: the global batch does not divide over the ranks.
    """

    rank: int
    size: int
    segments_per_step: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size
        if self.segments_per_step % self.size:
            raise UserError(
                f"optim.segments_per_step={self.segments_per_step} is not divisible by the {self.size} data-parallel "
                f"ranks; set optim.segments_per_step to {-(-self.segments_per_step // self.size) * self.size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches a step: the gradient accumulation."""
        return self.segments_per_step // self.size

    def check_groups(self, group_segments: int) -> None:
        """Refuse groups that do not fill a step, or that do not divide over the ranks.

        Raises:
            UserError: the group does not fit; the text names the sizes that do.
        """
        total = self.segments_per_step
        if group_segments < 1 or total % group_segments:
            fitting = [size for size in _divisors(total) if size % self.size == 0]
            raise UserError(
                f"data.group_segments={group_segments} does not divide optim.segments_per_step={total}; set "
                f"data.group_segments to one of {_listed(fitting)}"
            )
        if group_segments % self.size:
            raise UserError(
                f"{self.size} data-parallel ranks do not divide data.group_segments={group_segments}, which decides "
                "what each step holds and is settled at the first start; start with "
                f"{_listed(_divisors(group_segments))} of them (ranks / parallel.sp)"
            )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


class SegmentLoader:
    """Batches of planned segments.

    Args:
        reach_tokens: positions of long segments jump and stay below this length; None: they do not jump.

    Raises:
        UserError: the corpus has no segment, groups do not fit the ranks, or the system's limit of open files is too
            low.
    """

    def __init__(
        self,
        corpus: Corpus,
        long_attention: LongAttention,
        seed: int,
        ranks: Ranks,
        group_segments: int,
        reach_tokens: int | None = None,
    ) -> None:
        ranks.check_groups(group_segments)
        self._tables = {window: _plain(corpus.segment_table(window)) for window in WINDOWS}
        if not any(table.n_segments for table in self._tables.values()):
            raise UserError(
                f"the corpus {corpus.folder} has no segment; prepare more documents, or a smaller data.segment_tokens"
            )
        stores = corpus.stores()
        self._names = corpus.source_names
        allow_open_files(sum(len(store.first) - 1 for store in stores))
        self._sources = [SourceTokens(store) for store in stores]
        self._whole = {SHORT: False, LONG: long_attention is LongAttention.segment}
        self._ranks, self._seed, self._reach_tokens = ranks, seed, reach_tokens
        self._padding = corpus.tokenizer.eos
        costs = {window: attention_costs(table, self._whole[window]) for window, table in self._tables.items()}
        self._schedule = Schedule({window: table.n_segments for window, table in self._tables.items()}, group_segments)
        self._order = Order(self._schedule, costs, seed)
        self._groups_per_step = ranks.segments_per_step // group_segments
        self._say_repeats(group_segments)
        self.fingerprint = f"{corpus.fingerprint}-{long_attention.name}-{group_segments}"
        if reach_tokens is not None:
            self.fingerprint += f"-skip-{reach_tokens}"

    def _say_repeats(self, group_segments: int) -> None:
        for window in WINDOWS:
            if 0 < self.n_segments(window) < group_segments:
                say(
                    "data",
                    f"only {self.n_segments(window)} {window} segments for groups of {group_segments}: every step that "
                    f"holds a {window} group repeats some; prepare more of them, or set data.group_segments lower",
                )

    def n_segments(self, window: str) -> int:
        """Planned segments of a window."""
        return self._tables[window].n_segments

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each segment was seen at least once."""
        return -(-sum(self._schedule.groups_before(1, window) for window in WINDOWS) // self._groups_per_step)

    def segments(self, step: int, rank: int | None = None) -> list[tuple[str, int]]:
        """Window and number of a rank's segments of a step, one for each micro-batch; ``rank`` None is this rank."""
        rank = self._ranks.rank if rank is None else rank
        groups = (self._order.group(step * self._groups_per_step + nth) for nth in range(self._groups_per_step))
        return [
            (window, int(segment)) for window, segments in groups for segment in part(segments, rank, self._ranks.size)
        ]

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, short and long ones interleaved."""
        segments = self.segments(step)
        return [
            self._with_jumps(batch, step, segment)
            for batch, (_, segment) in zip(self.load(segments), segments, strict=True)
        ]

    def _with_jumps(self, batch: Batch, step: int, segment: int) -> Batch:
        if batch.window != LONG or self._reach_tokens is None:
            return batch
        rng = stream(self._seed, "positions", step, segment)  # other jumps each time the segment is read
        return replace(batch, jumps=drawn_jumps(batch.spans, self._reach_tokens, rng))

    def described(self, step: int) -> list[str]:
        """Window, number and sources of each of this rank's segments of a step."""
        return [
            f"{window} {segment} ({', '.join(self._sources_of(window, segment))})"
            for window, segment in self.segments(step)
        ]

    def _sources_of(self, window: str, segment: int) -> list[str]:
        table = self._tables[window]
        rows = table.spans_of(segment)
        return [self._names[source] for source in dict.fromkeys(table.source[rows.start : rows.stop].tolist())]

    def load(self, segments: Sequence[tuple[str, int]]) -> list[Batch]:
        """Batches of planned segments, by window and number."""
        # Two passes: the disk is asked for all segments before the first one is waited for.
        found = [find_spans(self._tables[window], segment, self._sources) for window, segment in segments]
        return [
            assemble(spans, self._tables[window].segment_tokens, window, self._whole[window], self._padding)
            for (window, _), spans in zip(segments, found, strict=True)
        ]


def _plain(table: SegmentTable) -> SegmentTable:
    """The same table as plain arrays: slicing a numpy.memmap costs as much as copying a small document."""
    return SegmentTable(
        *(np.asarray(getattr(table, column)) for column in COLUMNS), segment_tokens=table.segment_tokens
    )


def attention_costs(table: SegmentTable, whole: bool) -> np.ndarray:
    """float64 [segments]: the cost of attention up to a factor, the sum of the attention spans' squared lengths."""
    if whole:
        return np.full(table.n_segments, float(table.segment_tokens) ** 2)
    lengths = np.asarray(table.stop, np.float64) - table.start
    return np.bincount(table.segment, weights=lengths**2, minlength=table.n_segments)
