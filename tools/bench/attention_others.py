"""Attention of two CPU ranks: our strategies beside DeepSpeed's and axolotl-ringmaster's, with one kernel in all.

A case is forward and backward of attention alone over one causal document, each rank's shard as the library wants it,
in float32. All call torch's flash kernel for CPUs, ours through ``attention.kernel``. Others:

- ``deepspeed``: ``deepspeed.sequence.layer.DistributedAttention`` (Ulysses), beside our ``ulysses``;
- ``ringmaster_ulysses``: its ``make_ulysses_attention``. On gloo it gathers everything instead of exchanging parts, so
  the benchmark lets it take its path for NCCL;
- ``ringmaster_ring``: its ``ZigzagRingAttention``, beside our ``ring``. It asks for CUDA and flash-attn's operators.
  The benchmark hands it tensors that say so, and operators of that form over the CPU kernel. Its code is unchanged.

axolotl-ringmaster is no dependency: where it is not installed (``pip install --no-deps axolotl-ringmaster``), its cases
are left out and the output says so. All results are compared with ours. Cases of one kind run in turn; a figure is the
median over rounds of our time over the mean of the other's right before and right after, by wall-clock time of the
slower rank and by CPU time of both ranks. Bounds allow for the noise of ``attention_overhead``. Bytes are those that
leave the busiest rank in a forward and a backward, by the arguments of each call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench.attention_overhead import MEASURES, RANKS, Seconds, _half_width, _seconds
from tools.bench.figures import Figure, on_ranks

HEADS, KV_HEADS, HEAD_SIZE = 8, 4, 64
SCALE = HEAD_SIZE**-0.5
RINGMASTER = importlib.util.find_spec("ringmaster") is not None

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [T/2, Hq, D], k and v [T/2, Hkv, D] -> [T/2, Hq, D]."""


class Case(NamedTuple):
    """An attention, the layout of its shards, and the strategy of ours that it stands beside (its own for ours)."""

    attention: Attention
    layout: str
    beside: str


class Taken(NamedTuple):
    """What one case took: for each round (ours before, the case, ours after) in seconds; bytes that the busiest rank
    sent.
    """

    rounds: list[tuple[Seconds, Seconds, Seconds]]
    sent: int


def measure(quick: bool) -> Iterable[Figure]:
    """Our time over the other's, noise, and bytes sent."""
    n_tokens, rounds = (512, 6) if quick else (2048, 12)
    if not RINGMASTER:
        print("NOT MEASURED: axolotl-ringmaster is not installed")
    taken: dict[str, Taken] = on_ranks(_rank, RANKS, n_tokens, rounds)
    for index, by in enumerate(MEASURES):
        for name, (rows, _) in taken.items():
            ratios = [(before[index] + after[index]) / 2 / own[index] for before, own, after in rows]
            drift = statistics.median(after[index] / before[index] for before, _, after in rows)
            noise = abs(drift - 1) + _half_width(ratios)
            yield Figure(f"noise_{name}_{by}", noise)
            bound = None if name in ("ulysses", "ring") else 1 + noise
            yield Figure(f"ours_over_{name}_{by}", statistics.median(ratios), at_most=bound)
    for name, (_, sent) in taken.items():
        yield Figure(f"mib_sent_{name}", sent / 2**20)


def _rank(rank: int, folder: Path, n_tokens: int, rounds: int, queue: Any) -> None:
    from lr2train.training.deepspeed.start import start_deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    start_deepspeed(torch.device("cpu"))
    with contextlib.ExitStack() as shims:
        cases = _cases(n_tokens, shims)
        steps = {name: _step(case, n_tokens) for name, case in cases.items()}
        _refuse_others(cases, steps)
        taken = {name: Taken([], _sent(steps[name])) for name in cases}
        for name, case in cases.items():
            before = _seconds(steps[case.beside])
            for _ in range(rounds):
                own, after = _seconds(steps[name]), _seconds(steps[case.beside])
                taken[name].rounds.append((before, own, after))
                before = after
    if rank == 0:
        queue.put(taken)
    dist.barrier()
    dist.destroy_process_group()


