"""The kernel door: attention on one device between any rows of queries and keys, forward and backward.

Shape letters: T tokens of a segment (Tq rows of queries, Tk rows of keys), Hq query heads, Hkv key heads, D head size.
Hkv divides Hq.

``attend`` serves the documents of a packed segment; ``forward_block`` and ``backward_block`` serve any tiles, as a step
of a ring needs them. The backward takes ``out`` and ``lse`` of the *whole* softmax, merged over all blocks, and returns
the block's share of the gradients: shares add up.

Choice: one door, four kernels (``cuda.py``: flash-attn 3, flash-attn 2, torch's varlen; ``cpu.py``: torch's flash
kernel). The door never builds a mask over a segment: tiles say who sees whom. Cost: one line of dispatch, and raw
operators that change between versions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lr2train.attention import cuda
from lr2train.attention.blocks import Block, Queries, Round
from lr2train.attention.cpu import CpuKernel
from lr2train.attention.recompute import kept
from lr2train.attention.tiles import Spans, check_spans, diagonal
from lr2train.config import UserError

log = logging.getLogger(__name__)


class Kernel(Protocol):
    """Computes one round at a time: N rows of queries over M rows of keys."""

    def rounds(self, block: Block) -> tuple[Round, ...]: ...

    def check(self, q: Tensor) -> None: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]: ...


KERNELS: dict[str, Kernel] = {"cpu_flash": CpuKernel(), **cuda.KERNELS}
_instead: ContextVar[Kernel | None] = ContextVar("instead", default=None)


@contextlib.contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """Inside the block this kernel serves every device: a rehearsal takes a CUDA kernel where there is no GPU."""
    token = _instead.set(kernel)
    try:
        yield
    finally:
        _instead.reset(token)


def attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool = True, sliding_window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token over its own document: out_i = sum_j softmax_j(scale q_i k_j) v_j.

    j runs over the document of i: up to i itself when causal, over (i - sliding_window, i] under a sliding window.
    Query head h reads key head h // (Hq / Hkv). A token outside every span gets out 0, lse -inf and no gradient.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D], of q's dtype.
        v: as k.
        spans: the documents.
        scale: multiplies the scores.
        causal: False sees the whole document.
        sliding_window: tokens; causal only.

    Returns:
        out [T, Hq, D] in q's dtype, and lse [T, Hq], lse_i = log sum_j exp(scale q_i k_j), in fp32 (fp64 for fp64
        inputs). Differentiable once, through out; lse carries no gradient.

    Raises:
        UserError: no kernel serves the dtype, the head size or the device.
    """
    assert causal or sliding_window is None, "a sliding window looks back: it is causal"
    check_spans(spans, q.shape[0])
    assert k.shape[0] == q.shape[0], f"{q.shape[0]} queries over {k.shape[0]} keys are not one segment"
    return attend_block(q, k, v, scale, Block(diagonal(spans, causal), sliding_window))


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> tuple[Tensor, Tensor]:
    """``attend`` over any tiles: q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Tq, Hq]."""
    return _Attention.apply(q, k, v, scale, block)


