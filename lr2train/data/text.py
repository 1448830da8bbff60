"""Stretches of stored text of any length, for filler, for crops and for perplexity.

Choice: a stretch comes from inside one document, every place as likely as any other, as long as some document is long enough; else
documents are joined, without their BOS and EOS. Cost: a document shorter than the stretch never shows up while a longer one exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lr2train.data.store import SourceStore


class Text:
    """Random text of some stores.

    Args:
        stores: where documents lie, with BOS and EOS.
        n_borders: 2, or 1 where documents have no BOS.
    """

    def __init__(self, stores: Sequence[SourceStore], n_borders: int) -> None:
        self._stores = [store for store in stores if len(store)]
        self._skipped = n_borders - 1  # tokens before a document's text
        usable = [np.flatnonzero(np.ones(len(store), bool) if store.usable is None else store.usable) for store in self._stores]
        lengths = [store.lengths[kept].astype(np.int64) - n_borders for store, kept in zip(self._stores, usable, strict=True)]
        self._lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        self._document = np.concatenate([np.zeros(0, np.int64), *usable])
        self._store = np.repeat(np.arange(len(self._stores)), [len(kept) for kept in usable])
        self._places: dict[int, np.ndarray] = {}  # by length: running count of places for a crop, over all documents

    @property
    def tokens(self) -> int:
        """Text tokens in all."""
        return int(self._lengths.sum())

    @property
    def longest(self) -> int:
        """Text tokens of the longest document."""
        return int(self._lengths.max(initial=0))

    def draw(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        """``n`` stretches without BOS or EOS, int64 [n, length]. There must be text."""
        assert self.tokens
        return self._crops(rng, n, length) if self.longest >= length else np.stack([self._joined(rng, length) for _ in range(n)])

    def draw_apart(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        """Like ``draw``, but from the documents that are long enough in turn: no two from one before each has given one."""
        long = np.flatnonzero(self._lengths >= length)
        if not len(long):
            return self.draw(rng, n, length)
        document = np.concatenate([rng.permutation(long) for _ in range(-(-n // len(long)))])[:n]
        return self._cut(document, rng.integers(self._lengths[document] - length + 1), length)

    def _crops(self, rng: np.random.Generator, n: int, length: int) -> np.ndarray:
        if length not in self._places:
            self._places[length] = np.maximum(self._lengths - length + 1, 0).cumsum()
        ends = self._places[length]
        pick = rng.integers(ends[-1], size=n)
        document = np.searchsorted(ends, pick, side="right")
        return self._cut(document, pick - np.where(document > 0, ends[document - 1], 0), length)

    def _cut(self, document: np.ndarray, place: np.ndarray, length: int) -> np.ndarray:
        crops = [self._read(which, at, length) for which, at in zip(document.tolist(), place.tolist(), strict=True)]
        return np.stack(crops)

    def _read(self, document: int, place: int, length: int) -> np.ndarray:
        start = self._skipped + place
        return self._stores[self._store[document]].read(int(self._document[document]), start, start + length).astype(np.int64)

    def _joined(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Documents from a random one on, around the end if need be."""
        document, parts, missing = int(rng.integers(len(self._lengths))), [], length
        while missing > 0:
            parts.append(self._read(document, 0, min(int(self._lengths[document]), missing)))
            missing -= len(parts[-1])
            document = (document + 1) % len(self._lengths)
        return np.concatenate(parts)
