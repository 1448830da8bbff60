"""The attention of one rank of a large model over a long segment, on one GPU: TFLOP/s, beside plain kernels on the same work.

A *slice* is what one rank of a sequence-parallel group computes for one layer. Under ``ulysses`` that is a share of the heads over the
whole segment; on the ``ring``, this rank's queries against the blocks of the zigzag that they see, step by step, merged. The strategies' own
code runs (``gpu_one_rank``): the copies before and after an exchange are inside, the wire is not.

Plain kernels get the same (query, key) pairs: one causal call over the rank's heads, or one call for each tile of the ring, unmerged.

FLOPs are those of causal pairs: forward q k^T and p v, 4 D for a pair and head; backward five products, 10 D (Dao, FlashAttention-2, arXiv
2307.08691, section 4.1 counts so).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lr2train.attention.ring_flash_attn import zigzag_function
from lr2train.attention.ring_steps import steps_of
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Spans, Tile, diagonal
from lr2train.attention.ulysses import spread_kv_heads
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh
from tools.gpu.kernels import PLAIN, using
from tools.gpu.one_rank import one_rank
from tools.gpu.timing import Flops, Lane, Pass, race


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama that a rank's work follows from."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int


LLAMA3_8B = Model("LLaMA3-8B", 4096, 32, 32, 8, 128, 14336, 128256)
SMALL = Model("a small Llama", 128, 2, 8, 4, 16, 256, 512)


@dataclass(frozen=True)
class Setting:
    """A rank of a sequence-parallel group, and the one span over the whole segment that it works on."""

    model: Model
    n_tokens: int  # of the segment
    sp: int
    rank: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_ups: int

    @property
    def spans(self) -> Spans:
        """One document fills the segment."""
        return ((0, self.n_tokens),)

    @property
    def segment(self) -> PackedSegment:
        """The segment that the ranks share."""
        return PackedSegment(self.spans, self.n_tokens, self.sp)

    @property
    def work(self) -> SegmentWork:
        """What strategies are asked about it."""
        model = self.model
        return SegmentWork(self.segment, model.heads, model.kv_heads, model.head_size, self.dtype.itemsize)

    def on(self, n_tokens: int) -> Setting:
        """The same over a shorter segment."""
        return replace(self, n_tokens=n_tokens)


@dataclass(frozen=True)
class Rivals:
    """One strategy's slice: lanes by name; ours and the plain one of the same kernel are compared."""

    strategy: str
    n_tokens: int
    lanes: dict[str, Lane]
    kernels: tuple[str, ...]

    @property
    def ours(self) -> list[tuple[str, str]]:
        """(kernel, lane that goes through it by our door)."""
        return [(name, _our_name(name)) for name in self.kernels]

    @property
    def failures(self) -> int:
        """How many of ours did not run."""
        return sum(self.lanes[lane].error is not None for _, lane in self.ours)

    def ratio(self, lane: str) -> float:
        """How many times as long one of ours takes as its plain kernel on the same work; nan where either failed."""
        kernel = {ours: name for name, ours in self.ours}[lane]
        return self.lanes[lane].over(self.lanes[_plain_name(kernel)])

    def beside(self, lane: str) -> float | None:
        """``ratio`` of one of ours, None for the others."""
        return self.ratio(lane) if lane in dict(self.ours).values() else None


def attention_flops(pairs: int, head_size: int) -> Flops:
    """Of ``pairs`` (query, key) pairs, summed over query heads: 4 D forward, 10 D backward."""
    return Flops(4.0 * head_size * pairs, 10.0 * head_size * pairs)


def slice_pairs(setting: Setting, strategy: str) -> int:
    """Pairs of the rank, summed over its query heads."""
    return STRATEGIES[strategy].pairs(setting.work, setting.rank)


