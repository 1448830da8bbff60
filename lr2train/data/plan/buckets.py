"""Buckets: ranges of document lengths, the window that each range trains, and the documents of a source in each.

A document is short when it fits the original window L0 with its BOS and EOS (paper, section 3.3). Budgets may be set
for finer ranges inside a window (paper, Table 1: L0 - 100k, 100k - 200k).

Choice: the whole length of a document, before any cut, decides its bucket. The tokens over the bucket's limit (L0 in
short segments, T in long ones) are split off, truncated, or dropped with the document. Documents in no bucket are not
planned, and are counted. Cost: of a split document only the first part has BOS, and only the last part has EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lr2train.config import BucketConfig, DataConfig, OverLong, SourceConfig, UserError
from lr2train.data.batch import LONG, SHORT, WINDOWS

ENDLESS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Bucket:
    """A range of lengths, all defaults resolved.

    Attributes:
        name: unique among the buckets.
        window: that its documents train.
        above_tokens, to_tokens: above_tokens < length <= to_tokens.
        weight: share of the window's tokens, relative to the window's other buckets.
        sources: weights of single sources; empty where the sources' own weights act.
        limit_tokens: longest part of a document in one segment.
        over_limit: split, truncate or drop longer documents.
    """

    name: str
    window: str
    above_tokens: int
    to_tokens: int
    weight: float
    sources: dict[str, float]
    limit_tokens: int
    over_limit: OverLong

    def holds(self, lengths: np.ndarray) -> np.ndarray:
        """bool, like ``lengths``: whether documents of these lengths lie in the bucket."""
        return (lengths > self.above_tokens) & (lengths <= self.to_tokens)

    def serves(self, source: SourceConfig) -> bool:
        """Whether documents of a source may be drawn for the bucket."""
        return self.window in source.windows and (not self.sources or source.name in self.sources)

    @property
    def range_text(self) -> str:
        """The lengths for a person."""
        return (
            f"over {self.above_tokens:,}"
            if self.to_tokens == ENDLESS
            else f"{self.above_tokens + 1:,}-{self.to_tokens:,}"
        )


def window_of(length_tokens: int, original_window_tokens: int) -> str:
    """The window that a document trains, by its length with BOS and EOS."""
    return SHORT if length_tokens <= original_window_tokens else LONG


def resolve(data: DataConfig, original_window_tokens: int) -> list[Bucket]:
    """The buckets of ``data.buckets``, short ones first.

    A window without a bucket gets one of all its documents, under the window's name.

    Raises:
        UserError: a name, window, range or weight is out of its limits, or two ranges would count a document of one
            source twice.
    """
    for one in data.buckets:
        if one.window not in WINDOWS:
            raise UserError(
                f"data.buckets.{one.name}.window={one.window} is not one of {', '.join(WINDOWS)}; set it to one of them"
            )
    listed = {window: [one for one in data.buckets if one.window == window] for window in WINDOWS}
    buckets = [
        _resolved(one, data, original_window_tokens)
        for window in WINDOWS
        for one in listed[window] or [BucketConfig(name=window, window=window)]
    ]
    _check_names_and_weights(buckets, data)
    _check_ranges(buckets, data.sources)
    return buckets


def _resolved(one: BucketConfig, data: DataConfig, original_window_tokens: int) -> Bucket:
    short = one.window == SHORT
    above = one.above_tokens if one.above_tokens is not None else 0 if short else original_window_tokens
    to = one.to_tokens if one.to_tokens is not None else original_window_tokens if short else ENDLESS
    limit = original_window_tokens if short else data.segment_tokens
    return Bucket(
        one.name,
        one.window,
        above,
        to,
        one.weight,
        dict(one.sources),
        limit,
        OverLong(one.over_limit or data.over_long),
    )


def _check_names_and_weights(buckets: Sequence[Bucket], data: DataConfig) -> None:
    names, known = [one.name for one in buckets], {source.name for source in data.sources}
    for one in buckets:
        where = f"data.buckets.{one.name}"
        if names.count(one.name) > 1:
            raise UserError(
                f"data.buckets has the name {one.name} {names.count(one.name)} times; give each bucket its own name"
            )
        if not 0 <= one.above_tokens < one.to_tokens:
            raise UserError(
                f"{where} holds lengths above {one.above_tokens} and up to {one.to_tokens}, which is none; set "
                f"{where}.above_tokens and {where}.to_tokens (each defaults to a border of the window)"
            )
        for key, weight in (
            ("weight", one.weight),
            *((f"sources.{name}", weight) for name, weight in one.sources.items()),
        ):
            if not weight >= 0:
                raise UserError(f"{where}.{key}={weight} is not 0 or more; set it to a share")
        unknown = sorted(one.sources.keys() - known)
        if unknown:
            raise UserError(
                f"{where}.sources names {unknown[0]}, and data.sources has {', '.join(sorted(known))}; name one of "
                "these"
            )
    for window in WINDOWS:
        named = [one.name for one in buckets if one.window == window and one.sources]
        without = [one.name for one in buckets if one.window == window and not one.sources]
        if named and without:
            raise UserError(
                f"data.buckets.{named[0]} has weights of single sources and data.buckets.{without[0]} of the same "
                "window has none; give sources to every bucket of a window, or to none"
            )


def _check_ranges(buckets: Sequence[Bucket], sources: Sequence[SourceConfig]) -> None:
    for source in sources:
        mine = sorted((one for one in buckets if one.serves(source)), key=lambda one: one.above_tokens)
        for lower, upper in pairwise(mine):
            if upper.above_tokens < lower.to_tokens:
                raise UserError(
                    f"documents of {source.name} of {upper.above_tokens + 1} tokens and more lie in two buckets, "
                    f"data.buckets.{lower.name} and data.buckets.{upper.name}; set data.buckets.{lower.name}.to_tokens "
                    f"to at most {upper.above_tokens}"
                )


@dataclass(frozen=True)
class Cell:
    """The documents of one source in one bucket that may be drawn: a cell of the mix.

    Attributes:
        document: int32 [n], index into the source's store.
        length: int32 [n], tokens that a draw of the document gives: the whole length, or the limit where the document
            is truncated.
        dropped_documents, dropped_tokens: left out by ``over_limit=drop``.
    """

    document: np.ndarray
    length: np.ndarray
    dropped_documents: int = 0
    dropped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.document)

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the documents."""
        return int(self.length.sum(dtype=np.int64))


