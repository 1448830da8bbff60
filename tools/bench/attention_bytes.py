"""Bytes that a rank sends for one attention layer at 128k: each strategy's formula beside the bytes of its code.

Every rank of 8, 16 and 64 runs alone over torch's fake process group (``gpu.one_rank``), on the whole segment. Heads
have size 1 and the kernel computes nothing, so the counted bytes times the head size are exactly the model's bytes. Two
counts must equal ``Strategy.traffic``: arguments of calls into torch.distributed, and ``comm.counting``. For one
document, the closed form of the strategy's docstring must agree too. The table shows the rank that sends most.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from lr2train.attention import gather, kernel, ring
from lr2train.attention.blocks import Queries
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork, Traffic
from lr2train.attention.tiles import Spans
from lr2train.config import UserError
from lr2train.parallel.comm import counting
from tools.bench.figures import Figure
from tools.gpu.one_rank import one_rank

T = 131072
RINGS = {8: 2, 16: 2, 64: 8}  # sp -> ranks on the ring axis of ulysses_ring
MODELS = {"llama3_8b": (32, 8, 128), "phi3_mini": (32, 32, 96)}
NAMES = ("local", "ulysses", "ring", "gather", "ulysses_ring")
MIB = 2**20


class TrafficRow(NamedTuple):
    """A row of the table. ``most``: the rank that sends most; ``off``: bytes between counts and formula, all ranks."""

    model: str
    documents: str
    sp: int
    name: str
    most: Traffic
    off: int


def measure(quick: bool) -> Iterator[Figure]:
    """Print the table; figures are the bytes of each row, and bytes between counts and formulas (quick: 8 ranks)."""
    torch.set_num_threads(1)
    cases = [case for sp in ((8,) if quick else RINGS) for model in MODELS for case in _cases(model, sp)]
    print(
        f"{'model':12}{'documents':12}{'ranks':>6} "
        f"{'strategy':14}{'forward MiB':>12}{'backward MiB':>13}{'counted - formula':>19}"
    )
    for case in cases:
        forward, backward = (x / MIB for x in case.most)
        print(
            f"{case.model:12}{case.documents:12}{case.sp:6} {case.name:14}{forward:12.1f}{backward:13.1f}{case.off:19}"
        )
    for case in cases:
        yield Figure(f"mib_{case.model}_{case.documents}_{case.sp}_ranks_{case.name}", case.most.total / MIB)
    yield Figure("local_sends_bytes", sum(case.most.total for case in cases if case.name == "local"), at_most=0)
    yield Figure("rows", len(cases))
    yield Figure("counted_minus_formula_bytes", sum(case.off for case in cases), at_most=0)


def _cases(model: str, sp: int) -> Iterator[TrafficRow]:
    n_heads, n_kv_heads, head_size = MODELS[model]
    for documents, spans in (("one", ((0, T),)), ("packed", _packed()), ("aligned", _aligned(sp))):
        for name in NAMES:
            work = SegmentWork(PackedSegment(spans, T, sp, RINGS[sp]), n_heads, n_kv_heads, head_size)
            with contextlib.suppress(UserError):  # what a strategy cannot serve has no row
                STRATEGIES[name].refuse(work)
                off = sum(_off(name, work, rank, documents == "one") for rank in range(sp))
                yield TrafficRow(model, documents, sp, name, STRATEGIES[name].bytes_sent(work), off)


def _packed() -> Spans:
    """Documents of 200 to 40k tokens that cross borders of sequence shards; two lengths are odd."""
    lengths = (2560, 40961, 3583, 15872, 200, 5432, 26624, 9728, 23552, 2560)
    assert sum(lengths) == T
    return tuple(pairwise([0, *accumulate(lengths)]))


def _aligned(sp: int) -> Spans:
    """One document per sequence shard."""
    return tuple((rank * T // sp, (rank + 1) * T // sp) for rank in range(sp))


def _off(name: str, work: SegmentWork, rank: int, one_span: bool) -> int:
    """How many bytes the formula, its closed form and the two counts differ by, for one rank."""
    formula = STRATEGIES[name].traffic(work, rank)
    counts = [formula, *_counted(name, work, rank)]
    if one_span and name in CLOSED_FORMS:
        counts.append(CLOSED_FORMS[name](work, rank))
    return sum(abs(count.forward - formula.forward) + abs(count.backward - formula.backward) for count in counts)


def _counted(name: str, work: SegmentWork, rank: int) -> tuple[Traffic, Traffic]:
    """What one rank sends by the arguments of torch.distributed's calls, and by ``comm.counting``; times the size of a
    head.
    """
    segment, size = work.segment, work.head_size
    heads = (work.n_heads, work.n_kv_heads, work.n_kv_heads)
    q, k, v = (torch.zeros(segment.shard_tokens, n, 1, dtype=torch.bfloat16, requires_grad=True) for n in heads)
    with _idle_kernel(), one_rank(rank, segment.sp, segment.ring) as mesh, _watching(rank) as wire, counting() as sent:
        out = STRATEGIES[name].prepare(segment, mesh, None)(q, k, v, 1.0)
        forward = sum(wire), sum(sent.values())
        out.sum().backward()
    backward = sum(wire) - forward[0], sum(sent.values()) - forward[1]
    return Traffic(forward[0] * size, backward[0] * size), Traffic(forward[1] * size, backward[1] * size)


def _idle_kernel() -> Any:
    """Attention blocks return zeros of the right shapes; the bytes sent do not depend on values."""

    def forward(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    def backward(queries: Queries, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(queries.q), torch.zeros_like(k), torch.zeros_like(v)

    stack = contextlib.ExitStack()
    for module in (kernel, ring, gather):
        stack.enter_context(mock.patch.multiple(module, forward_block=forward, backward_block=backward))
    return stack


@contextlib.contextmanager
def _watching(rank: int) -> Iterator[list[int]]:
    """Bytes that leave this rank, by the arguments of each call."""
    sizes: list[int] = []
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def watch_all_to_all(
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Any = None,
        input_splits: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        me, size = dist.get_rank(options["group"]), dist.get_world_size(options["group"])
        rows = list(input_splits) if input_splits is not None else [len(input) // size] * size
        sizes.extend(n * input[:1].nbytes for to, n in enumerate(rows) if to != me)
        return all_to_all_single(output, input, output_splits, input_splits, **options)

    def watch_transfers(operations: Sequence[dist.P2POp]) -> Any:
        sizes.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch_isend_irecv(list(operations))

    with (
        mock.patch.object(dist, "all_to_all_single", watch_all_to_all),
        mock.patch.object(dist, "batch_isend_irecv", watch_transfers),
    ):
        yield sizes


# ---- closed forms for one document, from the strategies' docstrings ----


def _ulysses(work: SegmentWork, rank: int) -> Traffic:
    elements = (
        work.segment.shard_tokens * work.head_size * (2 * work.n_heads + 2 * math.lcm(work.n_kv_heads, work.segment.sp))
    )
    sent = elements * work.bytes_per_element * (work.segment.sp - 1) // work.segment.sp
    return Traffic(sent, sent)


def _ring(work: SegmentWork, rank: int) -> Traffic:
    block = (
        2 * work.n_kv_heads * work.head_size * work.bytes_per_element * work.segment.n_tokens // (2 * work.segment.sp)
    )
    return Traffic(block * (work.segment.sp - 1 + rank), block * 3 * (work.segment.sp - 1))


def _gather(work: SegmentWork, rank: int) -> Traffic:
    shard = 2 * work.n_kv_heads * work.head_size * work.bytes_per_element * work.segment.shard_tokens
    return Traffic(shard * (work.segment.sp - 1 - rank), shard * (work.segment.sp - 1))


CLOSED_FORMS: dict[str, Callable[[SegmentWork, int], Traffic]] = {"ulysses": _ulysses, "ring": _ring, "gather": _gather}
