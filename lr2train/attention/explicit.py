"""Attention by its definition: every score exists in memory, for some queries at a time.

For what no flash kernel serves: capped scores on a CPU; float32 and float64 on CUDA, where the tests and the tiny
experiments compute as exactly as on a CPU.

Shape letters: n tiles of one shape side by side, H heads (Hq queries', Hkv keys'), N queries, M keys, D head size.

Choice: plain matrix products, which every device has, in the place of ``aten._efficient_attention_forward``. That
operator takes float32 on CUDA, but it takes as many key heads as query heads, wants the log-sum-exp of each document
padded to 32 rows with infinity, and has no sliding window between a ring's later queries and earlier keys. It has no
CPU kernel, so nothing of it could be tested without a GPU; these products run in the tests as they run on CUDA.
Cost: scores are written and read several times, so a layer takes many times as long as under a flash kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lr2train.attention.blocks import Queries, Round, softcap_of
from lr2train.attention.tiles import Tile

_CELLS = {"cpu": 2**22, "cuda": 2**26}  # scores that exist at a time: the CPU's fit into its caches


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, sliding_window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [n, Hq, N, D], k and v [n, Hkv, M, D] -> out [n, Hq, N, D] in q's dtype, and lse [n, Hq, N] in fp32 or fp64.

    Args:
        q: queries of tiles shaped as ``tile``.
        k: their keys, in any dtype.
        v: as k.
        tile: says which query sees which key.
        sliding_window: tokens, or None.
        scale: multiplies the scores; a ``CappedScale`` caps them.
    """
    q, k, v, dtype = _grouped(q, k), *_wide(k, v), q.dtype
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows, keys in _parts(q, tile, sliding_window):
        scores = _scores(q[..., rows, :], k[:, :, keys], tile, rows, keys, sliding_window, scale)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = (scores - lse[..., rows, None]).exp_() @ v[:, :, None, keys]
    return out.flatten(1, 2).to(dtype), lse.flatten(1, 2)


def backward(
    queries: Sequence[Tensor], k: Tensor, v: Tensor, tile: Tile, sliding_window: int | None, scale: float
) -> list[Tensor]:
    """The shares of q, k and v, as ``kernel.backward_block`` defines them; ds has the derivative of the cap too.

    Args:
        queries: q, out, lse and grad_out, shaped as in ``forward``.
        k: [n, Hkv, M, D].
        v: as k.
        tile: as in ``forward``.
        sliding_window: as in ``forward``.
        scale: as in ``forward``.

    Returns:
        dq [n, Hq, N, D], dk and dv [n, Hkv, M, D], in q's dtype.
    """
    q, out, lse, grad_out = queries
    dtype, heads, cap = q.dtype, k, softcap_of(scale)
    grad_out, q, out = (_grouped(x, heads) for x in (grad_out, q, out))
    lse, (k, v) = lse.unflatten(1, (heads.shape[1], -1)), _wide(k, v)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows, keys in _parts(q, tile, sliding_window):
        scores = _scores(q[..., rows, :], k[:, :, keys], tile, rows, keys, sliding_window, scale)
        p = (scores - lse[..., rows, None]).exp()
        ds = p * (grad_out[..., rows, :] @ v[:, :, None, keys].mT - delta[..., rows, :])
        if cap:  # a hidden key's score is -inf
            ds *= (1 - (scores / cap).square()).nan_to_num_(0.0, 0.0, 0.0)
        ds *= scale
        dq[..., rows, :] = ds @ k[:, :, None, keys]
        dk[:, :, keys] += (ds.mT @ q[..., rows, :]).sum(2)
        dv[:, :, keys] += (p.mT @ grad_out[..., rows, :]).sum(2)
    return [dq.flatten(1, 2).to(dtype), dk.to(dtype), dv.to(dtype)]


def _scores(
    q: Tensor, k: Tensor, tile: Tile, rows: slice, keys: slice, sliding_window: int | None, scale: float
) -> Tensor:
    """Scores [n, Hkv, group, rows, keys], -inf where a query does not see a key."""
    scores, cap = q @ k[:, :, None].mT, softcap_of(scale)
    scores = scores.mul_(scale / cap).tanh_().mul_(cap) if cap else scores.mul_(scale)
    behind = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + tile.lead
    behind = behind - torch.arange(keys.start, keys.stop, device=q.device)  # tokens from a key to a query
    hidden = behind < 0 if sliding_window is None else (behind < 0) | (behind >= sliding_window)
    return scores.masked_fill_(hidden, -torch.inf)


def _parts(q: Tensor, tile: Tile, sliding_window: int | None) -> Iterator[tuple[slice, slice]]:
    """(rows of queries, the keys that these rows see some of), so few that their scores fit."""
    most = max(1, _CELLS.get(q.device.type, _CELLS["cpu"]) // (q.shape[:-2].numel() * tile.n_keys))
    for start in range(0, tile.n_queries, most):
        stop = min(start + most, tile.n_queries)
        first = 0 if sliding_window is None else max(0, start + tile.lead - sliding_window + 1)
        yield slice(start, stop), slice(first, min(tile.n_keys, stop + tile.lead))


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[n, Hq, N, D] -> [n, Hkv, Hq / Hkv, N, D], in fp32 at least."""
    return _wide(x)[0].unflatten(1, (k.shape[1], -1))


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


# ---- rounds of tiles of any lengths ----


def forward_round(q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [N, Hq, D] and lse [N, Hq] of the round's N queries."""
    parts = []
    for tile in round_.tiles:
        queries = _cut(q, tile.q_start, tile.q_stop)
        keys, values = (_cut(x, tile.k_start, tile.k_stop) for x in (k, v))
        parts.append([_uncut(x) for x in forward(queries, keys, values, tile, round_.sliding_window, scale)])
    out, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return out, lse


def backward_round(queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> list[Tensor]:
    """-> dq [N, Hq, D] of the round's queries, dk and dv [M, Hkv, D] of the round's keys."""
    parts = []
    for tile in round_.tiles:
        cut = [_cut(x, tile.q_start, tile.q_stop) for x in queries]
        keys, values = (_cut(x, tile.k_start, tile.k_stop) for x in (k, v))
        parts.append([_uncut(x) for x in backward(cut, keys, values, tile, round_.sliding_window, scale)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    """[T, H, …] -> [1, H, rows, …]."""
    return x[start:stop].transpose(0, 1)[None]


def _uncut(x: Tensor) -> Tensor:
    """[1, H, rows, …] -> [rows, H, …]."""
    return x[0].transpose(0, 1)