def race_attention(setting: Setting, strategy: str, kernels: Sequence[str]) -> Rivals:
    """Time the slice of ``strategy`` (ulysses | ring) through each of ``kernels``, each beside its plain self, and what else is at hand.

    Raises:
        torch.OutOfMemoryError: the slice does not fit.
    """
    others = ["torch_sdpa"] if setting.device.type == "cuda" else []
    with one_rank(setting.rank, setting.sp) as mesh:
        passes = [
            *(_ours(setting, strategy, name, mesh) for name in kernels),
            *(_plain(setting, strategy, name) for name in [*kernels, *others]),
            *(_library(setting, mesh) if strategy == "ring" else ()),
        ]
        lanes = race(passes, setting.device, setting.rounds, setting.warm_ups)
    return Rivals(strategy, setting.n_tokens, lanes, tuple(kernels))


def _our_name(name: str) -> str:
    return f"ours, {name}"


def _plain_name(name: str) -> str:
    return f"plain {name}"


def _draw(setting: Setting, rows: int, *heads: int) -> list[Tensor]:
    """Normal numbers [rows, heads, D], one for each number of heads."""
    return [torch.randn(rows, n, setting.model.head_size, device=setting.device, dtype=setting.dtype) for n in heads]


def _ours(setting: Setting, strategy: str, name: str, mesh: Mesh) -> Pass:
    """The rank's shard through a strategy, and through kernel ``name``."""
    return replace(_through(setting, strategy, mesh), name=_our_name(name), around=partial(using, name))


def _library(setting: Setting, mesh: Mesh) -> Iterator[Pass]:
    """The same shard through the library ring-flash-attn, where it can be imported."""
    with contextlib.suppress(UserError):
        zigzag_function()
        yield replace(_through(setting, "ring_flash_attn", mesh), name="ring-flash-attn")


def _through(setting: Setting, strategy: str, mesh: Mesh) -> Pass:
    model, rows = setting.model, setting.n_tokens // setting.sp
    *leaves, grad = _draw(setting, rows, model.heads, model.kv_heads, model.kv_heads, model.heads)
    q, k, v = (x.requires_grad_() for x in leaves)
    attend = STRATEGIES[strategy].prepare(setting.segment, mesh, None)

    def forward() -> list[Tensor]:
        return [attend(q, k, v, setting.model.head_size**-0.5)]

    return Pass(strategy, forward, (q, k, v), attention_flops(slice_pairs(setting, strategy), model.head_size), [grad])


def _plain(setting: Setting, strategy: str, name: str) -> Pass:
    """Kernel ``name`` over the same pairs: a call for each tile, whose rows are its own, so that nothing is added up between calls."""
    tiles, heads, kv_heads = plain_tiles(setting, strategy)
    drawn = [(_draw(setting, tile.n_queries, heads, heads), _draw(setting, tile.n_keys, kv_heads, kv_heads)) for tile in tiles]
    rows = [[x.requires_grad_() for x in (q, k, v)] for (q, _), (k, v) in drawn]
    scale = setting.model.head_size**-0.5

    def forward() -> list[Tensor]:
        return [PLAIN[name](q, k, v, scale, causal=tile.gap == 0) for (q, k, v), tile in zip(rows, tiles, strict=True)]

    pairs = heads * sum(tile.pairs() for tile in tiles)
    grads = [grad for (_, grad), _ in drawn]
    return Pass(_plain_name(name), forward, [x for qkv in rows for x in qkv], attention_flops(pairs, setting.model.head_size), grads)


def plain_tiles(setting: Setting, strategy: str) -> tuple[list[Tile], int, int]:
    """(tiles, query heads, key heads) of the rank's work. Causal tiles are squares, so it does not matter where a mask is aligned to."""
    model, sp = setting.model, setting.sp
    if strategy == "ulysses":
        return list(diagonal(setting.spans)), model.heads // sp, spread_kv_heads(model.kv_heads, sp) // sp
    tiles = [tile for step in steps_of(setting.segment, setting.rank) for tile in step.block.tiles]
    assert all(tile.gap or tile.n_queries == tile.n_keys for tile in tiles)
    return tiles, model.heads, model.kv_heads
