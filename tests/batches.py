"""Labels and positions of a batch on the host: independent of the device's, for tests to compare with.

Also a planned segment as a batch, for tests that have a segment table and stores but no corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lr2train.data.batch import IGNORE, Batch
from lr2train.data.feed.assembly import SourceTokens, assemble, find_spans
from lr2train.data.plan.segment_table import SegmentTable
from lr2train.data.store import SourceStore


def labels_of(batch: Batch) -> np.ndarray:
    """int32 [T]: the token that each position predicts, ``IGNORE`` where there is none."""
    labels = np.empty(len(batch.tokens), np.int32)
    labels[:-1] = batch.tokens[1:]
    labels[batch.breaks[0]] = batch.breaks[1]
    return labels


def positions_of(batch: Batch) -> np.ndarray:
    """int32 [T]: 0, 1, 2 … in each attention span, with its jump; 0 outside."""
    positions, jumps = np.zeros(len(batch.tokens), np.int32), dict(batch.jumps)
    for start, stop in batch.spans:
        skipped = 0
        for place in range(start, stop):
            skipped += jumps.get(place, 0)
            positions[place] = place - start + skipped
    return positions


def batch_of_labels(
    tokens: np.ndarray,
    labels: np.ndarray,
    spans: tuple[tuple[int, int], ...],
    window: str,
    jumps: tuple[tuple[int, int], ...] = (),
) -> Batch:
    """A batch from labels [T] that are written down one by one: the inverse of ``labels_of``."""
    following = np.append(tokens[1:], IGNORE)  # the last place is a break, whatever its label is
    places = np.flatnonzero((labels != following) | (np.arange(len(tokens)) == len(tokens) - 1))
    return Batch(tokens, np.stack([places, labels[places]]).astype(np.int64), spans, window, jumps)


def batch_of(
    table: SegmentTable, segment: int, stores: Sequence[SourceStore], window: str, whole: bool, padding: int
) -> Batch:
    """One planned segment; ``whole`` is one attention span over all of it, else each document span is its own."""
    spans = find_spans(table, segment, [SourceTokens(store) for store in stores])
    return assemble(spans, table.segment_tokens, window, whole, padding)
