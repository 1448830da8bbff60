"""Stretches of stored text of any length: filler of needle documents, crops for a curriculum, documents for perplexity.

Choice: while some document is long enough, a stretch comes from inside one document, and each place is as likely as any
other. Else documents are joined, without their BOS and EOS. Cost: a document shorter than the stretch is never used
while a longer one exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lr2train.data.store import SourceStore


class Text:
    """Random text of some stores.

    Args:
        stores: hold the documents, with BOS and EOS.
        n_borders: special tokens around a document: 2, or 1 where documents have no BOS.
    """

    def __init__(self, stores: Sequence[SourceStore], n_borders: int) -> None:
        self._stores = [store for store in stores if len(store)]
        self._skipped = n_borders - 1  # tokens before the text of a document: its BOS
        usable = [
            np.flatnonzero(np.ones(len(store), bool) if store.usable is None else store.usable)
            for store in self._stores
        ]
        lengths = [
            store.lengths[kept].astype(np.int64) - n_borders for store, kept in zip(self._stores, usable, strict=True)
        ]
        self._lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        self._document = np.concatenate([np.zeros(0, np.int64), *usable])
        self._store = np.repeat(np.arange(len(self._stores)), [len(kept) for kept in usable])
        self._places: dict[int, np.ndarray] = {}  # by length of a crop: cumulative number of places, over all documents

    @property
    def tokens(self) -> int:
        """Text tokens in all."""
        return int(self._lengths.sum())

    @property
    def longest(self) -> int:
        """Text tokens of the longest document."""
        return int(self._lengths.max(initial=0))

    def draw(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        """``n`` stretches without BOS or EOS, int64 [n, length]; there must be some text."""
        assert self.tokens
        return (
            self._crops(rng, n, length)
            if self.longest >= length
            else np.stack([self._joined(rng, length) for _ in range(n)])
        )

    def draw_apart(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        """Like ``draw``, but no document gives a second stretch before each that is long enough gave one."""
        long = np.flatnonzero(self._lengths >= length)
        if not len(long):
            return self.draw(rng, n, length)
        document = np.concatenate([rng.permutation(long) for _ in range(-(-n // len(long)))])[:n]
        return self._cut(document, rng.integers(self._lengths[document] - length + 1), length)

    def _crops(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        if length not in self._places:
            self._places[length] = np.maximum(self._lengths - length + 1, 0).cumsum()
        ends = self._places[length]  # a long document has more places, so it is drawn more often
        pick = rng.integers(ends[-1], size=n)
        document = np.searchsorted(ends, pick, side="right")
        return self._cut(document, pick - np.where(document > 0, ends[document - 1], 0), length)

    def _cut(self, document: np.ndarray, place: np.ndarray, length: int) -> np.ndarray:
        crops = [self._read(which, at, length) for which, at in zip(document.tolist(), place.tolist(), strict=True)]
        return np.stack(crops)

    def _read(self, document: int, place: int, length: int) -> np.ndarray:
        start = self._skipped + place
        return (
            self._stores[self._store[document]]
            .read(int(self._document[document]), start, start + length)
            .astype(np.int64)
        )

    def _joined(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Documents in order, from a random one on; the first follows the last."""
        document, parts, missing = int(rng.integers(len(self._lengths))), [], length
        while missing > 0:
            parts.append(self._read(document, 0, min(int(self._lengths[document]), missing)))
            missing -= len(parts[-1])
            document = (document + 1) % len(self._lengths)
        return np.concatenate(parts)