def _step(case: Case, n_tokens: int) -> Callable[[], list[Tensor]]:
    """Forward and backward; the outputs and gradients of this rank's shard."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(n_tokens, n, HEAD_SIZE, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    layout = _segment(n_tokens).layout(case.layout, dist.get_rank())
    *inputs, grad = (layout.shard(x, 0).contiguous() for x in whole)
    for x in inputs:
        x.requires_grad_()

    def step() -> list[Tensor]:
        out = case.attention(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return step


def _segment(n_tokens: int) -> Any:
    from lr2train.attention.strategy import PackedSegment

    return PackedSegment(((0, n_tokens),), n_tokens, RANKS)


def _refuse_others(cases: dict[str, Case], steps: dict[str, Callable[[], list[Tensor]]]) -> None:
    """All of one layout compute the same; raises AssertionError where one does not."""
    for name, case in cases.items():
        for found, wanted in zip(steps[name](), steps[case.beside](), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, of=name: f"{of}: {text}")


def _cases(n_tokens: int, shims: contextlib.ExitStack) -> dict[str, Case]:
    from lr2train.attention.strategies import STRATEGIES
    from lr2train.parallel.mesh import make_mesh

    mesh, segment = make_mesh(RANKS), _segment(n_tokens)

    def ours(name: str) -> Case:
        attention = STRATEGIES[name].prepare(segment, mesh, None)
        return Case(lambda q, k, v: attention(q, k, v, SCALE), STRATEGIES[name].layout_kind, name)

    cases = {"ulysses": ours("ulysses"), "ring": ours("ring"), "deepspeed": _deepspeed(mesh.sp_group)}
    if RINGMASTER:
        cases |= {
            "ringmaster_ulysses": _ringmaster_ulysses(mesh.sp_group, shims),
            "ringmaster_ring": _ringmaster_ring(mesh.sp_group, shims),
        }
    return cases


# ---- the others ----

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole sequences, [B, T, H, D]: our kernel."""
    from lr2train.attention.kernel import attend

    return attend(q[0], k[0], v[0], ((0, q.shape[1]),), SCALE)[0][None]


def _deepspeed(group: Any) -> Case:
    from deepspeed.sequence.layer import DistributedAttention

    attention = DistributedAttention(_local, group, scatter_idx=2, gather_idx=1)  # type: ignore[arg-type]
    return Case(lambda q, k, v: attention(q[None], k[None], v[None], 0)[0], "contiguous", "ulysses")


def _ringmaster_ulysses(group: Any, shims: contextlib.ExitStack) -> Case:
    from ringmaster import comm  # type: ignore[import-not-found]
    from ringmaster.strategies import ulysses  # type: ignore[import-not-found]

    def inner(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _local(*(x.transpose(1, 2) for x in (q, k, v))), None

    runtime = SimpleNamespace(ulysses_group=group, varlen=None)
    shims.enter_context(mock.patch.object(comm, "dist", _SaysNccl()))
    shims.enter_context(mock.patch.object(ulysses, "_resolve_inner", return_value=inner))
    shims.enter_context(mock.patch.object(ulysses, "get_runtime", return_value=runtime))
    attention, module = ulysses.make_ulysses_attention("bench"), torch.nn.Module()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attention(module, q, k, v, None, scaling=SCALE)[0][0]

    return Case(run, "contiguous", "ulysses")


class _SaysNccl:
    """``torch.distributed``, for a library that takes another path on gloo."""

    def get_backend(self, *_: Any) -> str:
        return "nccl"

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


class _OnCuda(Tensor):
    """A tensor that says that it is on CUDA; results of operations on it are plain tensors."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _ringmaster_ring(group: Any, shims: contextlib.ExitStack) -> Case:
    from ringmaster.ring import zigzag  # type: ignore[import-not-found]

    shims.enter_context(mock.patch.object(zigzag, "_flash_ops", return_value=(_dao_forward, _dao_backward)))

    class Ring(torch.autograd.Function):
        """Its forward, under a query that says it is on CUDA; and its backward."""

        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return zigzag.ZigzagRingAttention.forward(ctx, q.as_subclass(_OnCuda), k, v, group, SCALE)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return zigzag.ZigzagRingAttention.backward(ctx, grad)[:3]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Ring.apply(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0]

    return Case(run, "zigzag", "ring")


def _dao_forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, causal: bool, *_: Any) -> Any:
    """flash-attn's ``_flash_attn_forward``: [B, T, H, D] -> out, lse [B, H, T] and two that are not used."""
    out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)), dropout, causal, scale=scale)
    return out.transpose(1, 2), lse, None, None


def _dao_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor,
                  dv: Tensor, dropout: float, scale: float, causal: bool, *_: Any) -> None:  # fmt: skip
    """flash-attn's ``_flash_attn_backward``, which writes into dq, dk and dv."""
    given = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    for into, found in zip((dq, dk, dv), _flash_backward(*given, lse, dropout, causal, scale=scale), strict=True):
        into.copy_(found.transpose(1, 2))


# ---- bytes ----


def _sent(step: Callable[[], Any]) -> int:
    with _watching() as sizes:
        step()
    total = torch.tensor(sum(sizes))
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return int(total)


@contextlib.contextmanager
def _watching() -> Iterator[list[int]]:
    """Bytes that leave this rank in all-to-alls and in sends."""
    sizes: list[int] = []
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def exchange(output: Tensor, input: Tensor, *given: Any, **options: Any) -> Any:
        sizes.append(input.nbytes * (RANKS - 1) // RANKS)
        return all_to_all_single(output, input, *given, **options)

    def transfers(operations: list[dist.P2POp]) -> Any:
        sizes.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch_isend_irecv(operations)

    with (
        mock.patch.object(dist, "all_to_all_single", exchange),
        mock.patch.object(dist, "batch_isend_irecv", transfers),
    ):
        yield sizes
