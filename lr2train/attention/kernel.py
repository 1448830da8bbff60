"""Attention inside the spans of one packed row, on one device: (q, k, v, spans) -> (out, lse), forward and backward.

Shape letters: T tokens of the row, N tokens inside spans, H heads (Hq of queries, Hkv of keys and values, Hq % Hkv == 0), D head size.

Choice: one door, three kernels. On CUDA flash-attn where it is installed, else torch's own variable-length flash attention; on CPU the
flash kernel behind ``F.scaled_dot_product_attention``, called as an operator because only so does it hand out the log-sum-exp that partial
softmaxes are merged by, and take it back in its backward. No mask is ever built: a span is cut out, attended to causally, and put back.
Cost: the CPU kernel knows no packing, so spans of equal length share a call and the others get one each. Padding unequal spans to share
calls was measured and is slower: a call costs about 20 us, the wasted products of padding more.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.config import UserError

Spans = tuple[tuple[int, int], ...]
"""Half-open (start, stop) token ranges of a row, sorted and disjoint: the documents that do not see each other."""

log = logging.getLogger(__name__)

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token over its own span: out_i = sum_j softmax_j(scale q_i k_j) v_j.

    j runs over the span of i, up to i itself when causal. q [T, Hq, D], k and v [T, Hkv, D], of one dtype; query head h reads key head
    h // (Hq / Hkv). Returns out [T, Hq, D] in q's dtype and lse [T, Hq], lse_i = log sum_j exp(scale q_i k_j), in fp32 (fp64 for fp64
    inputs). A token outside every span gets out 0, lse -inf and no gradient. Differentiable once, with respect to q, k and v, through out;
    lse carries no gradient. Raises UserError for a dtype or device that no kernel serves.
    """
    _check(q, k, v, spans)
    if not spans:
        return _NoAttention.apply(q, k, v)
    name, _ = kernel_name(q.device)
    if name == "cpu_flash":
        return _CpuAttention.apply(q, k, v, spans, scale, causal)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"model.dtype={str(q.dtype).removeprefix('torch.')} has no flash attention on CUDA; set model.dtype to bfloat16")
    return _attend_packed(_flash_attn if name == "flash_attn" else _torch_varlen, q, k, v, spans, scale, causal)


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
    """(name, reason) of the kernel that serves ``device``: flash_attn | torch_varlen | cpu_flash. Logged the first time it is asked for."""
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


def _choose_cuda_kernel() -> tuple[str, str]:
    try:
        version = importlib.import_module("flash_attn").__version__
    except (ImportError, OSError) as error:  # OSError: built for another torch, its library does not load
        return "torch_varlen", f"flash_attn is not importable: {error}"
    return "flash_attn", f"flash_attn {version} is installed"


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> None:
    fits = q.dim() == 3 and k.shape == v.shape == (q.shape[0], k.shape[1], q.shape[2])
    assert fits, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [T, Hq, D], [T, Hkv, D], [T, Hkv, D]"
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    _check_spans(spans, q.shape[0])


@lru_cache(maxsize=1024)
def _check_spans(spans: Spans, n_tokens: int) -> None:
    borders = [0, *(border for span in spans for border in span), n_tokens]
    fits = borders == sorted(borders) and all(start < stop for start, stop in spans)
    assert fits, f"spans {spans} are not sorted, disjoint, non-empty ranges of {n_tokens} tokens"


def _outside(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of tokens that attend to nothing."""
    return torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_full(q.shape[:2], -math.inf, dtype=_lse_dtype(q))


class _NoAttention(torch.autograd.Function):
    """A shard of nothing but padding. Its q, k and v still get gradients (zeros): the ranks of a sharded model reduce the same parameters or hang."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        out, lse = _outside(q)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, q.dtype)


# ---- CPU ----


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense_last(x) for x in (q, k, v))
        out, lse = _outside(q)
        for rows, shape in _calls(spans):
            out_block, lse_block = _cpu_flash(*(_cut(x, rows, shape) for x in (q, k, v)), 0.0, causal, scale=scale)
            out[rows], lse[rows] = _join(out_block), _join(lse_block)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = (spans, scale, causal)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        spans, scale, causal = ctx.arguments
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        inputs = (_dense_last(grad_out), q, k, v, out, lse)
        for rows, shape in _calls(spans):
            blocks = _cpu_flash_backward(*(_cut(x, rows, shape) for x in inputs), 0.0, causal, scale=scale)
            for grad, block in zip(grads, blocks, strict=True):
                grad[rows] = _join(block)
        return *grads, None, None, None


