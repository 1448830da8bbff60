"""The CUDA kernels: flash-attn 3 or 2 where installed, else torch's own variable-length flash attention.

Shape letters: N rows of queries and M rows of keys of a round, H heads, D head size.

Choice: all are called as raw functions, because only so do they return the log-sum-exp and take it back in the
backward. A round is one call over packed tiles, told apart by cumulative lengths (cu_seqlens). All lengths are Python
ints, so no call waits for the device. Cost: raw functions change between versions; ``choose`` tells old ones by their
signature. This is the only file that imports flash_attn.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lr2train.attention.blocks import Block, Queries, Round, softcap_of
from lr2train.config import UserError
from lr2train.parallel.comm import to_device

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward

_LIBRARIES = {  # by preference: the module of the raw functions, and the function whose signature tells old versions
    "flash_attn_3": ("flash_attn_interface", "_flash_attn_backward"),
    "flash_attn": ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward"),
}


def choose() -> tuple[str, str]:
    """(name, reason) of the best kernel on this machine: flash_attn_3 | flash_attn | torch_varlen.

    Raises:
        UserError: the GPU is older than flash attention.
    """
    refused = []
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if 0 < generation < 8:
        found = f"this GPU has compute capability {generation}.x"
        raise UserError(f"{found} and flash attention needs 8 (A100) or newer; set device to cpu")
    for name, (module, function) in _LIBRARIES.items():
        if name == "flash_attn_3" and generation != 9:  # it is built for Hopper alone
            continue
        try:
            usable = "window_size_left" in _parameters(getattr(importlib.import_module(module), function))
        except (ImportError, OSError, AttributeError) as error:  # OSError: built for another torch
            refused.append(f"{name} is not importable: {error}")
            continue
        if usable:
            return name, f"{name} is installed"
        refused.append(f"{name} is older than its functions that we call (2.7 of flash_attn)")
    return "torch_varlen", "; ".join(refused)


@dataclass(frozen=True, eq=False)
class Varlen:
    """The shape of one call over packed tiles: cumulative lengths, longest tile, mask."""

    cu_q: Tensor  # int32 [tiles + 1]
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int  # keys seen to the left of the bottom-right diagonal; -1: all
    right: int  # keys seen to the right of the diagonal; 0: causal, -1: all

    @cached_property
    def no_dropout(self) -> tuple[Tensor, Tensor]:
        """(random state, unused) that torch's backward wants although nothing is dropped."""
        with torch.inference_mode(False):
            return torch.zeros(2, dtype=torch.uint64, device=self.cu_q.device), torch.empty(0, device=self.cu_q.device)


def varlen_of(round_: Round, device: torch.device) -> Varlen:
    """A round as flash attention takes it.

    Flash attention aligns masks to the bottom right, as tiles do. In a tile of gap g, query i stands at its diagonal's
    key i + lead - g. So a sliding window of w tokens reaches w - 1 - g keys to the left of the diagonal.

    Trap: with a window to the left and none to the right, flash-attn 2 and torch set the window to the right to the
    longest keys. That hides keys from the first of many queries over few keys. So at least as many keys are declared as
    queries.
    """
    q_lengths, k_lengths = [tile.n_queries for tile in round_.tiles], [tile.n_keys for tile in round_.tiles]
    with torch.inference_mode(False):
        cu_q, cu_k = (_cu_seqlens(lengths, device) for lengths in (q_lengths, k_lengths))
    left = -1 if round_.sliding_window is None else round_.sliding_window - 1 - round_.tiles[0].gap
    assert left >= 0 or round_.sliding_window is None, f"{round_.tiles[0]} holds queries that see no key"
    max_q, max_k = max(q_lengths), max(k_lengths)
    if left >= 0 and not round_.causal:
        max_k = max(max_k, max_q)
    return Varlen(cu_q, cu_k, max_q, max_k, left, 0 if round_.causal else -1)


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


_Forward = Callable[[Tensor, Tensor, Tensor, Varlen, float], tuple[Tensor, Tensor]]
_Backward = Callable[[Queries, Tensor, Tensor, Varlen, float], Sequence[Tensor]]  # with lse [Hq, N]


