"""Collectives on any backend (nccl, gloo), those that gradients pass through, and a count of what is sent.

Choice: each collective is one autograd function whose backward is its transpose, written over the torch.distributed calls that both nccl
and gloo have; so what is tested on CPU processes is what runs on the cluster. Cost: the tensors are laid out in rank order before and after
the exchange, a copy on each side unless the exchanged dim already leads. A group of one rank, or no torch.distributed at all, costs
nothing.

Bytes are counted where they leave: a rank's own part of an exchange is no traffic. The count follows a graph into its backward, whichever
thread that runs on, because each function keeps the counter of its forward.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lr2train.config import UserError

Counts = Counter[str]
"""Bytes sent by this rank, by name of the collective: all_to_all | all_gather | reduce_scatter | send."""

_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)
_AGREED = 16  # integers of one comparison: it is one collective of fixed size, so that ranks of unlike batches still meet in it


@contextlib.contextmanager
def counting(counts: Counts | None = None) -> Iterator[Counts]:
    """Count the bytes that this rank sends through this module inside the block, and in the backward of what was computed in it.

    with counting() as sent: … ; sent["all_to_all"]. ``counts``: a counter to go on with. A forward that activation checkpointing runs again
    in the backward is counted only while the block is open.
    """
    counts = Counter() if counts is None else counts
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def counter() -> Counts | None:
    """The counter in force: what an autograd function keeps of its forward, to hand to ``resume`` in its backward."""
    return _counts.get()


def resume(counts: Counts | None) -> contextlib.AbstractContextManager[Any]:
    """Count on in ``counts``; nothing when nobody counts."""
    return contextlib.nullcontext() if counts is None else counting(counts)


def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Cut ``x`` in equal parts along ``scatter_dim``, send part r to rank r, and join what arrives along ``gather_dim`` in order of rank.

    With P ranks, [.., S, .., G, ..] becomes [.., S / P, .., P G, ..]. Backward is the same exchange with the two dims swapped. Dims are
    non-negative. Every rank sends (P - 1) / P of x.
    """
    return x if _size(group) == 1 else _AllToAll.apply(x, scatter_dim, gather_dim, group)


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Join every rank's ``x`` (equal shapes) along ``dim`` in order of rank.

    Backward is a reduce-scatter: the gradient of a rank's part is the sum over ranks of their gradients for it, because each rank used its
    own copy. Every rank sends (P - 1) times x, forward and backward.
    """
    return x if _size(group) == 1 else _AllGather.apply(x, dim, group)


def agree(values: Mapping[str, int | str], group: dist.ProcessGroup | None, what: str) -> None:
    """Raise UserError on every rank of ``group`` when the ranks do not all hold the same ``values``; one small collective.

    ``values`` are at most 15 named integers or strings (strings are compared by their crc32). The sentence names the values that differ
    and who holds which. Call it where ranks meet before a step, not in a layer: on CUDA it waits for the device.
    """
    if _size(group) == 1:
        return
    assert len(values) < _AGREED, f"{len(values)} values to agree on; the comparison has room for {_AGREED - 1}"
    numbers = [zlib.crc32(value.encode()) if isinstance(value, str) else value for value in values.values()]
    names = zlib.crc32("\0".join(values).encode())
    mine = torch.tensor([names, *numbers, *[0] * (_AGREED - 1 - len(numbers))], device=_device(group))
    held = [torch.empty_like(mine) for _ in range(_size(group))]
    dist.all_gather(held, mine, group=group)
    if any(not torch.equal(other, held[0]) for other in held):
        raise UserError(_disagreement(list(values), torch.stack(held).tolist(), group, what))


class Transfer(NamedTuple):
    """What one rank sends to another, or receives from it: contiguous tensors and the peer's rank inside the group."""

    peer: int
    tensors: Sequence[Tensor]


def transfer(send: Transfer, receive: Transfer, group: dist.ProcessGroup | None, tag: int) -> list[dist.Work]:
    """Start sending to one peer and receiving from another; wait for what is returned before touching any of the tensors.

    Both sides skip empty tensors, and post what they post in the same order under the same ``tag``. No gradient passes.
    """
    operations = [dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=send.peer) for x in send.tensors if x.numel()]
    operations += [dist.P2POp(dist.irecv, x, group=group, tag=tag, group_peer=receive.peer) for x in receive.tensors if x.numel()]
    _count("send", sum(x.nbytes for x in send.tensors))
    return dist.batch_isend_irecv(operations) if operations else []


def exchange_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work]:
    """Start an all-to-all of uneven parts: the first sent[0] rows of ``x`` go to rank 0, the next sent[1] to rank 1, ….

    Returns the tensor that received[0] rows from rank 0, received[1] from rank 1, … will lie in, and what to wait for before reading it or
    writing ``x``. No gradient passes. This rank's own entries are 0.
    """
    assert len(x) == sum(sent), f"{len(x)} rows to send, {sum(sent)} promised"
    into = x.new_empty(sum(received), *x.shape[1:])
    work = dist.all_to_all_single(into, x, list(received), list(sent), group=group, async_op=True)
    assert work is not None  # this rank is in the group
    _count("all_to_all", x.nbytes)
    return into, work


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.exchange_back, ctx.counts = (gather_dim, scatter_dim, group), counter()
        return _exchange(x, scatter_dim, gather_dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        with resume(ctx.counts):
            return _exchange(grad, *ctx.exchange_back), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dim, ctx.group, ctx.counts = dim, group, counter()
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        _count("all_gather", x.nbytes * (_size(group) - 1))
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        parts = [part.contiguous() for part in grad.chunk(_size(ctx.group), ctx.dim)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        with resume(ctx.counts):
            _count("reduce_scatter", mine.nbytes * (len(parts) - 1))
        return mine, None, None


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


def _disagreement(names: list[str], held: list[list[int]], group: dist.ProcessGroup | None, what: str) -> str:
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    differing = []
    for column, name in enumerate(["its fields", *names]):
        first_holder = {row[column]: rank for rank, row in reversed(list(zip(ranks, held, strict=True)))}
        if len(first_holder) > 1:
            differing.append(
                f"{name} ({', '.join(f'{value} on rank {rank}' for value, rank in sorted(first_holder.items(), key=_second))})"
            )
    return f"ranks that share {what} disagree on {'; '.join(differing)}; every rank must be started with the same config and data"


def _second(item: tuple[int, int]) -> int:
    return item[1]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
