"""From lengths to a plan: which documents each source gives to each bucket, in what order, in which segments. Pure; nothing is read or written.

Choice: whole documents are drawn, so a cell of the mix (a source in a bucket) exceeds its target by less than a document, and by next to
nothing where it has many. Cost: with few documents the realised mix misses its target; the report says how far.
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
    """What is planned, and from what.

    Attributes:
        buckets: of the mix.
        cells: [source][bucket], the documents that could be drawn.
        targets: int64 [sources, buckets], tokens.
        drawn: [source][bucket], rows of the cell in no order, with repeats.
        tables: by window.
    """

    buckets: list[Bucket]
    cells: list[list[Cell]]
    targets: np.ndarray
    drawn: list[list[np.ndarray]]
    tables: dict[str, SegmentTable]


def check(data: DataConfig, original_window_tokens: int) -> tuple[list[Bucket], int]:
    """The buckets, and the shards of a short segment, of a config that can be planned as far as one can tell without documents.

    Raises:
        UserError: buckets, shards, budgets, weights or shares that make no sense.
    """
    ranges, shards = buckets.resolve(data, original_window_tokens), packing.sequence_shards(data.align_sp)
    packing.check_sequence_shards(data.segment_tokens, shards, 0)
    mix.check(data, ranges)
    _check_keep_below(data)
    return ranges, shards


def compose_segments(
    data: DataConfig, lengths: Sequence[np.ndarray], usable: Sequence[np.ndarray | None], original_window_tokens: int, seed: int
) -> Mixture:
    """Plan the segments of both windows.

    Args:
        data: the mix, the segments.
        lengths: int32, tokens of each document, an array a source.
        usable: mask of documents that may be planned, a source each; None is all.
        original_window_tokens: L0.
        seed: decides which documents are drawn where not all are, and every order.

    Raises:
        UserError: a budget that cannot be filled, or settings that contradict each other.
    """
    ranges, shards = check(data, original_window_tokens)
    cells = []
    for source, of_source, mask in zip(data.sources, lengths, usable, strict=True):
        kept = _kept(data, source.name, of_source, mask, seed)
        cells.append([buckets.cell_of(of_source, kept, one) if one.serves(source) else buckets.EMPTY for one in ranges])
    targets = mix.targets(data, ranges, np.array([[cell.tokens for cell in row] for row in cells]).reshape(len(cells), len(ranges)))
    drawn = [
        [
            buckets.draw(cell, int(tokens), stream(seed, "plan", source.name, one.name))
            for cell, tokens, one in zip(row, asked, ranges, strict=True)
        ]
        for source, row, asked in zip(data.sources, cells, targets, strict=True)
    ]
    short = packing.split(_selection(SHORT, ranges, cells, drawn, seed), original_window_tokens)
    pieces = {
        SHORT: packing.pack_short(short, data.segment_tokens, shards, stream(seed, "plan", "deal")),
        LONG: packing.pack_long(_selection(LONG, ranges, cells, drawn, seed), data.segment_tokens),
    }
    return Mixture(ranges, cells, targets, drawn, pieces)


def _selection(
    window: str, ranges: Sequence[Bucket], cells: Sequence[Sequence[Cell]], drawn: Sequence[Sequence[np.ndarray]], seed: int
) -> packing.Selection:
    """The drawn documents of a window in a random order."""
    parts = []
    for source, (row, rows_of) in enumerate(zip(cells, drawn, strict=True)):
        for one, cell, rows in zip(ranges, row, rows_of, strict=True):
            if one.window == window:
                parts.append(packing.whole_documents(np.full(len(rows), source), cell.document[rows], cell.length[rows]))
    together = packing.concatenate(parts)
    return together.take(stream(seed, "plan", window).permutation(len(together)))


def _kept(data: DataConfig, source: str, lengths: np.ndarray, usable: np.ndarray | None, seed: int) -> np.ndarray | None:
    """Mask of the documents that may be planned: usable ones, and of those below ``keep_below_tokens`` the share that ``keep_below`` says."""
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
            raise UserError(f"data.keep_below names {name}, and data.sources has {', '.join(sorted(names))}; name one of these")
        if not 0 <= share <= 1:
            raise UserError(f"data.keep_below.{name}={share} is not between 0 and 1; set it to the share of short documents to keep")
