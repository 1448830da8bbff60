"""The door between data and training: the token ids of a segment, and what its labels and positions follow from.

Choice: a batch holds token ids as they are stored, two bytes each for most vocabularies. A label is the next token
except at ``breaks``, and a position counts from the beginning of its attention span, with ``jumps``. The device that
trains makes both (``training.segment``, ``attention.segment``). Cost: no label and no position exists on the host.
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
    """One whole segment of T tokens: a micro-batch of one data-parallel rank. Its arrays are read-only by convention.

    Attributes:
        tokens: [T], uint16 or int32.
        breaks: int64 [2, n]: places, and the labels there that are not the next token of the segment. The label is
            ``IGNORE`` at a document's end, in padding, and before a token that is not learned. Where a document goes on
            in another segment, the label is that document's next token. Each place occurs once; the segment's last
            place always occurs.
        spans: attention spans: half-open, disjoint, sorted. A token attends inside its own span only (the document
            mask). Padding lies outside every span.
        window: ``short`` or ``long``: decides which RoPE table acts.
        jumps: places and tokens: from such a place to the end of its attention span, positions are larger by so many
            tokens. At most one in a span, sorted.
    """

    tokens: np.ndarray
    breaks: np.ndarray
    spans: tuple[tuple[int, int], ...]
    window: str
    jumps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert self.window in WINDOWS
        assert self.tokens.ndim == 1 and self.tokens.dtype in (np.uint16, np.int32)
        assert self.breaks.dtype == np.int64 and len(self.breaks) == 2

    @property
    def n_target_tokens(self) -> int:
        """Labels that are not ``IGNORE``."""
        return len(self.tokens) - int(np.count_nonzero(self.breaks[1] == IGNORE))


class Loader(Protocol):
    """Batches as a pure function of (fingerprint, seed, step, dp rank, dp size): the step is the whole resume state."""

    @property
    def fingerprint(self) -> str:
        """Identifies the data, independent of ranks; a resumed run compares it."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until each planned segment was seen."""
        ...

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step; micro-batch j has the same window on every rank."""
        ...

    def described(self, step: int) -> list[str]:
        """The content of each of ``batches(step)``, for a message: window, number, sources."""
        ...
