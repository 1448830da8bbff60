"""One layer's attention on one rank, over a long segment on one GPU: TFLOP/s, beside plain kernels on the same pairs.

A *slice* is the attention that one rank of a sequence-parallel group computes for one layer. Under ``ulysses`` a slice
is a share of the heads over the whole segment. On the ``ring`` a slice is the rank's queries against the zigzag blocks
that they see, step by step, merged. The strategies' own code runs (``one_rank``): copies before and after an exchange
are timed, the network is not.

A plain kernel gets the same (query, key) pairs: one causal call over the rank's heads, or one call for each tile of the
ring, without a merge. FLOPs count causal pairs, as in FlashAttention-2 (Dao, arXiv 2307.08691, section 4.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lr2train.attention.gather import exchange_of
from lr2train.attention.ring_flash_attn import zigzag_function
from lr2train.attention.ring_steps import steps_of
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Spans, Tile, diagonal
from lr2train.attention.ulysses import spread_kv_heads
from lr2train.config import UserError
from lr2train.model.flops import FLASH_BACKWARD, attention_flops
from lr2train.parallel.mesh import Mesh
from tools.gpu.kernels import PLAIN, using
from tools.gpu.one_rank import one_rank
from tools.gpu.timing import Flops, Pass, Timing, time_in_turn


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int


Documents = Literal["whole", "aligned", "crossing"]

LLAMA3_8B = Model("LLaMA3-8B", 4096, 32, 32, 8, 128, 14336, 128256)
SMALL = Model("a small Llama", 128, 2, 8, 4, 16, 256, 512)


@dataclass(frozen=True)
class SliceSetting:
    """A rank of a sequence-parallel group, and the documents of its segment: one, short ones that end at the borders of
    sequence shards, or short ones that cross them.
    """

    model: Model
    n_tokens: int  # of the segment
    sp: int
    rank: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_ups: int
    documents: Documents = "whole"

    @property
    def spans(self) -> Spans:
        """The documents of the segment. Short ones have half a shard: 8192 tokens at 128k on 8 ranks."""
        if self.documents == "whole":
            return ((0, self.n_tokens),)
        length = self.n_tokens // self.sp // 2
        first = length if self.documents == "aligned" else length // 2
        return tuple(pairwise([0, *range(first, self.n_tokens, length), self.n_tokens]))

    @property
    def segment(self) -> PackedSegment:
        """The segment that the ranks share."""
        return PackedSegment(self.spans, self.n_tokens, self.sp)

    @property
    def work(self) -> SegmentWork:
        """What strategies are asked about it."""
        model = self.model
        return SegmentWork(self.segment, model.heads, model.kv_heads, model.head_size, self.dtype.itemsize)

    def on(self, n_tokens: int) -> SliceSetting:
        """The same setting over another segment length."""
        return replace(self, n_tokens=n_tokens)


@dataclass(frozen=True)
class SliceTimings:
    """Timings of one strategy's slice by name; our timing and the plain timing of a kernel are compared."""

    strategy: str
    n_tokens: int
    timings: dict[str, Timing]
    kernels: tuple[str, ...]

    @property
    def ours(self) -> list[tuple[str, str]]:
        """(kernel, name of our timing that uses it)."""
        return [(name, _our_name(name)) for name in self.kernels]

    @property
    def failures(self) -> int:
        """Our timings that failed."""
        return sum(self.timings[timing].error is not None for _, timing in self.ours)

    def ratio(self, timing: str) -> float:
        """Time of our timing over the time of its plain kernel; nan where either failed."""
        kernel = {ours: name for name, ours in self.ours}[timing]
        return self.timings[timing].over(self.timings[_plain_name(kernel)])

    def beside(self, timing: str) -> float | None:
        """``ratio`` for our timings, None for other timings."""
        return self.ratio(timing) if timing in dict(self.ours).values() else None


def kernel_flops(n_pairs: int, head_size: int) -> Flops:
    """Flash attention over ``n_pairs`` (query, key) pairs, summed over query heads: 4 D forward, 10 D backward."""
    return Flops(attention_flops(n_pairs, head_size), attention_flops(n_pairs, head_size, FLASH_BACKWARD))


def slice_pairs(setting: SliceSetting, strategy: str) -> int:
    """(query, key) pairs of the rank, summed over its query heads."""
    return STRATEGIES[strategy].pairs(setting.work, setting.rank)


