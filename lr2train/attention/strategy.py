"""The form of a strategy of sequence-parallel attention, and the segment and work that a strategy is asked about.

A strategy spreads the attention of one segment over the sp ranks of a group. All strategies have one form:

    attend = strategy.prepare(segment, mesh, sliding_window)                # once for a segment and a kind of layer
    out = attend(q [T/sp, Hq, D], k [T/sp, Hkv, D], v [T/sp, Hkv, D], scale)   # in every layer -> [T/sp, Hq, D]

Each strategy also declares, from plain integers that every rank has alike: how tokens must lie, whether the strategy
can serve a segment, how many bytes each rank sends and how many (query, key) pairs each rank computes.

Choice: the declarations are pure functions of ``SegmentWork``, so one process can choose among strategies and check the
choice for any number of ranks. Cost: bytes and pairs are computed from spans a second time, beside the code that moves
them. Tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from lr2train.attention.once import Once
from lr2train.attention.tiles import Spans, check_spans
from lr2train.parallel.layout import Kind, Layout
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class PackedSegment(Once):
    """A packed segment over the ranks that share it. Strategies keep on this object the facts that they compute.

    Attributes:
        spans: the documents.
        n_tokens: T, of the whole segment.
        sp: ranks that share the segment.
        ring: of the sp ranks, ranks on the ring axis of a 2-D mesh; ``ulysses_ring`` reads this.
    """

    spans: Spans
    n_tokens: int
    sp: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        check_spans(self.spans, self.n_tokens)

    @property
    def ulysses(self) -> int:
        """Ranks on the ulysses axis of a 2-D mesh."""
        return self.sp // self.ring

    @property
    def shard_tokens(self) -> int:
        """Tokens of one rank's sequence shard."""
        return self.n_tokens // self.sp

    @cached_property
    def longest_span(self) -> int:
        """Tokens of the longest document; 0 without documents."""
        return max((stop - start for start, stop in self.spans), default=0)

    @cached_property
    def n_inside(self) -> int:
        """Tokens of all documents."""
        return sum(stop - start for start, stop in self.spans)

    def over(self, sp: int) -> PackedSegment:
        """The same segment over ``sp`` ranks."""
        return self.once(_over, sp)

    def narrowed(self, sliding_window: int | None) -> int | None:
        """The sliding window, or None where the window reaches over the longest document and so hides nothing."""
        return None if sliding_window is None or sliding_window >= self.longest_span else sliding_window

    def layout(self, kind: Kind, rank: int) -> Layout:
        """Where the tokens lie for ``rank``. Raises UserError when the segment cannot be cut evenly."""
        inner = self.ulysses if kind == "zigzag_nested" else 1
        return Layout(kind, self.n_tokens, rank, self.sp, inner, () if kind == "contiguous" else self.spans)


def _over(segment: PackedSegment, sp: int) -> PackedSegment:
    return replace(segment, sp=sp, ring=1)


@dataclass(frozen=True)
class SegmentWork:
    """One attention layer over one segment: everything that the choice of a strategy depends on."""

    segment: PackedSegment
    n_heads: int  # Hq
    n_kv_heads: int  # Hkv
    head_size: int  # D
    bytes_per_element: int = 2  # of q, k and v
    sliding_window: int | None = None  # token i sees (i - sliding_window, i]

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.n_kv_heads * self.head_size * self.bytes_per_element


class Traffic(NamedTuple):
    """Bytes that one rank sends for one layer. Recomputation of whole layers repeats the forward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


class Attend(Protocol):
    """Attention of this rank's sequence shard. Equals attention of the whole segment on one rank, gradients too."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Strategy:
    """One way of spreading attention over ranks, with the strategy's declarations.

    Attributes:
        name: in ``parallel.strategy``.
        prepare: (segment, this rank's mesh, sliding window or None) -> attention. Raises UserError as ``refuse``, as
            far as no head counts.
        layout_kind: where tokens must lie.
        refuse: raises UserError, with the remedy, for work that the strategy cannot serve; the same on all ranks.
        traffic: (work, rank) -> bytes that the rank sends: the formula of the strategy's module docstring.
        pairs: (work, rank) -> (query, key) pairs that the rank computes, summed over query heads.
    """

    name: str
    prepare: Callable[[PackedSegment, Mesh, int | None], Attend]
    layout_kind: Kind
    refuse: Callable[[SegmentWork], None]
    traffic: Callable[[SegmentWork, int], Traffic]
    pairs: Callable[[SegmentWork, int], int]

    def bytes_sent(self, work: SegmentWork) -> Traffic:
        """The traffic of the rank that sends most: the other ranks wait for that rank."""
        return max((self.traffic(work, rank) for rank in range(work.segment.sp)), key=lambda traffic: traffic.total)

    def imbalance(self, work: SegmentWork) -> float:
        """Most pairs of any rank over the mean, minus 1: 0 is even. 0 for a segment without documents."""
        pairs = [self.pairs(work, rank) for rank in range(work.segment.sp)]
        return max(pairs) * len(pairs) / sum(pairs) - 1 if any(pairs) else 0.0
