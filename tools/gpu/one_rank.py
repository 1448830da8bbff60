"""One rank of a sequence-parallel group, alone in a process; it receives what it sends.

Choice: torch's fake process group, whose collectives return at once, so that groups have their size and every line
around an exchange runs,
copies included. The fake group leaves what it "receives" unwritten; here it is filled with what the rank sends, because
a kernel fed with
NaN or zeros draws less power and runs faster than one fed with numbers. Cost: results mean nothing and the wire costs a
copy in memory;
what ranks compute together is checked by ``tools.gpu.simulation`` and by real processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lr2train.parallel.mesh import Mesh, make_mesh


@contextlib.contextmanager
def one_rank(rank: int, sp: int, ring: int = 1) -> Iterator[Mesh]:
    """The mesh of rank ``rank`` of ``sp`` ranks, ``ring`` of them on the ring axis; no process group may be open."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sp)
    try:
        with (
            mock.patch.object(dist, "all_to_all_single", _all_to_all_single),
            mock.patch.object(dist, "batch_isend_irecv", _batch_isend_irecv),
        ):
            yield make_mesh(sp, ring=ring)
    finally:
        dist.destroy_process_group()


class _Finished:
    """A handle of a finished exchange."""

    def wait(self) -> bool:
        return True


def _all_to_all_single(output: Tensor, input: Tensor, *_: Any, async_op: bool = False, **__: Any) -> _Finished | None:
    _echo(output, [input])
    return _Finished() if async_op else None


def _batch_isend_irecv(operations: Sequence[dist.P2POp]) -> list[_Finished]:
    sent = [operation.tensor for operation in operations if operation.op is dist.isend]
    arriving = [operation.tensor for operation in operations if operation.op is dist.irecv]
    for i, into in enumerate(arriving):
        _echo(into, sent[i:] + sent[:i])
    return [_Finished()]


@torch.no_grad()
def _echo(into: Tensor, sources: Sequence[Tensor]) -> None:
    """Fill ``into`` with repetitions of the first source that is not empty; with noise where all are empty."""
    source = next((source.reshape(-1) for source in sources if source.numel()), None)
    if source is None:
        into.normal_()
        return
    assert into.is_contiguous(), "receive buffers are contiguous"
    flat = into.view(-1)
    for start in range(0, len(flat), len(source)):
        part = flat[start : start + len(source)]
        part.copy_(source[: len(part)])
