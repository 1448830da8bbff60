"""The CPU kernel: torch's flash kernel behind ``F.scaled_dot_product_attention``, called as a raw operator.

Shape letters: N rows of a round, n tiles of one shape, H heads, D head size.

Choice: the raw operator returns the log-sum-exp and its backward takes the log-sum-exp back, so a ring with exact
gradients runs on CPUs. Tiles of one shape share a call, side by side in the batch dim; the others get a call each.
Padding unequal tiles to share calls was measured and is slower: a call costs about 20 us, the wasted products of
padding cost more. The operator has no soft cap: capped scores are computed by their definition (``explicit``). Cost: a
raw operator is no stable interface.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lr2train.attention import explicit
from lr2train.attention.blocks import Block, Queries, Round, Rows, softcap_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """``kernel.Kernel`` on the CPU."""

    def rounds(self, block: Block) -> tuple[Round, ...]:
        """The calls that a block takes."""
        return block.cpu_rounds

    def check(self, q: Tensor) -> None:
        """Every dtype and head size is served."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [N, Hq, D] and lse [N, Hq] of the round's N queries."""
        cut = (_cut(q, round_.queries, round_), _cut(k, round_.keys, round_), _cut(v, round_.keys, round_))
        if softcap_of(scale):
            out, lse = explicit.forward(*cut, round_.tiles[0], round_.sliding_window, scale)
            return _joined(out), _joined(lse)
        out, lse = _flash(*cut, 0.0, _is_causal(round_), attn_mask=_mask(round_, q.dtype), scale=scale)
        return _joined(out), _joined(lse)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """One round -> dq [N, Hq, D] of the round's queries, dk and dv [M, Hkv, D] of the round's keys."""
        q, out, lse, grad_out = (_cut(x, round_.queries, round_) for x in queries)
        k, v = (_cut(x, round_.keys, round_) for x in (k, v))
        if softcap_of(scale):
            grads = explicit.backward((q, out, lse, grad_out), k, v, round_.tiles[0], round_.sliding_window, scale)
            return [_joined(grad) for grad in grads]
        inputs = (grad_out, q, k, v, out, lse)
        grads = _flash_backward(*inputs, 0.0, _is_causal(round_), attn_mask=_mask(round_, k.dtype), scale=scale)
        return [_joined(grad) for grad in grads]


def _cut(x: Tensor, rows: Rows, round_: Round) -> Tensor:
    """[T, H, …] -> [n, H, length, …], read by strides: nothing is copied where the tiles adjoin."""
    return x[rows.on(x.device)].unflatten(0, (len(round_.tiles), -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """[n, H, length, …] -> [n * length, H, …]."""
    return x.transpose(1, 2).flatten(0, 1)


def _is_causal(round_: Round) -> bool:
    return round_.causal and round_.band is None  # a band's mask holds the causal part too


def _mask(round_: Round, dtype: torch.dtype) -> Tensor | None:
    return None if round_.band is None else round_.band.added(dtype)
