"""Ulysses inside, ring outside: for more ranks than heads, and for more nodes than one.

As USP (Fang and Zhao, arXiv 2405.07719).

The sp ranks form a mesh of R ring ranks x U ulysses ranks. A layer takes three steps:

1. An all-to-all among the U consecutive ranks of a ulysses group turns their sequence shards into head shards. Each
   rank then holds some heads of all the tokens that one rank of a ring of R would hold.
2. Ring attention runs among the R ranks that hold the same heads.
3. A second all-to-all turns back.

Choice: the heavier exchange lies on consecutive ranks, the fast links of a node. The ring's transfers hide behind
compute and join the nodes. Cost: U must divide the query heads, and tokens lie in a layout of two levels
(``zigzag_nested``).

Bytes that each rank sends, per layer and direction, with Hkv' = lcm(Hkv, U) and b bytes an element:
    the all-to-alls of ``ulysses`` over U ranks    (U - 1) / U  T / sp  D b (2 Hq + 2 Hkv')
    the transfers of ``ring`` over R ranks         of T tokens with Hkv' / U key heads
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lr2train.attention.ring import RingAttention, refuse_uneven, ring_over, ring_pairs, ring_traffic
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.attention.ulysses import exchanged_bytes, refuse_heads, spread_kv_heads, to_heads
from lr2train.parallel.comm import all_to_all
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class UlyssesRingAttention:
    """Attention of this rank's heads on the ring; layout zigzag_nested."""

    ring: RingAttention
    mesh: Mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]. Raises UserError when U does not divide Hq."""
        size, group = self.mesh.ulysses_size, self.mesh.ulysses_group
        refuse_heads(q.shape[1], size)
        out = self.ring(*to_heads(q, k, v, size, group), scale)
        return all_to_all(out, 0, 1, group) if size > 1 else out


def ulysses_ring(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> UlyssesRingAttention:
    """This rank's attention."""
    ring = ring_over(segment.over(mesh.ring_size), mesh.ring_rank, mesh.ring_group, sliding_window)
    return UlyssesRingAttention(ring, mesh)


# ---- declarations ----


def _on_the_ring(work: SegmentWork) -> SegmentWork:
    """The work of the ring inside: all tokens over R ranks, this rank's heads."""
    segment = work.segment
    n_heads = work.n_heads // segment.ulysses
    n_kv_heads = spread_kv_heads(work.n_kv_heads, segment.ulysses) // segment.ulysses
    return replace(work, segment=segment.over(segment.ring), n_heads=n_heads, n_kv_heads=n_kv_heads)


def _traffic(work: SegmentWork, rank: int) -> Traffic:
    forward, backward = ring_traffic(_on_the_ring(work), rank // work.segment.ulysses)
    exchanged = exchanged_bytes(work, work.segment.ulysses)
    return Traffic(forward + exchanged, backward + exchanged)


def _pairs(work: SegmentWork, rank: int) -> int:
    return ring_pairs(_on_the_ring(work), rank // work.segment.ulysses)


def _refuse(work: SegmentWork) -> None:
    refuse_heads(work.n_heads, work.segment.ulysses)
    refuse_uneven(work.segment, 2 * work.segment.sp, "ulysses_ring")


ULYSSES_RING = Strategy("ulysses_ring", ulysses_ring, "zigzag_nested", _refuse, _traffic, _pairs)
