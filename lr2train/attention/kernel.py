"""Attention on one device, between any rows of queries and keys: (q, k, v, tiles) -> (out, lse), forward and backward.

Shape letters: T tokens of a row (Tq of queries, Tk of keys), H heads (Hq of queries, Hkv of keys and values, Hq % Hkv == 0), D head size.

``attend`` serves the spans of a packed row; ``forward_block`` and ``backward_block`` serve any tiles (``attention.tiles``), as a step of a
ring needs them. The backward takes the out and lse of the *whole* softmax, merged over all blocks, and returns the block's share of the
gradients: the shares add up.

Choice: one door, four kernels. On CUDA flash-attn 3 or 2 where installed, else torch's own variable-length flash attention; on CPU the
flash kernel behind ``F.scaled_dot_product_attention``. All are called as raw operators, because only so do they hand out the log-sum-exp
that partial softmaxes are merged by, and take it back in their backward. No mask over a row is ever built. Everything about lengths is a
Python int decided from the spans: no device is asked. Cost: the raw operators are less stable an interface than the public ones.
The CPU kernel knows no packing, so tiles of equal shape share a call and the others get one each. Padding unequal tiles to share calls was
measured and is slower: a call costs about 20 us, the wasted products of padding more.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention.tiles import Round, Spans, Tile, check_spans, diagonal, make_rounds
from lr2train.config import UserError

log = logging.getLogger(__name__)

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_flash = torch.ops.aten._flash_attention_forward
_cuda_flash_backward = torch.ops.aten._flash_attention_backward


class Queries(NamedTuple):
    """What the backward of a block reads of its queries: q, out and grad_out [Tq, Hq, D] and lse [Tq, Hq].

    out (in q's dtype) and lse are those of all keys that a query sees, in the block and every other.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor

    def part(self, rows: slice | Tensor, heads: slice = slice(None)) -> Queries:
        """Some rows, or some heads, of it."""
        return Queries(*(x[rows, heads] for x in self))


def attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool = True, window_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token over its own span: out_i = sum_j softmax_j(scale q_i k_j) v_j.

    j runs over the span of i, up to i itself when causal, and over (i - window_tokens, i] under a sliding window. q [T, Hq, D], k and v
    [T, Hkv, D], of one dtype; query head h reads key head h // (Hq / Hkv). Returns out [T, Hq, D] in q's dtype and lse [T, Hq],
    lse_i = log sum_j exp(scale q_i k_j), in fp32 (fp64 for fp64 inputs). A token outside every span gets out 0, lse -inf and no gradient.
    Differentiable once, with respect to q, k and v, through out; lse carries no gradient. Raises UserError for a dtype, head size or device
    that no kernel serves.
    """
    assert causal or window_tokens is None, "a sliding window looks back: it is causal"
    check_spans(spans, q.shape[0])
    assert k.shape[0] == q.shape[0], f"{q.shape[0]} queries over {k.shape[0]} keys are not one row"
    return attend_tiles(q, k, v, diagonal(spans, causal), scale, window_tokens)


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float, window_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """``attend`` over any tiles: q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Tq, Hq]."""
    return _Attention.apply(q, k, v, tuple(tiles), scale, window_tokens)


def forward_block(
    q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float, window_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [Tq, Hq, D] over the keys that ``tiles`` show it of k and v [Tk, Hkv, D]; no autograd.

    Returns out [Tq, Hq, D] and lse [Tq, Hq]; (0, -inf) for a query in no tile. A query may stand in several tiles. out is in q's dtype, or
    in fp32, not yet rounded, where parts had to be merged.
    """
    _check(q, k, v)
    kernel = _kernel(q)
    rounds = make_rounds(tiles, window_tokens, q.device.type == "cpu", q.shape[0])
    if len(rounds) == 1 and _covers(_rows_of(rounds[0], q.device)[0], len(q)):
        _, out, lse = kernel.forward(q, k, v, rounds[0], scale)
        return out.contiguous(), lse.contiguous()
    once = all(round_.fresh for round_ in rounds)
    out, lse = _nothing(q, q.dtype if once else _fp32(q))
    for round_ in rounds:
        rows, part_out, part_lse = kernel.forward(q, k, v, round_, scale)
        if not round_.fresh:
            part_out, part_lse = merge(out[rows], lse[rows], part_out, part_lse)
        out[rows], lse[rows] = part_out.to(out.dtype), part_lse
    return out, lse


