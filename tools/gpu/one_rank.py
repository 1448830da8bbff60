"""One rank of many, alone in a process: the strategies' own code runs, and what would arrive from others is what the rank sends itself.

Choice: torch's fake process group, whose collectives return at once, so that groups have their size and every line around an exchange runs,
copies included. The fake group leaves what it "receives" unwritten; here it is filled with what the rank sends, because a kernel fed with
NaN or zeros draws less power and runs faster than one fed with numbers. Cost: results mean nothing and the wire costs a copy in memory;
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
    """The mesh of rank ``rank`` of ``sp``, ``ring`` of them on the ring axis; no process group may be open."""
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


class _Done:
    """What a caller waits for."""

    def wait(self) -> bool:
        return True


def _all_to_all_single(output: Tensor, input: Tensor, *_: Any, async_op: bool = False, **__: Any) -> _Done | None:
    _echo(output, [input])
    return _Done() if async_op else None


def _batch_isend_irecv(operations: Sequence[dist.P2POp]) -> list[_Done]:
    sent = [operation.tensor for operation in operations if operation.op is dist.isend]
    arriving = [operation.tensor for operation in operations if operation.op is dist.irecv]
    for i, into in enumerate(arriving):
        _echo(into, sent[i:] + sent[:i])
    return [_Done()]


@torch.no_grad()
def _echo(into: Tensor, sources: Sequence[Tensor]) -> None:
    """Fill ``into`` with the first source, from its beginning again where it is shorter; with noise where there is nothing to repeat."""
    source = next((source.reshape(-1) for source in sources if source.numel()), None)
    if source is None:
        into.normal_()
        return
    assert into.is_contiguous(), "what is received lies in a row"
    flat = into.view(-1)
    for start in range(0, len(flat), len(source)):
        part = flat[start : start + len(source)]
        part.copy_(source[: len(part)])
