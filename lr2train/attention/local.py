"""Attention where every span lies inside one shard: each rank serves its own spans and no byte is sent.

Choice: short windows are packed so (``data.align_sp`` keeps documents from crossing shard borders), because most tokens of a mid-training
mix are short and would pay for an exchange that they have no use for. Cost: the packer leaves a little room at shard borders.
"""

from __future__ import annotations

from torch import Tensor

from lr2train.attention.kernel import Spans, attend
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh


def local(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh) -> Tensor:
    """Attention of this rank's contiguous shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    ``spans`` are of the whole segment. Raises UserError, on all ranks alike, when a span crosses a shard border. Sends nothing.
    """
    shard_tokens = q.shape[0]
    crossing = crosses_shards(spans, shard_tokens)
    if crossing is not None:
        raise UserError(
            f"tokens {crossing[0]}:{crossing[1]} are one span across a border of {mesh.sp_size} shards of {shard_tokens} tokens, which "
            f"parallel.strategy=local cannot serve; set parallel.strategy to auto, or prepare the corpus with data.align_sp={mesh.sp_size}"
        )
    first = mesh.sp_rank * shard_tokens
    mine = tuple((start - first, stop - first) for start, stop in spans if first <= start < first + shard_tokens)
    return attend(q, k, v, mine, scale)[0]


def crosses_shards(spans: Spans, shard_tokens: int) -> tuple[int, int] | None:
    """The first span that does not lie inside one shard, or None."""
    return next(((start, stop) for start, stop in spans if start // shard_tokens != (stop - 1) // shard_tokens), None)
