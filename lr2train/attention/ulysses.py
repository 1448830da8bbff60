"""Ulysses (Jacobs et al., arXiv 2309.14509): trade sequence shards for head shards, attend to the whole segment with them, trade back.

Choice: q, k and v travel in one all-to-all, so a layer costs two collectives forward and two backward, each of a volume that falls with the
number of ranks. Spans need no care, because every rank sees the whole segment. Cost: ranks cannot outnumber query heads, and when there are
fewer key heads than ranks they are repeated before they are sent.

Each rank sends, per layer and direction (forward, backward), (sp - 1) / sp * T / sp * D * (2 Hq + 2 Hkv') elements, where
Hkv' = lcm(Hkv, sp): q, k and v out and the output back. Activation checkpointing repeats the forward.
LLaMA3-8B (32 and 8 heads of 128, bf16) at T = 128k and sp = 8: 280 MiB.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lr2train.attention.kernel import attend
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans, diagonal
from lr2train.config import UserError
from lr2train.parallel.comm import all_to_all
from lr2train.parallel.mesh import Mesh


def ulysses(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's contiguous shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    ``spans`` are of the whole segment. Equals ``attend`` on the whole segment, gradients too. Raises UserError when Hq % sp; the module
    docstring has the bytes.
    """
    refuse_heads(q.shape[1], mesh.sp_size)
    q, k, v = to_heads(q, k, v, mesh.sp_size, mesh.sp_group)
    out, _ = attend(q, k, v, spans, scale, window_tokens=window_tokens)
    return all_to_all(out, 0, 1, mesh.sp_group) if mesh.sp_size > 1 else out


def to_heads(q: Tensor, k: Tensor, v: Tensor, size: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """[T/n, H, D] each -> [T, H/n, D] each, among the n = ``size`` ranks of ``group``, in one exchange: the heads of one destination, of q,
    k and v, lie side by side. Key heads are repeated first where n ranks cannot share them.
    """
    if size == 1:
        return q, k, v
    repeats = spread_kv_heads(k.shape[1], size) // k.shape[1]
    parts = [x.unflatten(1, (size, -1)) for x in (q, _repeat(k, repeats), _repeat(v, repeats))]
    whole = all_to_all(torch.cat(parts, dim=2), 1, 0, group).squeeze(1)
    return whole.split([part.shape[2] for part in parts], dim=1)  # type: ignore[return-value]


def refuse_heads(n_heads: int, sp: int) -> None:
    """Raises UserError when ``sp`` ranks cannot share ``n_heads`` query heads."""
    if n_heads % sp:
        raise UserError(f"num_attention_heads={n_heads} cannot be shared by parallel.sp={sp} ranks; set parallel.strategy to auto")


def spread_kv_heads(n_kv_heads: int, size: int) -> int:
    """Key heads after the repetition that lets ``size`` ranks share them: lcm(Hkv, size)."""
    return math.lcm(n_kv_heads, size)


def exchanged_bytes(work: Work, size: int) -> int:
    """Bytes that a rank sends in the all-to-alls of one direction among ``size`` ranks: q, k and v out, the output back."""
    heads = 2 * work.n_heads + 2 * spread_kv_heads(work.n_kv_heads, size)
    return work.n_tokens // work.sp * heads * work.head_size * work.bytes_per_element // size * (size - 1)


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key head in place, [T, Hkv, D] -> [T, lcm(Hkv, sp), D], so that ranks divide them.

    Both Hkv and sp divide Hq, hence so does the lcm: query heads still share them evenly, and the heads that land on one rank belong
    together.
    """
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def _traffic(work: Work, rank: int) -> Traffic:
    sent = exchanged_bytes(work, work.sp)
    return Traffic(sent, sent)


def _pairs(work: Work, rank: int) -> int:
    """Every rank has all tokens and its share of the heads."""
    return work.n_heads // work.sp * _pairs_of_a_head(work.spans, work.window_tokens)


@lru_cache(maxsize=16)  # asked for by every rank alike
def _pairs_of_a_head(spans: Spans, window_tokens: int | None) -> int:
    return sum(tile.pairs(window_tokens) for tile in diagonal(spans))


def _refuse(work: Work) -> None:
    refuse_heads(work.n_heads, work.sp)


ULYSSES = Strategy("ulysses", ulysses, "contiguous", _refuse, _traffic, _pairs)
