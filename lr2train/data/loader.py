"""Planned segments as batches: a pure function of (corpus, seed, step, data-parallel rank and size).

Choice: each window is an endless stream of segments, epoch after epoch, every epoch a new permutation. A micro-step takes one segment for
every data-parallel rank from one stream, so ranks never wait for unlike work, and the order of either stream does not depend on the number
of ranks. Which stream is next follows from an error diffusion over the epoch, so that both are spread evenly. Cost: the last micro-step of
a window in an epoch borrows up to dp_size - 1 segments from its next permutation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lr2train.config import DataConfig, LongAttention, UserError
from lr2train.data.batch import IGNORE, LONG, SHORT, Batch, Loader
from lr2train.data.corpus import Corpus
from lr2train.data.curriculum import CurriculumLoader
from lr2train.data.packing import Pieces
from lr2train.data.store import Store
from lr2train.run import stream


def make_loader(
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
        data: ``path`` is the corpus.
        seed: of the order (segments) or of everything (curriculum).
        dp_rank, dp_size: this data-parallel rank and their number.
        segments_per_step: the global batch.
        original_window_tokens: L0 of the model that will train; compared with the corpus'. None skips the comparison.
        target_window_tokens: L; a segment must not be longer. None skips the comparison.

    Raises:
        UserError: corpus and model disagree, or the batch does not divide over the ranks.
    """
    corpus = Corpus.open(data.path)
    ranks = Ranks(dp_rank, dp_size, segments_per_step)
    if target_window_tokens is not None and data.segment_tokens > target_window_tokens:
        raise UserError(
            f"data.segment_tokens={data.segment_tokens} exceeds rope.target_window_tokens={target_window_tokens}; set data.segment_tokens "
            "to at most that"
        )
    if data.kind == "curriculum":
        longest = max((stage.length_tokens for stage in data.stages), default=0)
        if original_window_tokens is not None and longest > original_window_tokens:
            raise UserError(
                f"data.stages has length_tokens={longest}, beyond the original window of {original_window_tokens}; set it to at most that"
            )
        return CurriculumLoader(corpus, data, seed, ranks.rank, ranks.size, ranks.accumulation)
    _check_plan(corpus, data, original_window_tokens)
    return SegmentLoader(corpus, data.long_attention, seed, ranks)


def _check_plan(corpus: Corpus, data: DataConfig, original_window_tokens: int | None) -> None:
    for key, planned, wanted in (
        ("data.segment_tokens", corpus.segment_tokens, data.segment_tokens),
        ("model.original_window_tokens", corpus.original_window_tokens, original_window_tokens),
    ):
        if wanted is not None and planned != wanted:
            raise UserError(
                f"{key}={wanted}, but the corpus data.path={data.path} was planned for {planned}; run prepare with the same value, or set "
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


class SegmentLoader:
    """Batches of planned segments.

    Raises:
        UserError: the plan holds no segment.
    """

    def __init__(self, corpus: Corpus, long_attention: LongAttention, seed: int, ranks: Ranks) -> None:
        self._stores = corpus.stores()
        self._pieces = {window: corpus.pieces(window) for window in (SHORT, LONG)}
        self._whole = long_attention is LongAttention.segment
        self._seed, self._ranks = seed, ranks
        self._padding = corpus.tokenizer.eos
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # the last permutation of each window, and its epoch
        self.fingerprint = f"{corpus.fingerprint}-{long_attention.name}"
        if not self.n_segments(SHORT) + self.n_segments(LONG):
            raise UserError(f"the corpus {corpus.folder} has no segment; prepare more documents, or a smaller data.segment_tokens")

    def n_segments(self, window: str) -> int:
        """Planned segments of a window."""
        return self._pieces[window].n_segments

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every segment was seen at least once."""
        return -(-self._micro_steps_per_epoch(SHORT, LONG) // self._ranks.accumulation)

    def batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step, short and long interleaved."""
        first = step * self._ranks.accumulation
        return [self._batch(*self._segment(micro_step)) for micro_step in range(first, first + self._ranks.accumulation)]

    def _micro_steps_per_epoch(self, *windows: str) -> int:
        return sum(-(-self.n_segments(window) // self._ranks.size) for window in windows)

    def _segment(self, micro_step: int) -> tuple[str, int]:
        long_before, long_after = self._n_long(micro_step), self._n_long(micro_step + 1)
        window, nth = (LONG, long_before) if long_after > long_before else (SHORT, micro_step - long_before)
        epoch, place = divmod(nth * self._ranks.size + self._ranks.rank, self.n_segments(window))
        return window, int(self._order(window, epoch)[place])

    def _n_long(self, micro_steps: int) -> int:
        """Long ones among the first micro-steps: the share of an epoch, rounded to the nearest whole number."""
        long, both = self._micro_steps_per_epoch(LONG), self._micro_steps_per_epoch(SHORT, LONG)
        return (2 * micro_steps * long + both) // (2 * both)

    def _order(self, window: str, epoch: int) -> np.ndarray:
        if self._orders.get(window, (None,))[0] != epoch:
            self._orders[window] = epoch, stream(self._seed, "order", window, epoch).permutation(self.n_segments(window))
        return self._orders[window][1]

    def _batch(self, window: str, segment: int) -> Batch:
        whole = self._whole and window == LONG
        return materialise(self._pieces[window], segment, self._stores, window, whole, self._padding)


def materialise(pieces: Pieces, segment: int, stores: list[Store], window: str, whole: bool, padding: int) -> Batch:
    """One planned segment as a batch.

    Args:
        pieces: the plan of the window.
        segment: index into it.
        stores: one a source.
        window: the tag.
        whole: one span over the whole segment with positions 0 … T-1; else a span a piece, positions restarting.
        padding: token id where no piece is; outside every span, without target, at position 0.
    """
    size = pieces.segment_tokens
    tokens, labels = np.full(size, padding, np.int64), np.full(size, IGNORE, np.int64)
    positions, ramp = np.zeros(size, np.int64), np.arange(size)
    spans = []
    for row in pieces.rows(segment):
        start, stop, at = int(pieces.start[row]), int(pieces.stop[row]), int(pieces.offset[row])
        end = at + stop - start
        # One token more than the piece: the target of its last position may lie in the next segment.
        store, document = stores[pieces.source[row]], int(pieces.document[row])
        text = store.read(document, start, stop + 1)
        tokens[at:end] = text[: stop - start]
        learned = store.is_target(document, start + 1, start + len(text))
        labels[at : at + len(text) - 1] = text[1:] if learned is None else np.where(learned, text[1:].astype(np.int64), IGNORE)
        positions[at:end] = ramp[: end - at]
        spans.append((at, end))
    if whole:
        positions, spans = ramp, [(0, size)]
    return Batch(tokens, labels, positions, tuple(spans), window, int(np.count_nonzero(labels != IGNORE)))
