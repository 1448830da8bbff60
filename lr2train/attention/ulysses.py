"""Ulysses (Jacobs et al., arXiv 2309.14509): trade sequence shards for head shards, attend, trade back.

Choice: q, k and v travel in one all-to-all, so a layer costs two collectives forward and two backward. Their volume
falls with the number of ranks. Documents need no care, because every rank sees the whole segment. Cost: there can be no
more ranks than query heads, and key heads are repeated before they are sent where there are fewer than ranks.

Each rank sends, per layer and direction (forward, backward), (sp - 1) / sp * T / sp * D * (2 Hq + 2 Hkv') elements,
where Hkv' = lcm(Hkv, sp): q, k and v out and the output back. Recomputation repeats the forward. LLaMA3-8B
(32 and 8 heads of 128, bf16) at T = 128k and sp = 8: 280 MiB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lr2train.attention.blocks import Block
from lr2train.attention.kernel import attend_block
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.attention.tiles import diagonal
from lr2train.config import UserError
from lr2train.parallel.comm import all_to_all
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class UlyssesAttention:
    """Attention of this rank's heads over the whole segment; contiguous layout."""

    block: Block  # of the whole segment
    mesh: Mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]. Raises UserError when Hq % sp."""
        size, group = self.mesh.sp_size, self.mesh.sp_group
        refuse_heads(q.shape[1], size)
        q, k, v = to_heads(q, k, v, size, group)
        out, _ = attend_block(q, k, v, scale, self.block)
        return all_to_all(out, 0, 1, group) if size > 1 else out


def ulysses(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> UlyssesAttention:
    """This rank's attention."""
    return UlyssesAttention(segment.once(_block, sliding_window), mesh)


def _block(segment: PackedSegment, sliding_window: int | None) -> Block:
    return Block(diagonal(segment.spans), sliding_window)


def to_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[T/n, H, D] each -> [T, H/n, D] each, among the n = ``size`` ranks of ``group``, in one exchange.

    The heads of one destination, of q, k and v, lie side by side. Key heads are repeated first where n ranks cannot
    share them.
    """
    if size == 1:
        return q, k, v
    repeats = spread_kv_heads(k.shape[1], size) // k.shape[1]
    parts = [x.unflatten(1, (size, -1)) for x in (q, _repeat(k, repeats), _repeat(v, repeats))]  # [T/n, n, H/n, D] each
    whole = all_to_all(torch.cat(parts, dim=2), 1, 0, group).squeeze(1)
    return whole.split([part.shape[2] for part in parts], dim=1)  # type: ignore[return-value]


def refuse_heads(n_heads: int, sp: int) -> None:
    """Raises UserError when ``sp`` ranks cannot share ``n_heads`` query heads."""
    if n_heads % sp:
        refused = f"num_attention_heads={n_heads} cannot be shared by parallel.sp={sp} ranks"
        raise UserError(f"{refused}; set parallel.strategy to auto")


def spread_kv_heads(n_kv_heads: int, size: int) -> int:
    """Key heads after the repetition that lets ``size`` ranks share them: lcm(Hkv, size)."""
    return math.lcm(n_kv_heads, size)


def exchanged_bytes(work: SegmentWork, size: int) -> int:
    """Bytes that a rank sends in the all-to-alls of one direction among ``size`` ranks: q, k, v and the output."""
    heads = 2 * work.n_heads + 2 * spread_kv_heads(work.n_kv_heads, size)
    return work.segment.shard_tokens * heads * work.head_size * work.bytes_per_element // size * (size - 1)


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key head in place, [T, Hkv, D] -> [T, lcm(Hkv, sp), D], so that ranks divide them.

    Both Hkv and sp divide Hq, hence so does the lcm: query heads still share the key heads evenly, and the heads that
    land on one rank belong together.
    """
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


# ---- declarations ----


def _traffic(work: SegmentWork, rank: int) -> Traffic:
    sent = exchanged_bytes(work, work.segment.sp)
    return Traffic(sent, sent)


def _pairs(work: SegmentWork, rank: int) -> int:
    """Every rank has all tokens and its share of the heads."""
    return work.n_heads // work.segment.sp * work.segment.once(_pairs_of_a_head, work.sliding_window)


def _pairs_of_a_head(segment: PackedSegment, sliding_window: int | None) -> int:
    return segment.once(_block, sliding_window).pairs


def _refuse(work: SegmentWork) -> None:
    refuse_heads(work.n_heads, work.segment.sp)


ULYSSES = Strategy("ulysses", ulysses, "contiguous", _refuse, _traffic, _pairs)
