"""Attention where every span lies inside one shard: each rank serves its own spans and no byte is sent.

Choice: short windows are packed so (``data.align_sp`` keeps documents from crossing shard borders), because most tokens of a mid-training
mix are short and would pay for an exchange that they have no use for. Cost: the packer leaves a little room at shard borders.
"""

from __future__ import annotations

from torch import Tensor

from lr2train.attention.kernel import attend
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans, diagonal
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh


def local(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's contiguous shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    ``spans`` are of the whole segment. Raises UserError, on all ranks alike, when a span crosses a shard border. Sends nothing.
    """
    _refuse_crossing(spans, q.shape[0], mesh.sp_size)
    return attend(q, k, v, spans_of_shard(spans, q.shape[0], mesh.sp_rank), scale, window_tokens=window_tokens)[0]


def crosses_shards(spans: Spans, shard_tokens: int) -> tuple[int, int] | None:
    """The first span that does not lie inside one shard, or None."""
    return next(((start, stop) for start, stop in spans if start // shard_tokens != (stop - 1) // shard_tokens), None)


def spans_of_shard(spans: Spans, shard_tokens: int, rank: int) -> Spans:
    """The spans that start in the shard of ``rank``, counted from its first token."""
    first = rank * shard_tokens
    return tuple((start - first, stop - first) for start, stop in spans if first <= start < first + shard_tokens)


def _refuse_crossing(spans: Spans, shard_tokens: int, sp: int) -> None:
    crossing = crosses_shards(spans, shard_tokens)
    if crossing is not None:
        raise UserError(
            f"tokens {crossing[0]}:{crossing[1]} are one span across a border of {sp} shards of {shard_tokens} tokens, which "
            f"parallel.strategy=local cannot serve; set parallel.strategy to auto, or prepare the corpus with data.align_sp={sp}"
        )


def _refuse(work: Work) -> None:
    _refuse_crossing(work.spans, work.n_tokens // work.sp, work.sp)


def _traffic(work: Work, rank: int) -> Traffic:
    return Traffic(0, 0)


def _pairs(work: Work, rank: int) -> int:
    mine = spans_of_shard(work.spans, work.n_tokens // work.sp, rank)
    return work.n_heads * sum(tile.pairs(work.window_tokens) for tile in diagonal(mine))


LOCAL = Strategy("local", local, "contiguous", _refuse, _traffic, _pairs)
