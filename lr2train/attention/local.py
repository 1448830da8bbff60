"""Local: every attention span lies inside one sequence shard, so each rank attends alone and nothing is sent.

Choice: short windows are packed so (``data.align_sp`` keeps documents from crossing shard borders). Most tokens of a
mid-training mix are short, and would pay for an exchange that they have no use for. Cost: the packer leaves a little
padding at shard borders.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lr2train.attention.blocks import Block
from lr2train.attention.kernel import attend_block
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.attention.tiles import Spans, diagonal
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """Attention of one rank's own documents; contiguous layout."""

    block: Block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]. Sends nothing."""
        return attend_block(q, k, v, scale, self.block)[0]


def local(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> LocalAttention:
    """This rank's attention. Raises UserError, on all ranks alike, when a document crosses a shard border."""
    _refuse_crossing(segment)
    return LocalAttention(_block(segment, mesh.sp_rank, sliding_window))


def crosses_shards(spans: Spans, shard_tokens: int) -> tuple[int, int] | None:
    """The first span that does not lie inside one sequence shard, or None."""
    return next(((start, stop) for start, stop in spans if start // shard_tokens != (stop - 1) // shard_tokens), None)


def _block(segment: PackedSegment, rank: int, sliding_window: int | None) -> Block:
    """The documents that start in the rank's shard, by row of the shard."""
    n = segment.shard_tokens
    first = rank * n
    mine = tuple((start - first, stop - first) for start, stop in segment.spans if first <= start < first + n)
    return Block(diagonal(mine), sliding_window)


def _refuse_crossing(segment: PackedSegment) -> None:
    sp, n = segment.sp, segment.shard_tokens
    crossing = crosses_shards(segment.spans, n)
    if crossing is not None:
        raise UserError(
            f"tokens {crossing[0]}:{crossing[1]} are one span across a border of {sp} shards of {n} tokens, "
            "which parallel.strategy=local cannot serve; set parallel.strategy to auto, "
            f"or prepare the corpus with data.align_sp={sp}"
        )


# ---- declarations ----


def _refuse(work: SegmentWork) -> None:
    _refuse_crossing(work.segment)


def _traffic(work: SegmentWork, rank: int) -> Traffic:
    return Traffic(0, 0)


def _pairs(work: SegmentWork, rank: int) -> int:
    return work.n_heads * _block(work.segment, rank, work.sliding_window).pairs


LOCAL = Strategy("local", local, "contiguous", _refuse, _traffic, _pairs)