def backward_block(
    queries: Queries, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float, window_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of ``tiles`` in the gradients of q [Tq, Hq, D], k and v [Tk, Hkv, D]; zeros outside them.

    With p_ij = exp(scale q_i k_j - lse_i) and delta_i = grad_out_i out_i: dv_j = sum_i p_ij grad_out_i, ds_ij = p_ij (grad_out_i v_j -
    delta_i), dq_i = scale sum_j ds_ij k_j, dk_j = scale sum_i ds_ij q_i, as in FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2); lse
    and delta are of the whole softmax, so shares of disjoint tiles add up. In q's dtype, or in fp32 where the shares of several kernel
    calls were added.
    """
    q = queries.q
    _check(q, k, v)
    kernel = _kernel(q)
    rounds = make_rounds(tiles, window_tokens, q.device.type == "cpu", q.shape[0])
    if len(rounds) == 1 and all(_covers(rows, len(x)) for rows, x in zip(_rows_of(rounds[0], q.device), (q, k), strict=True)):
        dq, dk, dv = (grad.contiguous() for grad in kernel.backward(queries, k, v, rounds[0], scale)[2])
        return dq, dk, dv
    dtype = q.dtype if all(round_.fresh_both for round_ in rounds) else _fp32(q)
    grads = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for round_ in rounds:
        rows_q, rows_k, parts = kernel.backward(queries, k, v, round_, scale)
        for grad, rows, part in zip(grads, (rows_q, rows_k, rows_k), parts, strict=True):
            grad[rows] = part.to(dtype) if round_.fresh_both else grad[rows] + part
    return grads[0], grads[1], grads[2]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two disjoint sets of keys.

    lse = log(e^lse_a + e^lse_b) and out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b. out [T, H, D], lse [T, H]. Computed and returned
    in fp32 (fp64 stays fp64), so that a ring rounds once, at its end. A query that saw no key on either side (lse -inf) stays at out 0, lse
    -inf. The online softmax of Milakov and Gimelshein, arXiv 1805.02867; used so by Liu et al., 2310.01889.
    """
    dtype = torch.promote_types(torch.float32, out_a.dtype)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp_min(torch.finfo(dtype).min)  # -inf minus -inf would be nan
    weight_a, weight_b = (lse_a - finite).exp().unsqueeze(-1), (lse_b - finite).exp().unsqueeze(-1)
    return weight_a * out_a.to(dtype) + weight_b * out_b.to(dtype), lse


def kernel_name(device: torch.device | str) -> tuple[str, str]:
    """(name, reason) of the kernel that serves ``device``: flash_attn_3 | flash_attn | torch_varlen | cpu_flash. Logged when first asked
    for.
    """
    return _choose_kernel(torch.device(device).type)


@lru_cache
def _choose_kernel(device_type: str) -> tuple[str, str]:
    if device_type == "cpu":
        name, reason = "cpu_flash", "torch's flash kernel for CPU"
    elif device_type == "cuda":
        name, reason = _choose_cuda_kernel()
    else:
        raise UserError(f"device={device_type} has no attention kernel here; set device to cpu or cuda")
    log.info("attention kernel on %s: %s (%s)", device_type, name, reason)
    return name, reason


_CUDA_LIBRARIES = {  # by preference: the module of the raw functions, and the one whose signature tells old versions
    "flash_attn_3": ("flash_attn_interface", "_flash_attn_backward"),
    "flash_attn": ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward"),
}