NO_DOCUMENTS = Cell(np.zeros(0, np.int32), np.zeros(0, np.int32))


def cell_of(lengths: np.ndarray, kept: np.ndarray | None, bucket: Bucket) -> Cell:
    """The documents that a bucket may draw from a source.

    Args:
        lengths: int32 [documents], tokens.
        kept: bool [documents], which may be used; None is all.
        bucket: gives the range, the limit, and the fate of documents over the limit.
    """
    inside = bucket.holds(lengths)
    if kept is not None:
        inside &= kept
    document = np.flatnonzero(inside).astype(np.int32)
    length = np.asarray(lengths)[document].astype(np.int32, copy=False)
    over = length > bucket.limit_tokens
    if bucket.over_limit is OverLong.drop and over.any():
        return Cell(document[~over], length[~over], int(over.sum()), int(length[over].sum(dtype=np.int64)))
    if bucket.over_limit is OverLong.truncate and over.any():
        length = np.minimum(length, np.int32(bucket.limit_tokens))
    return Cell(document, length)


def draw(cell: Cell, target_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Documents of a cell whose tokens reach a target; the last document is chosen to exceed the target least.

    Whole passes come first, then a random part of one more pass. So no document comes twice before each came once.

    Args:
        cell: has a document where the target is above 0.
        target_tokens: to reach.
        rng: decides which documents make up the last, incomplete pass.

    Returns:
        int32, indices into the cell, with repeats, ordered by pass.
    """
    if target_tokens <= 0:
        return np.zeros(0, np.int32)
    passes, missing = divmod(target_tokens, cell.tokens)
    whole = np.tile(np.arange(len(cell), dtype=np.int32), passes)
    if not missing:
        return whole
    order = rng.permutation(len(cell)).astype(np.int32)
    ends = np.cumsum(cell.length[order], dtype=np.int64)
    n_before = int(np.searchsorted(ends, missing))  # so many documents together stay below the target
    if n_before:
        missing -= int(ends[n_before - 1])
    rest = order[n_before:]  # its first document reaches the target, and another may exceed the target less
    excess = cell.length[rest] - missing
    last = rest[np.argmin(np.where(excess >= 0, excess, np.iinfo(np.int32).max))]
    return np.concatenate([whole, order[:n_before], [last]]).astype(np.int32, copy=False)
