"""What training sees of the data: one segment's tokens, and the few facts that its labels and positions follow from.

Choice: a batch holds token ids as the store has them, two bytes each for most vocabularies. A label is the next token but at ``breaks``, a position
counts from where its span begins: both are made where they are needed, on the device that trains (``training.segment``). So a batch costs the host one
copy, and what is kept ahead is small. Cost: whoever wants labels on the host has them made (``labels``, ``positions``).
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
    """One segment of T tokens, whole: the engine shards it. Its arrays are to be read only.

    Attributes:
        tokens: [T], uint16 or int32.
        breaks: int64 [2, n], places and labels: where the label is not the next token of the segment. It is ``IGNORE`` where a document ends, in padding
            and where nothing is to be learned; where a document goes on in another segment, it is that document's next token. Each place
            once; the last one of the segment is among them.
        spans: half-open, disjoint, sorted; a token attends to its own span only. Padding lies outside every span.
        window: ``short`` or ``long``: which RoPE table acts.
    """

    tokens: np.ndarray
    breaks: np.ndarray
    spans: tuple[tuple[int, int], ...]
    window: str

    def __post_init__(self) -> None:
        assert self.window in WINDOWS
        assert self.tokens.ndim == 1 and self.tokens.dtype in (np.uint16, np.int32)
        assert self.breaks.dtype == np.int64 and len(self.breaks) == 2

    @classmethod
    def of_labels(cls, tokens: np.ndarray, labels: np.ndarray, spans: tuple[tuple[int, int], ...], window: str) -> Batch:
        """A batch whose labels [T] are given one by one."""
        following = np.append(tokens[1:], IGNORE)  # the last place is a break whatever its label is
        places = np.flatnonzero((labels != following) | (np.arange(len(tokens)) == len(tokens) - 1))
        return cls(tokens, np.stack([places, labels[places]]).astype(np.int64), spans, window)

    @property
    def labels(self) -> np.ndarray:
        """int32 [T]; ``labels[t]`` is the token that position t predicts, ``IGNORE`` where there is none. Never a token of another document."""
        labels = np.empty(len(self.tokens), np.int32)
        labels[:-1] = self.tokens[1:]
        labels[self.breaks[0]] = self.breaks[1]
        return labels

    @property
    def positions(self) -> np.ndarray:
        """int32 [T], what RoPE rotates by: 0, 1, 2 … in every span; 0 outside."""
        positions = np.zeros(len(self.tokens), np.int32)
        for start, stop in self.spans:
            positions[start:stop] = np.arange(stop - start)
        return positions

    @property
    def n_target_tokens(self) -> int:
        """Labels that are not ``IGNORE``."""
        return len(self.tokens) - int(np.count_nonzero(self.breaks[1] == IGNORE))


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

    def described(self, step: int) -> list[str]:
        """What each of ``batches(step)`` holds, for a message: its window, its number and the sources of its documents."""
        ...