def _choose_cuda_kernel() -> tuple[str, str]:
    refused = []
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if 0 < generation < 8:
        raise UserError(f"this GPU has compute capability {generation}.x and flash attention needs 8 (A100) or newer; set device to cpu")
    for name, (module, function) in _CUDA_LIBRARIES.items():
        if name == "flash_attn_3" and generation != 9:  # all that it is built for
            continue
        try:
            usable = "window_size_left" in _parameters(getattr(importlib.import_module(module), function))
        except (ImportError, OSError, AttributeError) as error:  # OSError: built for another torch, its library does not load
            refused.append(f"{name} is not importable: {error}")
            continue
        if usable:
            return name, f"{name} is installed"
        refused.append(f"{name} is older than its functions that we call (2.7 of flash_attn)")
    return "torch_varlen", "; ".join(refused)


# ---- autograd ----


class _Attention(torch.autograd.Function):
    """``attend_tiles`` with gradients.

    A shard of nothing but padding has no tile. Its q, k and v still get gradients (zeros): the ranks of a sharded model reduce the same
    parameters or hang.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float, window_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D] in q's dtype and lse [Tq, Hq] in nats, both kept for the backward."""
        q, k, v = (dense_last(x) for x in (q, k, v))
        out, lse = forward_block(q, k, v, tiles, scale, window_tokens)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = (tiles, scale, window_tokens)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [Tq, Hq, D] -> dq [Tq, Hq, D], dk and dv [Tk, Hkv, D] in q's dtype, by ``backward_block``."""
        q, k, v, out, lse = ctx.saved_tensors
        grads = backward_block(Queries(q, out, lse, dense_last(grad_out)), k, v, *ctx.arguments)
        return *(grad.to(q.dtype) for grad in grads), None, None, None


def dense_last(x: Tensor) -> Tensor:
    """Kernels take any strides but believe the last one to be 1: the expanded gradient of a sum would be misread."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == 3 and k.shape == v.shape == (k.shape[0], k.shape[1], q.shape[2])
    assert fits, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, D]"
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}"


def _fp32(q: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, q.dtype)


def _nothing(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see nothing."""
    out = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    return out, q.new_full(q.shape[:2], -math.inf, dtype=_fp32(q))


# ---- rows of a round ----


@lru_cache(maxsize=256)
def _rows_of(round_: Round, device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
    """What selects the queries and the keys of a round. Made once for a segment, not in each layer."""
    queries = tuple((tile.q_start, tile.q_stop) for tile in round_.tiles)
    keys = tuple((tile.k_start, tile.k_stop) for tile in round_.tiles)
    return _rows(queries, device), _rows(keys, device)


@lru_cache(maxsize=256)
def rows_in(ranges: tuple[tuple[int, int], ...], device: torch.device) -> slice | Tensor:
    """What selects the rows of half-open ranges: a slice (no copy) where they adjoin, else an index on ``device``.

    Made once for a segment, not in each layer.
    """
    return _rows(ranges, device)


def _rows(ranges: tuple[tuple[int, int], ...], device: torch.device) -> slice | Tensor:
    if all(left[1] == right[0] for left, right in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1]) if ranges else slice(0, 0)
    with torch.inference_mode(False):  # an evaluation may come first, and training may not save its tensors
        return torch.cat([torch.arange(start, stop) for start, stop in ranges]).to(device)


def _covers(rows: slice | Tensor, n_rows: int) -> bool:
    """Whether a kernel's answer is the whole: nothing to fill up, nothing to copy."""
    return isinstance(rows, slice) and (rows.start, rows.stop) == (0, n_rows)


# ---- CPU ----


