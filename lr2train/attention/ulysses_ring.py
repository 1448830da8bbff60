"""Ulysses inside, ring outside: for more ranks than heads, and for more nodes than one.

The sp ranks form a mesh of R rings x U ulysses ranks. An all-to-all among the U consecutive ranks of a ulysses group turns its token shards
into head shards, of all the tokens that one rank of a ring of R would hold; ring attention runs among the R ranks that hold the same
heads; a second all-to-all turns back. As in USP (Fang and Zhao, arXiv 2405.07719).

Choice: the heavier exchange lies on consecutive ranks, the fast links of a node, and the one that hides behind compute joins the nodes.
Cost: U must divide the query heads, and tokens lie in a layout of two levels (``zigzag_nested``).

Each rank sends, per layer and direction, the all-to-alls of ``ulysses`` over U ranks and shards of T / sp tokens,
(U - 1) / U T / sp D b (2 Hq + 2 Hkv') with Hkv' = lcm(Hkv, U), and what ``ring`` over R ranks sends of T tokens with Hkv' / U key heads.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lr2train.attention.ring import refuse_uneven, ring_over, ring_pairs, ring_traffic
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans
from lr2train.attention.ulysses import exchanged_bytes, refuse_heads, spread_kv_heads, to_heads
from lr2train.parallel.comm import all_to_all
from lr2train.parallel.mesh import Mesh


def ulysses_ring(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's shard (layout zigzag_nested): q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    ``spans`` are of the whole segment. Raises UserError when the ulysses ranks cannot share the query heads.
    """
    refuse_heads(q.shape[1], mesh.ulysses_size)
    q, k, v = to_heads(q, k, v, mesh.ulysses_size, mesh.ulysses_group)
    out = ring_over(q, k, v, spans, scale, window_tokens, mesh.ring_rank, mesh.ring_size, mesh.ring_group)
    return all_to_all(out, 0, 1, mesh.ulysses_group) if mesh.ulysses_size > 1 else out


def _on_the_ring(work: Work) -> Work:
    """What the ring inside does: all tokens, this rank's heads."""
    kv_heads = spread_kv_heads(work.n_kv_heads, work.ulysses) // work.ulysses
    return replace(work, sp=work.ring, ring=1, n_heads=work.n_heads // work.ulysses, n_kv_heads=kv_heads)


def _traffic(work: Work, rank: int) -> Traffic:
    forward, backward = ring_traffic(_on_the_ring(work), rank // work.ulysses)
    exchanged = exchanged_bytes(work, work.ulysses)
    return Traffic(forward + exchanged, backward + exchanged)


def _pairs(work: Work, rank: int) -> int:
    return ring_pairs(_on_the_ring(work), rank // work.ulysses)


def _refuse(work: Work) -> None:
    refuse_heads(work.n_heads, work.ulysses)
    refuse_uneven(work, 2 * work.sp, "ulysses_ring")


ULYSSES_RING = Strategy("ulysses_ring", ulysses_ring, "zigzag_nested", _refuse, _traffic, _pairs)