def forward_block(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [Tq, Hq, D] over the keys that the block's tiles show of k and v [Tk, Hkv, D]; no autograd.

    Returns out [Tq, Hq, D] and lse [Tq, Hq]; (0, -inf) for a query in no tile. out is in q's dtype, or in fp32, not yet
    rounded, where parts had to be merged.
    """
    _check(q, k, v)
    kernel = _kernel(q)
    rounds = kernel.rounds(block)
    if len(rounds) == 1 and rounds[0].queries.covers(len(q)):
        out, lse = kernel.forward(q, k, v, rounds[0], scale)
        return out.contiguous(), lse.contiguous()
    once = all(round_.fresh for round_ in rounds)  # every query is written once: nothing is merged
    out, lse = _nothing(q, q.dtype if once else _fp32(q))
    for round_ in rounds:
        rows = round_.queries.on(q.device)
        part_out, part_lse = kernel.forward(q, k, v, round_, scale)
        if round_.fresh:
            out[rows], lse[rows] = part_out.to(out.dtype), part_lse
        else:
            merge_into(out, lse, rows, part_out, part_lse)
    return out, lse


def backward_block(queries: Queries, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of the gradients of q [Tq, Hq, D], k and v [Tk, Hkv, D]; zeros outside the tiles.

    With p_ij = exp(scale q_i k_j - lse_i) and delta_i = grad_out_i out_i:

        dv_j = sum_i p_ij grad_out_i      ds_ij = p_ij (grad_out_i v_j - delta_i)
        dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i

    as in FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2). lse and delta are of the whole softmax, so the shares
    of disjoint tiles add up. In q's dtype, or in fp32 where the shares of several kernel calls were added.
    """
    q = queries.q
    _check(q, k, v)
    kernel = _kernel(q)
    rounds = kernel.rounds(block)
    if len(rounds) == 1 and rounds[0].queries.covers(len(q)) and rounds[0].keys.covers(len(k)):
        dq, dk, dv = (grad.contiguous() for grad in kernel.backward(queries, k, v, rounds[0], scale))
        return dq, dk, dv
    dtype = q.dtype if all(round_.fresh_both for round_ in rounds) else _fp32(q)
    grads = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for round_ in rounds:
        rows_q, rows_k = round_.queries.on(q.device), round_.keys.on(q.device)
        parts = kernel.backward(queries, k, v, round_, scale)
        for grad, rows, part in zip(grads, (rows_q, rows_k, rows_k), parts, strict=True):
            grad[rows] = part.to(dtype) if round_.fresh_both else grad[rows] + part
    return grads[0], grads[1], grads[2]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two disjoint sets of keys: out [T, H, D] and lse [T, H] each.

        lse = log(e^lse_a + e^lse_b)      out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

    Computed and returned in fp32 (fp64 stays fp64), so that a ring rounds once, at its end. A query that saw no key on
    either side (lse -inf) stays at out 0, lse -inf. The online softmax of Milakov and Gimelshein, arXiv 1805.02867,
    used so by Liu et al., arXiv 2310.01889.
    """
    dtype = torch.promote_types(torch.float32, out_a.dtype)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp_min(torch.finfo(dtype).min)  # -inf minus -inf would be nan
    weight_a, weight_b = (lse_a - finite).exp().unsqueeze(-1), (lse_b - finite).exp().unsqueeze(-1)
    return weight_a * out_a.to(dtype) + weight_b * out_b.to(dtype), lse


def merge_into(out: Tensor, lse: Tensor, rows: slice | Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """``merge`` of some rows of out [T, H, D] and lse [T, H], in fp32 and in place, with a part [N, H, D] and [N, H]
    over other keys. ``rows``: N rows, each at most once. One kernel on CUDA with triton, plain elsewhere.
    """
    if out.is_cuda and out.dtype == torch.float32 and _has_triton():
        from lr2train.attention.merging import merge_rows

        merge_rows(out, lse, rows, part_out, part_lse)
    else:
        out[rows], lse[rows] = merge(out[rows], lse[rows], part_out, part_lse)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernel_name(device: torch.device | str) -> tuple[str, str]:
    """(name, reason) of the kernel that serves ``device``: flash_attn_4 | flash_attn_3 | flash_attn |
    torch_varlen | explicit | cpu_flash.

    Raises:
        UserError: no kernel serves the device.
    """
    return _choose_kernel(torch.device(device).type)


@cache  # a fact about the machine, not about a segment: libraries are tried, and the result logged, once a process
def _choose_kernel(device_type: str) -> tuple[str, str]:
    if device_type == "cpu":
        name, reason = "cpu_flash", "torch's flash kernel for CPU"
    elif device_type == "cuda":
        name, reason = cuda.choose()
    else:
        raise UserError(f"device={device_type} has no attention kernel here; set device to cpu or cuda")
    log.info("attention kernel on %s: %s (%s)", device_type, name, reason)
    return name, reason


def _kernel(q: Tensor) -> Kernel:
    kernel = _instead.get() or KERNELS[kernel_name(q.device)[0]]
    kernel.check(q)
    return kernel


class _Attention(torch.autograd.Function):
    """``attend_block`` with gradients.

    A sequence shard of nothing but padding has no tile. Its q, k and v still get gradients (zeros): the ranks of a
    sharded model all reduce the same parameters, or hang.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D] in q's dtype, lse [Tq, Hq] in nats."""
        q, k, v = (dense_last(x) for x in (q, k, v))
        out, lse = kept(lambda: _rounded(q.dtype, *forward_block(q, k, v, block, scale)))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.block = scale, block
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [Tq, Hq, D] -> dq [Tq, Hq, D], dk and dv [Tk, Hkv, D] in q's dtype, by ``backward_block``."""
        q, k, v, out, lse = ctx.saved_tensors
        grads = backward_block(Queries(q, out, lse, dense_last(grad_out)), k, v, ctx.block, ctx.scale)
        return *(grad.to(q.dtype) for grad in grads), None, None


def dense_last(x: Tensor) -> Tensor:
    """``x`` with a last stride of 1. Kernels assume it, and would misread the expanded gradient of a sum."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rounded(dtype: torch.dtype, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.to(dtype), lse


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == 3 and k.shape == v.shape == (k.shape[0], k.shape[1], q.shape[2])
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert fits, f"{shapes} are not [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, D]"
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}"


def _fp32(q: Tensor) -> torch.dtype:
    """The dtype in which partial results are merged: fp32, fp64 for fp64."""
    return torch.promote_types(torch.float32, q.dtype)


def _nothing(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see no key."""
    out = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    return out, q.new_full(q.shape[:2], -math.inf, dtype=_fp32(q))