@lru_cache(maxsize=16)
def _calls(spans: Spans) -> tuple[tuple[slice | Tensor, tuple[int, int]], ...]:
    """One entry for each length that occurs: (rows of its n spans, (n, length)). Rows of adjoining spans are a slice: no copy."""
    starts: dict[int, list[int]] = {}
    for start, stop in spans:
        starts.setdefault(stop - start, []).append(start)
    return tuple((_rows(firsts, length), (len(firsts), length)) for length, firsts in starts.items())


def _rows(starts: list[int], length: int) -> slice | Tensor:
    end = starts[0] + len(starts) * length
    if starts == list(range(starts[0], end, length)):
        return slice(starts[0], end)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def _cut(x: Tensor, rows: slice | Tensor, shape: tuple[int, int]) -> Tensor:
    """[T, H, …] -> [n, H, length, …], what the CPU kernel reads (by strides: nothing is copied for adjoining spans)."""
    return x[rows].unflatten(0, shape).transpose(1, 2)


def _join(block: Tensor) -> Tensor:
    """[n, H, length, …] -> [n * length, H, …]."""
    return block.transpose(1, 2).flatten(0, 1)


def _dense_last(x: Tensor) -> Tensor:
    """The CPU kernel takes any strides but believes the last one to be 1: the expanded gradient of a sum would be misread."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- CUDA ----

_Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, bool], tuple[Tensor, Tensor]]


def _attend_packed(varlen: _Varlen, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Run a kernel that wants spans back to back: tokens outside spans are taken out before it and put back as (0, -inf) after it."""
    rows, bounds, longest = _packing(spans, q.shape[0], q.device)
    if rows is None:
        return varlen(q, k, v, bounds, longest, scale, causal)
    out, lse = varlen(q[rows], k[rows], v[rows], bounds, longest, scale, causal)
    no_out, no_lse = _outside(q)
    return no_out.index_copy(0, rows, out), no_lse.index_copy(0, rows, lse)


@lru_cache(maxsize=16)
def _packing(spans: Spans, n_tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor, int]:
    """(rows inside spans or None for all, cumulative lengths int32 [spans + 1], longest): no device sync but for a segment's first
    layer.
    """
    lengths = [stop - start for start, stop in spans]
    with torch.inference_mode(False):  # an evaluation may come first, and training may not save its tensors
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        if sum(lengths) == n_tokens:
            return None, bounds, max(lengths)
        rows = torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device)
    return rows, bounds, max(lengths)


# Both flash kernels align a causal mask to the bottom right where the CPU kernel aligns it to the top left. Inside a span there are as many
# keys as queries, so the two are one mask.


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """flash-attn 2.7 or newer. Its "attn_probs" return (out, lse [Hq, N], dropout mask); the lse is exact, only the mask is for tests."""
    from flash_attn import flash_attn_varlen_func  # optional, and only for CUDA

    out, lse, _ = flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=causal, return_attn_probs=True
    )
    return out, lse.detach().transpose(0, 1)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's own flash attention. It spells causal as a window of (all to the left, none to the right); its lse is [Hq, N]."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # registers CUDA operators, of no use on CPU

    out, lse = varlen_attn(
        q, k, v, bounds, bounds, longest, longest,
        return_aux=AuxRequest(lse=True), scale=scale, window_size=(-1, 0 if causal else -1), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out, lse.detach().transpose(0, 1)
