"""The CPU kernel: torch's flash kernel behind ``F.scaled_dot_product_attention``, called as a raw operator.

Shape letters: N rows of a round, n tiles of one shape, H heads, D head size.

Choice: the raw operator returns the log-sum-exp and its backward takes the log-sum-exp back, so a ring with exact
gradients runs on CPUs. Tiles of one shape share a call, side by side in the batch dim; the others get a call each.
Padding unequal tiles to share calls was measured and is slower: a call costs about 20 us, the wasted products of
padding cost more. The operator has no soft cap: capped scores are computed by their definition, some queries at a time.
Cost: a raw operator is no stable interface.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        if cap := softcap_of(scale):
            return tuple(map(_joined, _capped(*cut, round_, scale, cap)))  # type: ignore[return-value]
        out, lse = _flash(*cut, 0.0, _is_causal(round_), attn_mask=_mask(round_, q.dtype), scale=scale)
        return _joined(out), _joined(lse)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """One round -> dq [N, Hq, D] of the round's queries, dk and dv [M, Hkv, D] of the round's keys."""
        q, out, lse, grad_out = (_cut(x, round_.queries, round_) for x in queries)
        cut = (grad_out, q, _cut(k, round_.keys, round_), _cut(v, round_.keys, round_), out, lse)
        if cap := softcap_of(scale):
            return [_joined(grad) for grad in _capped_backward(*cut, round_, scale, cap)]
        grads = _flash_backward(*cut, 0.0, _is_causal(round_), attn_mask=_mask(round_, k.dtype), scale=scale)
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


# ---- capped scores ----

_CELLS = 2**22  # scores that exist at a time


def _capped(q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """q [n, Hq, N, D], k and v [n, Hkv, M, D] -> out [n, Hq, N, D] in q's dtype, and lse [n, Hq, N]."""
    q, k, v, dtype = _grouped(q, k), *_wide(k, v), q.dtype
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows in _some_rows(q, k):
        scores = _capped_scores(q[..., rows, :], k, rows, round_, scale, cap)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = (scores - lse[..., rows, None]).exp_() @ v[:, :, None]
    return out.flatten(1, 2).to(dtype), lse.flatten(1, 2)


def _capped_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, round_: Round, scale: float, cap: float
) -> list[Tensor]:
    """The shares of q, k and v, as ``kernel.backward_block`` defines them; ds has the derivative of the cap too."""
    dtype, heads = q.dtype, k
    grad_out, q, out = (_grouped(x, heads) for x in (grad_out, q, out))
    lse, (k, v) = lse.unflatten(1, (heads.shape[1], -1)), _wide(k, v)
    grads = [torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)]
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows in _some_rows(q, k):
        scores = _capped_scores(q[..., rows, :], k, rows, round_, scale, cap)
        p = (scores - lse[..., rows, None]).exp()
        ds = p * (grad_out[..., rows, :] @ v[:, :, None].mT - delta[..., rows, :])
        ds *= (1 - (scores / cap).square()).nan_to_num_(0.0, 0.0, 0.0) * scale  # a hidden key's score is -inf
        grads[0][..., rows, :] = ds @ k[:, :, None]
        grads[1] += (ds.mT @ q[..., rows, :]).sum(2)
        grads[2] += (p.mT @ grad_out[..., rows, :]).sum(2)
    return [grads[0].flatten(1, 2).to(dtype), grads[1].to(dtype), grads[2].to(dtype)]


def _capped_scores(q: Tensor, k: Tensor, rows: slice, round_: Round, scale: float, cap: float) -> Tensor:
    """Scores [n, Hkv, group, rows, M], -inf where a query does not see a key."""
    scores = (q @ k[:, :, None].mT).mul_(scale / cap).tanh_().mul_(cap)
    mask = _mask(round_, scores.dtype)
    if mask is not None:
        return scores.add_(mask[rows])
    if not _is_causal(round_):
        return scores
    after = torch.arange(k.shape[2]) > torch.arange(rows.start, rows.stop)[:, None]
    return scores.masked_fill_(after, -torch.inf)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[n, Hq, N, D] -> [n, Hkv, Hq / Hkv, N, D], in fp32 at least."""
    return _wide(x)[0].unflatten(1, (k.shape[1], -1))


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _some_rows(q: Tensor, k: Tensor) -> list[slice]:
    n_rows = q.shape[-2]
    size = max(1, _CELLS // (q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
