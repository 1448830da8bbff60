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

import torch
from torch import Tensor

from lr2train.attention.kernel import Spans, attend
from lr2train.config import UserError
from lr2train.parallel.comm import all_to_all
from lr2train.parallel.mesh import Mesh


def ulysses(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh) -> Tensor:
    """Attention of this rank's contiguous shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    ``spans`` are of the whole segment. Equals ``attend`` on the whole segment, gradients too. Raises UserError when Hq % sp; the module
    docstring has the bytes.
    """
    refuse_heads(q.shape[1], mesh.sp_size)
    repeats = math.lcm(k.shape[1], mesh.sp_size) // k.shape[1]
    q, k, v = _to_heads(q, _repeat(k, repeats), _repeat(v, repeats), mesh)
    out, _ = attend(q, k, v, spans, scale)
    return all_to_all(out, 0, 1, mesh.sp_group)


def refuse_heads(n_heads: int, sp: int) -> None:
    """Raises UserError when ``sp`` ranks cannot share ``n_heads`` query heads."""
    if n_heads % sp:
        fitting = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise UserError(f"num_attention_heads={n_heads} cannot be shared by parallel.sp={sp} ranks; set parallel.sp to one of {fitting}")


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key head in place, [T, Hkv, D] -> [T, lcm(Hkv, sp), D], so that ranks divide them.

    Both Hkv and sp divide Hq, hence so does the lcm: query heads still share them evenly, and the heads that land on one rank belong
    together.
    """
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def _to_heads(q: Tensor, k: Tensor, v: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """[T/sp, H, D] each -> [T, H/sp, D] each, in one exchange: the heads of one destination, of q, k and v, lie side by side."""
    parts = [x.unflatten(1, (mesh.sp_size, -1)) for x in (q, k, v)]
    whole = all_to_all(torch.cat(parts, dim=2), 1, 0, mesh.sp_group).squeeze(1)
    return whole.split([part.shape[2] for part in parts], dim=1)  # type: ignore[return-value]
