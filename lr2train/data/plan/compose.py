"""From document lengths to segment tables: which documents each bucket draws, in what order, into which segments.

Pure: nothing is read or written. Choice: whole documents are drawn, so a cell of the mix (a source in a bucket) exceeds
its target by less than a document, and by next to nothing where it has many. Cost: with few documents the realised mix
misses its target, and the report says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.config import DataConfig, UserError
from lr2train.data.batch import LONG, SHORT
from lr2train.data.plan import buckets, mix, packing
from lr2train.data.plan.buckets import Bucket, Cell
from lr2train.data.plan.segment_table import SegmentTable
from lr2train.run import stream


@dataclass(frozen=True)
class Mixture:
    """The realised data mixture: what was asked for, what was drawn, and the segments that came out.

    Attributes:
        buckets: of the mix.
        cells: [source][bucket], the documents that could be drawn.
        targets: int64 [sources, buckets], tokens.
        drawn: [source][bucket], indices into the cell, with repeats.
        tables: the segment table of each window.
    """

    buckets: list[Bucket]
    cells: list[list[Cell]]
    targets: np.ndarray
    drawn: list[list[np.ndarray]]
    tables: dict[str, SegmentTable]


def check(data: DataConfig, original_window_tokens: int) -> tuple[list[Bucket], int]:
    """Refuse a mix that no documents can fill; returns its buckets and the sequence shards of a short segment.

    Raises:
        UserError: buckets, sequence shards, budgets, weights or shares are out of their limits, or contradict each
            other.
    """
    ranges, shards = buckets.resolve(data, original_window_tokens), packing.sequence_shards(data.align_sp)
    packing.check_sequence_shards(data.segment_tokens, shards, 0)
    mix.check(data, ranges)
    _check_keep_below(data)
    return ranges, shards


def compose_segments(
    data: DataConfig,
    lengths: Sequence[np.ndarray],
    usable: Sequence[np.ndarray | None],
    original_window_tokens: int,
    seed: int,
) -> Mixture:
    """Compose the segments of both windows.

    Args:
        data: the mix and the segment length.
        lengths: one array for each source, int32 [documents], tokens.
        usable: one mask for each source, bool [documents], which may be planned; None is all.
        original_window_tokens: L0.
        seed: decides which documents are drawn where not all are, and all orders.

    Raises:
        UserError: a budget cannot be filled, or settings contradict each other.
    """
    ranges, shards = check(data, original_window_tokens)
    cells = []
    for source, of_source, mask in zip(data.sources, lengths, usable, strict=True):
        kept = _kept(data, source.name, of_source, mask, seed)
        cells.append(
            [buckets.cell_of(of_source, kept, one) if one.serves(source) else buckets.NO_DOCUMENTS for one in ranges]
        )
    targets = mix.targets(
        data, ranges, np.array([[cell.tokens for cell in row] for row in cells]).reshape(len(cells), len(ranges))
    )
    drawn = [
        [
            buckets.draw(cell, int(tokens), stream(seed, "plan", source.name, one.name))
            for cell, tokens, one in zip(row, asked, ranges, strict=True)
        ]
        for source, row, asked in zip(data.sources, cells, targets, strict=True)
    ]
    short = packing.split_short(_selection(SHORT, ranges, cells, drawn, seed), original_window_tokens)
    tables = {
        SHORT: packing.pack_short(short, data.segment_tokens, shards, stream(seed, "plan", "deal")),
        LONG: packing.pack_long(_selection(LONG, ranges, cells, drawn, seed), data.segment_tokens),
    }
    return Mixture(ranges, cells, targets, drawn, tables)


def _selection(
    window: str,
    ranges: Sequence[Bucket],
    cells: Sequence[Sequence[Cell]],
    drawn: Sequence[Sequence[np.ndarray]],
    seed: int,
) -> packing.Selection:
    """The drawn documents of a window, shuffled together."""
    parts = []
    for source, (row, rows_of) in enumerate(zip(cells, drawn, strict=True)):
        for one, cell, rows in zip(ranges, row, rows_of, strict=True):
            if one.window == window:
                parts.append(
                    packing.whole_documents(np.full(len(rows), source), cell.document[rows], cell.length[rows])
                )
    together = packing.concatenate(parts)
    return together.take(stream(seed, "plan", window).permutation(len(together)))


def _kept(
    data: DataConfig, source: str, lengths: np.ndarray, usable: np.ndarray | None, seed: int
) -> np.ndarray | None:
    """bool [documents]: which may be planned, after ``keep_below`` has thinned the short ones; None is all."""
    share = data.keep_below.get(source, 1.0)
    if share >= 1.0:
        return usable
    below = np.flatnonzero(lengths < data.keep_below_tokens)
    mask = np.ones(len(lengths), bool) if usable is None else np.array(usable)
    mask[below] &= stream(seed, "keep", source).random(len(below)) < share
    return mask


def _check_keep_below(data: DataConfig) -> None:
    names = {source.name for source in data.sources}
    for name, share in data.keep_below.items():
        if name not in names:
            raise UserError(
                f"data.keep_below names {name}, and data.sources has {', '.join(sorted(names))}; name one of these"
            )
        if not 0 <= share <= 1:
            raise UserError(
                f"data.keep_below.{name}={share} is not between 0 and 1; set it to the share of short documents to keep"
            )