def time_attention(setting: SliceSetting, strategy: str, kernels: Sequence[str]) -> SliceTimings:
    """Time the slice of a strategy with each of ``kernels``, beside plain calls and libraries.

    ``strategy``: ulysses | ring | gather | local.

    Raises:
        torch.OutOfMemoryError: the slice does not fit into memory.
    """
    others = ["torch_sdpa"] if setting.device.type == "cuda" else []
    with one_rank(setting.rank, setting.sp) as mesh:
        passes = [
            *(_ours(setting, strategy, name, mesh) for name in kernels),
            *(plain_pass(setting, strategy, name) for name in [*kernels, *others]),
            *(_library(setting, mesh) if strategy == "ring" else ()),
        ]
        timings = time_in_turn(passes, setting.device, setting.rounds, setting.warm_ups)
    return SliceTimings(strategy, setting.n_tokens, timings, tuple(kernels))


def _our_name(name: str) -> str:
    return f"ours, {name}"


def _plain_name(name: str) -> str:
    return f"plain {name}"


def _draw(setting: SliceSetting, rows: int, *heads: int) -> list[Tensor]:
    """Random tensors [rows, heads, D], one for each number of heads."""
    return [torch.randn(rows, n, setting.model.head_size, device=setting.device, dtype=setting.dtype) for n in heads]


def _ours(setting: SliceSetting, strategy: str, name: str, mesh: Mesh) -> Pass:
    """The rank's sequence shard through a strategy that uses kernel ``name``."""
    return replace(_through(setting, strategy, mesh), name=_our_name(name), around=partial(using, name))


def _library(setting: SliceSetting, mesh: Mesh) -> Iterator[Pass]:
    """The same sequence shard through ring-flash-attn, where importable."""
    with contextlib.suppress(UserError):
        zigzag_function()
        yield replace(_through(setting, "ring_flash_attn", mesh), name="ring-flash-attn")


def _through(setting: SliceSetting, strategy: str, mesh: Mesh) -> Pass:
    model, rows = setting.model, setting.n_tokens // setting.sp
    *leaves, grad = _draw(setting, rows, model.heads, model.kv_heads, model.kv_heads, model.heads)
    q, k, v = (x.requires_grad_() for x in leaves)
    attend = STRATEGIES[strategy].prepare(setting.segment, mesh, None)

    def forward() -> list[Tensor]:
        return [attend(q, k, v, setting.model.head_size**-0.5)]

    return Pass(strategy, forward, (q, k, v), kernel_flops(slice_pairs(setting, strategy), model.head_size), [grad])


def plain_pass(setting: SliceSetting, strategy: str, name: str) -> Pass:
    """Kernel ``name`` over the same pairs, one call per tile. Tiles share no tensors, so no gradients are summed."""
    tiles, heads, kv_heads = plain_tiles(setting, strategy)
    drawn = [
        (_draw(setting, tile.n_queries, heads, heads), _draw(setting, tile.n_keys, kv_heads, kv_heads))
        for tile in tiles
    ]
    rows = [[x.requires_grad_() for x in (q, k, v)] for (q, _), (k, v) in drawn]
    scale = setting.model.head_size**-0.5

    def forward() -> list[Tensor]:
        return [PLAIN[name](q, k, v, scale, causal=tile.gap == 0) for (q, k, v), tile in zip(rows, tiles, strict=True)]

    pairs = heads * sum(tile.pairs() for tile in tiles)
    grads = [grad for (_, grad), _ in drawn]
    return Pass(
        _plain_name(name),
        forward,
        [x for qkv in rows for x in qkv],
        kernel_flops(pairs, setting.model.head_size),
        grads,
    )


def plain_tiles(setting: SliceSetting, strategy: str) -> tuple[list[Tile], int, int]:
    """(tiles, query heads, key heads) of the rank's slice. Causal tiles are square: mask alignment does not matter."""
    model, sp = setting.model, setting.sp
    if strategy == "ulysses":
        return list(diagonal(setting.spans)), model.heads // sp, spread_kv_heads(model.kv_heads, sp) // sp
    if strategy == "ring":
        blocks = [step.block for step in steps_of(setting.segment, setting.rank)]
    else:  # a shard without exchange is one that fetches nothing
        blocks = [exchange_of(setting.segment, setting.rank, None).block]
    return [part for block in blocks for tile in block.tiles for part in _squared(tile)], model.heads, model.kv_heads


def _squared(tile: Tile) -> list[Tile]:
    """A causal tile with more keys than queries as a full rectangle and a square."""
    if tile.gap or tile.n_queries == tile.n_keys:
        return [tile]
    border = tile.k_stop - tile.n_queries
    return [tile._replace(k_stop=border, gap=tile.n_queries), tile._replace(k_start=border)]
