"""Short or long: documents sorted by the original window, and drawn up to a budget.

A document is short when it fits the original window L0 with its BOS and EOS (paper, section 3.3 and Table 1). With a budget every source
gets its share by weight *inside each window*, so that up-weighting long documents does not change the mix of sources (Fu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.data.batch import LONG, SHORT


@dataclass(frozen=True)
class Selection:
    """Documents in the order in which they are planned; three columns of one length.

    Attributes:
        source: int16, index into the corpus' sources.
        document: int64, index into that source's store.
        length: int64, tokens with BOS and EOS.
    """

    source: np.ndarray
    document: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.length.sum())

    def take(self, index: np.ndarray) -> Selection:
        """The rows of an index or a mask."""
        return Selection(self.source[index], self.document[index], self.length[index])


def concatenate(parts: Sequence[Selection]) -> Selection:
    """One selection after the other."""
    if not parts:
        return Selection(np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Selection(*(np.concatenate([getattr(part, column) for part in parts]) for column in ("source", "document", "length")))


def window_of(length_tokens: int, original_window_tokens: int) -> str:
    """The window that a document trains, by its length with BOS and EOS."""
    return SHORT if length_tokens <= original_window_tokens else LONG


def sort_by_window(lengths: Sequence[np.ndarray], original_window_tokens: int) -> tuple[list[Selection], list[Selection]]:
    """Short and long documents of every source, in store order.

    Args:
        lengths: tokens of each document, an array a source.
        original_window_tokens: L0.
    """
    short, long = [], []
    for source, of_source in enumerate(lengths):
        tokens = np.asarray(of_source, dtype=np.int64)
        everything = Selection(np.full(len(tokens), source, np.int16), np.arange(len(tokens)), tokens)
        short.append(everything.take(tokens <= original_window_tokens))
        long.append(everything.take(tokens > original_window_tokens))
    return short, long


def draw(sources: Sequence[Selection], weights: Sequence[float], budget_tokens: int, rng: np.random.Generator) -> Selection:
    """The documents of one window in planned order.

    Args:
        sources: what each source has.
        weights: share of each source, relative to the others; acts only with a budget.
        budget_tokens: 0 takes every document once; else each source gives whole documents until its share is reached, and begins again from
            a new permutation when it is used up.
        rng: decides the order.
    """
    if budget_tokens <= 0:
        drawn = concatenate(sources)
    else:
        total = sum(weight for weight, source in zip(weights, sources, strict=True) if len(source)) or 1.0
        shares = (weight / total * budget_tokens for weight in weights)
        drawn = concatenate([_repeat(source, share, rng) for source, share in zip(sources, shares, strict=True) if len(source)])
    return drawn.take(rng.permutation(len(drawn)))


def _repeat(source: Selection, share_tokens: float, rng: np.random.Generator) -> Selection:
    passes = int(np.ceil(share_tokens / source.tokens))
    order = np.concatenate([np.zeros(0, np.int64), *(rng.permutation(len(source)) for _ in range(passes))])
    before = np.cumsum(source.length[order]) - source.length[order]
    return source.take(order[before < share_tokens])
