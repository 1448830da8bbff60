"""Collectives that gradients pass through, on any backend (nccl, gloo).

Choice: each collective is one autograd function whose backward is its transpose, written over the torch.distributed calls that both nccl
and gloo have; so what is tested on CPU processes is what runs on the cluster. Cost: the tensors are laid out in rank order before and after
the exchange, a copy on each side unless the exchanged dim already leads. A group of one rank, or no torch.distributed at all, costs
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Cut ``x`` in equal parts along ``scatter_dim``, send part r to rank r, and join what arrives along ``gather_dim`` in order of rank.

    With P ranks, [.., S, .., G, ..] becomes [.., S / P, .., P G, ..]. Backward is the same exchange with the two dims swapped. Dims are
    non-negative. Every rank sends (P - 1) / P of x.
    """
    return x if _size(group) == 1 else _AllToAll.apply(x, scatter_dim, gather_dim, group)


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Join every rank's ``x`` (equal shapes) along ``dim`` in order of rank.

    Backward is a reduce-scatter: the gradient of a rank's part is the sum over ranks of their gradients for it, because each rank used its
    own copy.
    """
    return x if _size(group) == 1 else _AllGather.apply(x, dim, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.exchange_back = (gather_dim, scatter_dim, group)
        return _exchange(x, scatter_dim, gather_dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, *ctx.exchange_back), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        parts = [part.contiguous() for part in grad.chunk(_size(ctx.group), ctx.dim)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None, None


def _exchange(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
    size = _size(group)
    assert x.shape[scatter_dim] % size == 0, f"dim {scatter_dim} of {tuple(x.shape)} does not divide among {size} ranks"
    send = x.unflatten(scatter_dim, (size, -1)).movedim(scatter_dim, 0).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)  # a list of tensors (dist.all_to_all) does not exist on gloo
    return received.movedim(0, gather_dim).flatten(gather_dim, gather_dim + 1)


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
