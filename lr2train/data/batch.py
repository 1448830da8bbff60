"""What training sees of the data: one segment with its labels, positions, spans and tag.

Choice: labels are shifted here, before anything is sharded, so a shard needs no neighbour to know its targets. Ids are 32 bits wide until
they are on the device: half the bytes to make, keep ahead and send. Cost: a second array of T integers; whoever looks up embeddings widens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE = -100  # label of a position that predicts nothing; torch's cross-entropy skips it
SHORT, LONG = "short", "long"
WINDOWS = (SHORT, LONG)


@dataclass(frozen=True)
class Batch:
    """One segment of T tokens, whole: the engine shards it. Its arrays are to be read only: batches may share them.

    Attributes:
        tokens: int32 [T] (int64 is taken too; labels and positions are of the same type).
        labels: [T]; ``labels[t]`` is the token that position t predicts, ``IGNORE`` where there is none. It is the document's next
            token, also where that token lies in another segment, and never a token of another document.
        positions: [T], what RoPE rotates by.
        spans: half-open, disjoint, sorted; a token attends to its own span only. Padding lies outside every span.
        window: ``short`` or ``long``: which RoPE table acts.
        n_target_tokens: labels that are not ``IGNORE``.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    spans: tuple[tuple[int, int], ...]
    window: str
    n_target_tokens: int

    def __post_init__(self) -> None:
        assert self.window in WINDOWS
        assert self.tokens.shape == self.labels.shape == self.positions.shape == (len(self.tokens),)
        assert self.tokens.dtype == self.labels.dtype == self.positions.dtype
        assert self.tokens.dtype in (np.int32, np.int64)


class Loader(Protocol):
    """Batches by step number: a pure function of (fingerprint, seed, step, dp rank, dp size), so the step is the whole resume state."""

    @property
    def fingerprint(self) -> str:
        """Identifies what is loaded, independent of ranks; a resumed run compares it."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every planned segment was seen."""
        ...

    def batches(self, step: int) -> list[Batch]:
        """This data-parallel rank's batches of one optimizer step; batch j has the same window on every rank."""
        ...