class _Cpu:
    """torch's flash kernel for CPU: tiles of one shape side by side in its batch dim."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[slice | Tensor, Tensor, Tensor]:
        """Of whole rows: (the n rows of queries in ``round_``, their out [n, Hq, D], their lse [n, Hq])."""
        rows_q, rows_k = _rows_of(round_, q.device)
        cut = (_cut(q, rows_q, round_), _cut(k, rows_k, round_), _cut(v, rows_k, round_))
        out, lse = _cpu_flash(*cut, 0.0, round_.causal and not round_.window_tokens, attn_mask=_band_mask(round_, q.dtype), scale=scale)
        return rows_q, _join(out), _join(lse)

    def backward(
        self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float
    ) -> tuple[slice | Tensor, slice | Tensor, Sequence[Tensor]]:
        """Of whole rows: (the n rows of queries, the m rows of keys, [dq [n, Hq, D], dk [m, Hkv, D], dv [m, Hkv, D]])."""
        rows_q, rows_k = _rows_of(round_, k.device)
        q, out, lse, grad_out = (_cut(x, rows_q, round_) for x in queries)
        cut = (grad_out, q, _cut(k, rows_k, round_), _cut(v, rows_k, round_), out, lse)
        causal = round_.causal and not round_.window_tokens
        grads = _cpu_flash_backward(*cut, 0.0, causal, attn_mask=_band_mask(round_, k.dtype), scale=scale)
        return rows_q, rows_k, [_join(grad) for grad in grads]


def _cut(x: Tensor, rows: slice | Tensor, round_: Round) -> Tensor:
    """[T, H, …] -> [n, H, length, …], what the CPU kernel reads (by strides: nothing is copied for adjoining tiles)."""
    return x[rows].unflatten(0, (len(round_.tiles), -1)).transpose(1, 2)


def _join(block: Tensor) -> Tensor:
    """[n, H, length, …] -> [n * length, H, …]."""
    return block.transpose(1, 2).flatten(0, 1)


def _band_mask(round_: Round, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of a round that a sliding window cuts, [queries, keys]: 0 where a query sees a key, else -inf."""
    tile = round_.tiles[0]
    return None if round_.window_tokens is None else _additive(tile.n_queries, tile.n_keys, tile.lead, round_.window_tokens, dtype)


