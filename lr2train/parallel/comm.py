"""Exchanges between ranks on any backend (nccl, gloo), with gradients where they pass through, and a count of bytes
sent.

Choice: the all-to-all is one autograd function whose backward is its transpose. Everything is written over the
torch.distributed calls that both nccl and gloo have, so CPU processes test the code that runs on the cluster. Cost:
tensors are laid out in rank order before and after the exchange, a copy on each side unless the exchanged dim already
leads. A group of one rank, or no torch.distributed at all, costs nothing.

Bytes are counted by the sender; a rank's own part of an exchange is no traffic. The count follows a graph into its
backward, on any thread, because each autograd function keeps the counter of its forward.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Counts = Counter[str]
"""Bytes sent by this rank, by name of the collective: all_to_all | send."""

_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


@contextlib.contextmanager
def counting(counts: Counts | None = None) -> Iterator[Counts]:
    """Count the bytes that this rank sends inside the block, and in the backward of graphs that were built inside the
    block.

        with counting() as sent:
            …
        sent["all_to_all"]

    ``counts`` is a counter to go on with. Trap: a forward that activation checkpointing runs again in the backward is
    counted only while the block is open.
    """
    counts = Counter() if counts is None else counts
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def counter() -> Counts | None:
    """The counter in force. An autograd function keeps it in its forward, for ``resume`` in its backward."""
    return _counts.get()


def resume(counts: Counts | None) -> contextlib.AbstractContextManager[Any]:
    """Go on counting in ``counts``; None does nothing."""
    return contextlib.nullcontext() if counts is None else counting(counts)


def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Send part r of ``x`` along ``scatter_dim`` to rank r, and join the received parts along ``gather_dim`` in order
    of rank.

    With P ranks, [.., S, .., G, ..] becomes [.., S / P, .., P G, ..]. The backward is the same exchange with the two
    dims swapped. Dims are non-negative. Every rank sends (P - 1) / P of x.
    """
    return x if _size(group) == 1 else _AllToAll.apply(x, scatter_dim, gather_dim, group)


class Transfer(NamedTuple):
    """Contiguous tensors to send to one peer or to receive from it, and the peer's rank inside the group."""

    peer: int
    tensors: Sequence[Tensor]


def transfer(send: Transfer, receive: Transfer, group: dist.ProcessGroup | None, tag: int) -> list[dist.Work]:
    """Start sending to one peer and receiving from another. Wait for the returned works before touching any tensor.

    Both sides skip empty tensors, and post the others in the same order under the same ``tag``. No gradient passes.
    """
    operations = []
    for call, side in ((dist.isend, send), (dist.irecv, receive)):
        full = [x for x in side.tensors if x.numel()]
        operations += [dist.P2POp(call, x, group=group, tag=tag, group_peer=side.peer) for x in full]
    _count("send", sum(x.nbytes for x in send.tensors))
    return dist.batch_isend_irecv(operations) if operations else []


def exchange_rows(
    x: Tensor,
    sent: Sequence[int],
    into: Tensor,
    received: Sequence[int],
    group: dist.ProcessGroup | None,
) -> dist.Work:
    """Start an all-to-all of uneven parts. Wait for the returned work before reading ``into`` or writing ``x``.

    The first sent[0] rows of ``x`` go to rank 0, the next sent[1] rows to rank 1, …. ``into`` gets received[0] rows
    from rank 0, received[1] rows from rank 1, …. This rank's own entries are 0. Both tensors are contiguous. No
    gradient passes.
    """
    assert len(x) == sum(sent), f"{len(x)} rows to send, {sum(sent)} promised"
    assert len(into) == sum(received), f"room for {len(into)} rows, {sum(received)} promised"
    work = dist.all_to_all_single(into, x, list(received), list(sent), group=group, async_op=True)
    assert work is not None  # this rank is in the group
    _count("all_to_all", x.nbytes)
    return work


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``. The host does not wait until the device has done its earlier work.

    Trap: ``x.to(device)`` alone waits, because the copy reads memory that the host may change. Page-locked memory is
    handed to the device with the copy.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _AllToAll(torch.autograd.Function):
    """``all_to_all``. Linear, so its backward is its transpose: the exchange with the two dims swapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
        """[.., S, .., G, ..] -> [.., S / P, .., P G, ..] among P ranks."""
        ctx.exchange_back, ctx.counts = (gather_dim, scatter_dim, group), counter()
        return _exchange(x, scatter_dim, gather_dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Gradient of the output [.., S / P, .., P G, ..] -> gradient of the input [.., S, .., G, ..]."""
        with resume(ctx.counts):
            return _exchange(grad, *ctx.exchange_back), None, None, None


def _exchange(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
    size = _size(group)
    assert x.shape[scatter_dim] % size == 0, f"dim {scatter_dim} of {tuple(x.shape)} does not divide among {size} ranks"
    send = x.unflatten(scatter_dim, (size, -1)).movedim(scatter_dim, 0).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)  # a list of tensors (dist.all_to_all) does not exist on gloo
    _count("all_to_all", x.nbytes // size * (size - 1))
    return received.movedim(0, gather_dim).flatten(gather_dim, gather_dim + 1)


def _count(collective: str, n_bytes: int) -> None:
    counts = _counts.get()
    if counts is not None:
        counts[collective] += n_bytes


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
