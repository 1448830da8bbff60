"""What a strategy of sequence-parallel attention is, and the work that it is asked to do.

A strategy spreads the attention of one segment over the sp ranks of a group. All have one signature,

    strategy.attend(q [T/sp, Hq, D], k [T/sp, Hkv, D], v [T/sp, Hkv, D], spans, scale, mesh, window_tokens=None) -> out [T/sp, Hq, D]

with ``spans`` of the whole segment, and each says beforehand, from plain integers that every rank has alike, how tokens must be laid out,
whether it can serve a piece of work, how many bytes it sends for it and how many pairs of tokens fall to each rank.

Choice: the declarations are pure functions of ``Work``, so that one process can choose among strategies and check the choice for any
number of ranks. Cost: bytes and pairs are computed from spans a second time, beside the code that moves them; tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from lr2train.attention.tiles import Spans
from lr2train.parallel.layout import Kind, Layout
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Work:
    """One attention layer over one segment: all that a strategy is chosen by."""

    spans: Spans  # of the whole segment
    n_tokens: int  # T, of the whole segment
    n_heads: int  # Hq
    n_kv_heads: int  # Hkv
    head_size: int  # D
    bytes_per_element: int = 2  # of q, k and v
    sp: int = 1  # ranks that share the segment
    ring: int = 1  # of them, ranks on the ring axis of a 2-D mesh; what ``ulysses_ring`` reads
    window_tokens: int | None = None  # a sliding window: token i sees (i - window, i]

    @property
    def ulysses(self) -> int:
        """Ranks on the ulysses axis of a 2-D mesh."""
        return self.sp // self.ring

    def on(self, sp: int, ring: int = 1) -> Work:
        """The same layer on another mesh."""
        return replace(self, sp=sp, ring=ring)


class Traffic(NamedTuple):
    """Bytes that one rank sends for one layer. Activation checkpointing repeats the forward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


class Attend(Protocol):
    """Attention of this rank's shard; equals attention of the whole segment on one rank, gradients too."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None
    ) -> Tensor: ...


def layout_of(kind: Kind, spans: Spans, n_tokens: int, mesh: Mesh) -> Layout:
    """Where the tokens of a segment lie for the rank of ``mesh``. Raises UserError when they cannot be cut evenly."""
    inner = mesh.ulysses_size if kind == "zigzag_nested" else 1
    return Layout(kind, n_tokens, mesh.sp_rank, mesh.sp_size, inner, () if kind == "contiguous" else spans)


@dataclass(frozen=True)
class Strategy:
    """One way of spreading attention over ranks, with what it declares of itself."""

    name: str
    attend: Attend
    layout_kind: Kind  # where tokens must lie
    refuse: Callable[[Work], None]  # raises UserError, with the remedy, for work that it cannot serve; the same on all ranks
    traffic: Callable[[Work, int], Traffic]  # bytes sent by one rank: the formula of its module's docstring
    pairs: Callable[[Work, int], int]  # (query, key) pairs that one rank computes, summed over its query heads

    def layout(self, spans: Spans, n_tokens: int, mesh: Mesh) -> Layout:
        """Where the tokens of a segment lie for this rank. Raises UserError when they cannot be cut evenly."""
        return layout_of(self.layout_kind, spans, n_tokens, mesh)

    def bytes_sent(self, work: Work) -> Traffic:
        """Of the rank that sends most, which is the one that the others wait for."""
        return max((self.traffic(work, rank) for rank in range(work.sp)), key=lambda traffic: traffic.total)

    def imbalance(self, work: Work) -> float:
        """Most pairs of any rank over the mean, minus 1: 0 is even. 0 for a segment without spans."""
        pairs = [self.pairs(work, rank) for rank in range(work.sp)]
        return max(pairs) * len(pairs) / sum(pairs) - 1 if any(pairs) else 0.0