@lru_cache(maxsize=64)
def _additive(n_queries: int, n_keys: int, lead: int, window_tokens: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        after = torch.arange(n_queries)[:, None] + lead - torch.arange(n_keys)
        mask = torch.zeros(n_queries, n_keys, dtype=dtype)
        return mask.masked_fill_((after < 0) | (after >= window_tokens), -math.inf)


# ---- CUDA ----


class Varlen(NamedTuple):
    """The shape of one call over packed tiles: cumulative lengths, longest tile, mask."""

    cu_q: Tensor  # int32 [tiles + 1]
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int  # flash attention's window: keys seen to the left of the bottom-right diagonal (-1: all) …
    right: int  # … and to its right (0: causal, -1: all)


_Forward = Callable[[Tensor, Tensor, Tensor, Varlen, float], tuple[Tensor, Tensor]]
_Backward = Callable[[Queries, Tensor, Tensor, Varlen, float], Sequence[Tensor]]  # lse [Hq, N]


@dataclass(frozen=True)
class _Cuda:
    """A flash kernel for packed tiles: q, k and v back to back, out [N, Hq, D], lse [Hq, N] in fp32."""

    call: _Forward
    call_backward: _Backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[slice | Tensor, Tensor, Tensor]:
        """As ``_Cpu.forward``."""
        rows_q, rows_k = _rows_of(round_, q.device)
        out, lse = self.call(q[rows_q], k[rows_k], v[rows_k], _varlen(round_, q.device), scale)
        return rows_q, out, lse.transpose(0, 1)

    def backward(
        self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float
    ) -> tuple[slice | Tensor, slice | Tensor, Sequence[Tensor]]:
        """As ``_Cpu.backward``."""
        rows_q, rows_k = _rows_of(round_, k.device)
        part = queries.part(rows_q)
        part = part._replace(lse=part.lse.transpose(0, 1).contiguous())
        return rows_q, rows_k, self.call_backward(part, k[rows_k], v[rows_k], _varlen(round_, k.device), scale)


@lru_cache(maxsize=256)
def _varlen(round_: Round, device: torch.device) -> Varlen:
    """Flash attention aligns masks to the bottom right, as tiles do: of a tile of gap g, query i is at its diagonal's key i + lead - g, so
    a window of w tokens reaches w - 1 - g keys to the left of the diagonal. Where that is all that masks, flash-attn 2 and torch set the
    window to the right to the longest keys, which hides some from the first of many queries over few keys: so as many are declared as
    queries. Made once for a segment: no device sync in the other layers.
    """
    q_lengths, k_lengths = [tile.n_queries for tile in round_.tiles], [tile.n_keys for tile in round_.tiles]
    with torch.inference_mode(False):
        cu_q, cu_k = (torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (q_lengths, k_lengths))
    left = -1 if round_.window_tokens is None else round_.window_tokens - 1 - round_.tiles[0].gap
    assert left >= 0 or round_.window_tokens is None, f"{round_.tiles[0]} holds queries that see no key"
    max_q, max_k = max(q_lengths), max(k_lengths)
    if left >= 0 and not round_.causal:
        max_k = max(max_k, max_q)
    return Varlen(cu_q, cu_k, max_q, max_k, left, 0 if round_.causal else -1)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own flash attention, called as ``torch.nn.attention.varlen`` calls it."""
    cu_q, cu_k, max_q, max_k, left, right = varlen
    out, lse, *_ = _cuda_flash(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, (left, right) == (-1, 0), False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _torch_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    q, out, lse, grad_out = queries
    cu_q, cu_k, max_q, max_k, left, right = varlen
    random_state, unused = _no_dropout(q.device)
    return _cuda_flash_backward(
        grad_out.contiguous(), q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, (left, right) == (-1, 0), random_state, unused,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _flash2_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 2.7 or newer: (out, lse, dropout mask, random state)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # optional, and only for CUDA

    cu_q, cu_k, max_q, max_k, left, right = varlen
    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale, causal=right == 0,
        window_size_left=left, window_size_right=right, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    )  # fmt: skip
    return out, lse


def _flash2_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    q, out, lse, grad_out = queries
    cu_q, cu_k, max_q, max_k, left, right = varlen
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]  # which it fills
    _flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale, causal=right == 0,
        window_size_left=left, window_size_right=right, softcap=0.0, alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return grads


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 3 (Hopper), whose one function takes packed tiles where cumulative lengths are given."""
    from flash_attn_interface import _flash_attn_forward

    cu_q, cu_k, max_q, max_k, left, right = varlen
    out, lse, *_ = _flash_attn_forward(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, softmax_scale=scale, causal=right == 0,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _flash3_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn_interface import _flash_attn_backward

    q, out, lse, grad_out = queries
    cu_q, cu_k, max_q, max_k, left, right = varlen
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    names = _parameters(_flash_attn_backward)
    _flash_attn_backward(
        grad_out, q, k, v, out, lse, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale, window_size_left=left, window_size_right=right,
        **{"is_causal" if "is_causal" in names else "causal": right == 0},
    )  # fmt: skip
    return grads


def _parameters(function: Any) -> frozenset[str]:
    """Names of the parameters of a function or of a torch custom operator."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


_KERNELS: dict[str, _Cpu | _Cuda] = {
    "cpu_flash": _Cpu(),
    "torch_varlen": _Cuda(_torch_forward, _torch_backward),
    "flash_attn": _Cuda(_flash2_forward, _flash2_backward),
    "flash_attn_3": _Cuda(_flash3_forward, _flash3_backward),
}


def _kernel(q: Tensor) -> _Cpu | _Cuda:
    name, _ = kernel_name(q.device)
    if name != "cpu_flash":
        _refuse_on_cuda(q)
    return _KERNELS[name]


def _refuse_on_cuda(q: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"model.dtype={str(q.dtype).removeprefix('torch.')} has no flash attention on CUDA; set model.dtype to bfloat16")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise UserError(
            f"head_dim={q.shape[-1]} has no flash attention on CUDA, which serves multiples of 8 up to 256; choose another model (model.path)"
        )
