"""Blocks: tiles cut into rounds that one kernel call each can compute.

A block is what one call of the kernel door (``kernel.forward_block``, ``kernel.backward_block``) computes. A block is
made once for a segment and keeps its rounds, its row indices and its masks, so that all layers and the backward pass
share them.

Choice: the CUDA kernels take tiles of any lengths in one call (cu_seqlens), so their rounds are few. The CPU kernel
takes tiles of one shape only, with masks aligned to the top left: its rounds are cut finer. Cost: two ways to cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lr2train.attention.once import Once
from lr2train.attention.tiles import Tile
from lr2train.parallel.comm import to_device
from lr2train.parallel.layout import Ranges

_LONGEST_BAND = 256  # queries of a CPU tile under a sliding window; its mask has this many by (this + window) elements


class CappedScale(float):
    """A scale of scores that are capped before the softmax: ``softcap tanh(scale q k / softcap)`` (Gemma 2, arXiv
    2408.00118, section 2).

    A float, so that it travels through every strategy to its kernel like any scale.
    """

    softcap: float

    def __new__(cls, scale: float, softcap: float) -> CappedScale:
        """A scale with its cap."""
        made = super().__new__(cls, scale)
        made.softcap = softcap
        return made


def softcap_of(scale: float) -> float:
    """The cap that travels with a scale; 0 for none."""
    return scale.softcap if isinstance(scale, CappedScale) else 0.0


class Queries(NamedTuple):
    """The queries' part of the input of a block's backward: q, out and grad_out [Tq, Hq, D] and lse [Tq, Hq].

    ``out`` (in q's dtype) and ``lse`` are of the whole softmax: over all keys that a query sees, in this block and in
    every other.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor

    def part(self, rows: slice | Tensor, heads: slice = slice(None)) -> Queries:
        """Some rows, or some heads."""
        return Queries(*(x[rows, heads] for x in self))


@dataclass(frozen=True)
class Rows(Once):
    """Rows of a tensor, as half-open ranges in ascending order."""

    ranges: Ranges

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def on(self, device: torch.device) -> slice | Tensor:
        """The index of the rows of a tensor on ``device``: a slice, which copies nothing, where the ranges adjoin."""
        return self.once(_selection, device)

    def covers(self, n_rows: int) -> bool:
        """Whether these are all of ``n_rows`` rows, in order: nothing has to be filled up or copied."""
        return self._adjoin and self._bounds == (0, n_rows)

    @property
    def _bounds(self) -> tuple[int, int]:
        return (self.ranges[0][0], self.ranges[-1][1]) if self.ranges else (0, 0)

    @cached_property
    def _adjoin(self) -> bool:
        return all(left[1] == right[0] for left, right in pairwise(self.ranges))


def _selection(rows: Rows, device: torch.device) -> slice | Tensor:
    if rows._adjoin:
        return slice(*rows._bounds)
    with torch.inference_mode(False):  # an evaluation may ask first, and autograd refuses to save its tensors
        return to_device(torch.cat([torch.arange(start, stop) for start, stop in rows.ranges]), device)


@dataclass(frozen=True, eq=False)
class Band(Once):
    """The mask of CPU tiles that a sliding window cuts; all tiles of one shape share a mask."""

    n_queries: int
    n_keys: int
    lead: int
    sliding_window: int

    def added(self, dtype: torch.dtype) -> Tensor:
        """[n_queries, n_keys], added to the scores: 0 where a query sees a key, else -inf."""
        return self.once(_additive, dtype)


def _additive(band: Band, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        after = torch.arange(band.n_queries)[:, None] + band.lead - torch.arange(band.n_keys)
        mask = torch.zeros(band.n_queries, band.n_keys, dtype=dtype)
        return mask.masked_fill_((after < 0) | (after >= band.sliding_window), -math.inf)


@dataclass(frozen=True, eq=False)
class Round(Once):
    """The input of one kernel call: tiles that share no query and no key, under one kind of mask."""

    tiles: tuple[Tile, ...]
    causal: bool
    sliding_window: int | None  # None where no query's window leaves out a key
    fresh: bool  # no query of this round stands in an earlier round
    fresh_both: bool  # nor any key
    band: Band | None = None  # the CPU kernel's mask, where a sliding window cuts

    @cached_property
    def queries(self) -> Rows:
        """The rows of queries, tile after tile."""
        return Rows(tuple((tile.q_start, tile.q_stop) for tile in self.tiles))

    @cached_property
    def keys(self) -> Rows:
        """The rows of keys, tile after tile."""
        return Rows(tuple((tile.k_start, tile.k_stop) for tile in self.tiles))


@dataclass(frozen=True, eq=False)
class Block:
    """Tiles between rows of queries and rows of keys, under a sliding window or none. Tiles may share queries."""

    tiles: tuple[Tile, ...]
    sliding_window: int | None = None

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs of one head."""
        return sum(tile.pairs(self.sliding_window) for tile in self.tiles)

    @cached_property
    def cuda_rounds(self) -> tuple[Round, ...]:
        """The calls of a CUDA kernel, in order."""
        return make_rounds(self.tiles, self.sliding_window, cpu=False)

    @cached_property
    def cpu_rounds(self) -> tuple[Round, ...]:
        """The calls of the CPU kernel, in order."""
        return make_rounds(self.tiles, self.sliding_window, cpu=True)


# ---- tiles -> rounds ----


class _Mask(NamedTuple):
    """The properties that the tiles of one kernel call share."""

    causal: bool
    cut: bool  # by the sliding window
    gap: int  # where cut
    shape: tuple[int, int] | None  # (queries, keys) of a tile: for the CPU kernel


def make_rounds(tiles: tuple[Tile, ...], sliding_window: int | None, cpu: bool) -> tuple[Round, ...]:
    """The kernel calls that ``tiles`` take, in order; ``cpu``: cut as the CPU kernel needs them."""
    trimmed = [left for tile in tiles if (left := tile.trimmed(sliding_window)) is not None]
    if not any(_is_cut(tile, sliding_window) for tile in trimmed):
        sliding_window = None
    if cpu:
        trimmed = [part for tile in trimmed for part in _cpu_tiles(tile, sliding_window)]
    calls: dict[_Mask, list[list[Tile]]] = {}
    for tile in trimmed:
        _pack(calls.setdefault(_mask_of(tile, sliding_window, cpu), []), tile)
    return tuple(_rounds(calls, sliding_window, cpu))


def _mask_of(tile: Tile, sliding_window: int | None, cpu: bool) -> _Mask:
    # On CUDA a causal tile that the window does not cut shares a call with those that it cuts: the mask is the same.
    cut = _is_cut(tile, sliding_window) if cpu or tile.gap else sliding_window is not None
    return _Mask(tile.gap == 0, cut, tile.gap if cut else 0, (tile.n_queries, tile.n_keys) if cpu else None)


def _is_cut(tile: Tile, sliding_window: int | None) -> bool:
    """Whether the window of the last query begins after the first key."""
    return sliding_window is not None and tile.n_queries - 1 + tile.lead - sliding_window >= 0


def _pack(calls: list[list[Tile]], tile: Tile) -> None:
    """Append a tile to the first call whose tiles all lie before the tile; open a new call where there is none."""
    for tiles in calls:
        if tiles[-1].q_stop <= tile.q_start and tiles[-1].k_stop <= tile.k_start:
            tiles.append(tile)
            return
    calls.append([tile])


def _rounds(packed: dict[_Mask, list[list[Tile]]], sliding_window: int | None, cpu: bool) -> Iterator[Round]:
    every = [tile for calls in packed.values() for tiles in calls for tile in tiles]
    q_seen = bytearray(max((tile.q_stop for tile in every), default=0))  # 1: the row stands in an earlier round
    k_seen = bytearray(max((tile.k_stop for tile in every), default=0))
    for mask, calls in packed.items():
        band = _band_of(calls[0][0], sliding_window) if cpu and mask.cut else None
        for tiles in calls:
            fresh = not any(1 in q_seen[tile.q_start : tile.q_stop] for tile in tiles)
            fresh_keys = not any(1 in k_seen[tile.k_start : tile.k_stop] for tile in tiles)
            window = sliding_window if mask.cut else None
            yield Round(tuple(tiles), mask.causal, window, fresh, fresh and fresh_keys, band)
            for tile in tiles:
                q_seen[tile.q_start : tile.q_stop] = b"\1" * tile.n_queries
                k_seen[tile.k_start : tile.k_stop] = b"\1" * tile.n_keys


def _band_of(tile: Tile, sliding_window: int | None) -> Band:
    assert sliding_window is not None  # or nothing would be cut
    return Band(tile.n_queries, tile.n_keys, tile.lead, sliding_window)


def _cpu_tiles(tile: Tile, sliding_window: int | None) -> Iterator[Tile]:
    """A tile as the CPU kernel can take it: a window is cut into bands of few queries, whose masks stay small."""
    for part in [tile] if sliding_window is None or not _is_cut(tile, sliding_window) else _bands(tile, sliding_window):
        yield from [part] if _is_cut(part, sliding_window) else _squared(part)


def _squared(tile: Tile) -> list[Tile]:
    """A causal tile as a full rectangle and a square: the CPU kernel aligns its causal mask to the top left."""
    if tile.gap or tile.n_keys == tile.n_queries:
        return [tile]
    border = tile.k_stop - tile.n_queries
    return [Tile(tile.q_start, tile.q_stop, tile.k_start, border, tile.n_queries), tile._replace(k_start=border)]


def _bands(tile: Tile, sliding_window: int) -> Iterator[Tile]:
    for first in range(0, tile.n_queries, _LONGEST_BAND):
        last = min(first + _LONGEST_BAND, tile.n_queries) - 1
        n_keys = min(tile.n_keys, last + tile.lead + 1)
        gap = last + tile.lead - (n_keys - 1)
        band = Tile(tile.q_start + first, tile.q_start + last + 1, tile.k_start, tile.k_start + n_keys, gap)
        trimmed = band.trimmed(sliding_window)
        if trimmed is not None:
            yield trimmed
