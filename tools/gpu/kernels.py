"""Attention kernels of a machine: which can be imported, how lr2train is made to use one, a plain call of each.

Choice: a *plain* call is the library's public function with its own autograd, over one sequence of queries and one of
keys. It is the baseline for our kernel interface: the same kernel with nothing around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lr2train.attention import cuda, kernel
from lr2train.attention.ring_flash_attn import zigzag_function
from lr2train.config import UserError


class PlainKernel(Protocol):
    """q [Tq, Hq, D], k and v [Tk, Hkv, D], scale, causal (Tq = Tk) or full -> out [Tq, Hq, D], differentiable."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor: ...


class Available(NamedTuple):
    """Kernels that a device can run, named as in ``attention.kernel``, and a line about each other kernel."""

    names: tuple[str, ...]
    missing: tuple[str, ...]


def available(device: torch.device) -> Available:
    """Kernels of ``device``; on CPU torch's flash kernel alone. A missing package is a line, not an error."""
    cpu = device.type == "cpu"
    generation = 0 if cpu else torch.cuda.get_device_capability(device)[0]
    reasons = {name: "needs CUDA" if cpu else cuda.refusal(name, generation) for name in cuda.LIBRARIES}
    usable = tuple(name for name, reason in reasons.items() if not reason)
    reasons["ring_flash_attn"] = _ring_refusal()
    missing = tuple(f"not used: {name} ({reason})" for name, reason in reasons.items() if reason)
    return Available(("cpu_flash",) if cpu else (*usable, "torch_varlen"), missing)


def _ring_refusal() -> str | None:
    try:
        zigzag_function()
    except UserError as error:
        return f"needs flash-attn 2: {error.__cause__}" if error.__cause__ else str(error)
    return None


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """lr2train's attention uses kernel ``name`` inside this context."""

    def chosen(device: torch.device | str) -> tuple[str, str]:
        return name, f"asked for on {device}"

    with mock.patch.object(kernel, "kernel_name", chosen):
        yield


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q[None], k[None], v[None], softmax_scale=scale, causal=causal)[0]


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q[None], k[None], v[None], softmax_scale=scale, causal=causal)
    return (out[0] if isinstance(out, tuple) else out)[0]  # betas return (out, lse)


def _flash4(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q[None], k[None], v[None], softmax_scale=scale, causal=causal)[0][0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows = (_bounds(len(q), q.device), _bounds(len(k), k.device), len(q), len(k))
    out = varlen_attn(
        q, k, v, *rows, scale=scale, window_size=(-1, 0 if causal else -1), enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, Tensor)  # a tuple only where lse is requested
    return out


@lru_cache(maxsize=16)
def _bounds(n_tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([0, n_tokens], dtype=torch.int32, device=device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """torch's public attention, without the fallback that stores every score."""
    q_rows, k_rows, v_rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(
            q_rows, k_rows, v_rows, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out[0].transpose(0, 1)


PLAIN: dict[str, PlainKernel] = {
    "flash_attn_3": _flash3,
    "flash_attn_4": _flash4,
    "flash_attn": _flash2,
    "torch_varlen": _varlen,
    "cpu_flash": _sdpa,
    "explicit": _sdpa,
    "torch_sdpa": _sdpa,
}