@dataclass(frozen=True)
class CudaKernel:
    """``kernel.Kernel`` over a flash kernel for packed tiles, whose out is [N, Hq, D] and lse [Hq, N] in fp32."""

    call: _Forward
    call_backward: _Backward

    def rounds(self, block: Block) -> tuple[Round, ...]:
        """The calls that a block takes."""
        return block.cuda_rounds

    def check(self, q: Tensor) -> None:
        """Refuse what flash attention does not serve.

        Raises:
            UserError: the dtype is not half precision, or the head size is no multiple of 8 up to 256.
        """
        if q.dtype not in (torch.bfloat16, torch.float16):
            dtype = str(q.dtype).removeprefix("torch.")
            raise UserError(f"model.dtype={dtype} has no flash attention on CUDA; set model.dtype to bfloat16")
        if q.shape[-1] > 256 or q.shape[-1] % 8:
            raise UserError(
                f"head_dim={q.shape[-1]} has no flash attention on CUDA, which serves multiples of 8 up to 256; "
                "choose another model (model.path)"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
        """As ``CpuKernel.forward``."""
        rows_q, rows_k = round_.queries.on(q.device), round_.keys.on(q.device)
        out, lse = self.call(q[rows_q], k[rows_k], v[rows_k], round_.once(varlen_of, q.device), scale)
        return out, lse.transpose(0, 1)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """As ``CpuKernel.backward``."""
        rows_k = round_.keys.on(k.device)
        part = queries.part(round_.queries.on(k.device))
        part = part._replace(lse=part.lse.transpose(0, 1).contiguous())
        return self.call_backward(part, k[rows_k], v[rows_k], round_.once(varlen_of, k.device), scale)


# ---- the libraries ----


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own flash attention, called as ``torch.nn.attention.varlen`` calls it.

    Raises:
        UserError: the model caps its scores, which this kernel does not.
    """
    if softcap_of(scale):
        raise UserError("torch's own flash attention does not cap scores, which this model does; install flash-attn")
    out, lse, *_ = _flash(
        q, k, v, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, 0.0, _is_plainly_causal(varlen), False,
        scale=scale, window_size_left=varlen.left, window_size_right=varlen.right,
    )  # fmt: skip
    return out, lse


def _torch_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    q, out, lse, grad_out = queries
    random_state, unused = varlen.no_dropout
    return _flash_backward(
        grad_out.contiguous(), q, k, v, out, lse, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, 0.0,
        _is_plainly_causal(varlen), random_state, unused,
        scale=scale, window_size_left=varlen.left, window_size_right=varlen.right,
    )  # fmt: skip


def _is_plainly_causal(varlen: Varlen) -> bool:
    return (varlen.left, varlen.right) == (-1, 0)


def _flash2_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 2.7 or newer, which returns (out, lse, dropout mask, random state)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # optional, and only for CUDA

    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, dropout_p=0.0, softmax_scale=scale,
        causal=varlen.right == 0, window_size_left=varlen.left, window_size_right=varlen.right,
        softcap=softcap_of(scale), alibi_slopes=None, return_softmax=False, block_table=None,
    )  # fmt: skip
    return out, lse


def _flash2_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    q, out, lse, grad_out = queries
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]  # the library fills them
    _flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, *grads, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, dropout_p=0.0,
        softmax_scale=scale, causal=varlen.right == 0, window_size_left=varlen.left, window_size_right=varlen.right,
        softcap=softcap_of(scale), alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return grads


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 3 (Hopper), whose one function takes packed tiles where cumulative lengths are given."""
    from flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(
        q, k, v, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k, max_seqlen_q=varlen.max_q,
        max_seqlen_k=varlen.max_k, softmax_scale=scale, causal=varlen.right == 0,
        window_size_left=varlen.left, window_size_right=varlen.right, **_softcap3(scale),
    )  # fmt: skip
    return out, lse


def _softcap3(scale: float) -> dict[str, float]:
    """flash-attn 3's keyword, where a model caps its scores."""
    return {"softcap": softcap_of(scale)} if softcap_of(scale) else {}


def _flash3_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn_interface import _flash_attn_backward

    q, out, lse, grad_out = queries
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    causal = "is_causal" if "is_causal" in _parameters(_flash_attn_backward) else "causal"  # its betas differ
    _flash_attn_backward(
        grad_out, q, k, v, out, lse, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k, max_seqlen_q=varlen.max_q,
        max_seqlen_k=varlen.max_k, dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale,
        window_size_left=varlen.left, window_size_right=varlen.right, **{causal: varlen.right == 0},
        **_softcap3(scale),
    )  # fmt: skip
    return grads


def _parameters(function: Any) -> frozenset[str]:
    """Names of the parameters of a function or of a torch custom operator."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


KERNELS = {
    "torch_varlen": CudaKernel(_torch_forward, _torch_backward),
    "flash_attn": CudaKernel(_flash2_forward, _flash2_backward),
    "flash_attn_3": CudaKernel(_flash3_forward, _flash3_backward),
}
