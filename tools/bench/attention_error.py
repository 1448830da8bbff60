"""Rounding error of bf16 attention on 2, 4 and 8 ranks over the error on one rank.

Errors are root mean squares of out, dq, dk and dv against one rank in float64. Ranks run one after another in this
process (``attention.simulation``), on the device's kernel. A ring merges one partial result per rank in fp32 and rounds
once, so its error must not grow with the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from lr2train.attention.simulation import Segment, alone, simulate
from tools.bench.figures import Figure

AT_MOST = 1.5
GRADIENTS = ("out", "dq", "dk", "dv")


def measure(quick: bool) -> Iterator[Figure]:
    """The largest ratio over the four tensors, by strategy, ranks and documents (quick: a shorter segment)."""
    n_tokens = 512 if quick else 4096
    for documents, spans in (("one", ((0, n_tokens),)), ("packed", _packed(n_tokens))):
        segment, exact = _segment(n_tokens, spans)
        one = _errors(segment, 1, "", exact)
        print(f"{documents}: error of one rank " + ", ".join(f"{name} {error:.2e}" for name, error in zip(GRADIENTS, one, strict=True)))
        for name in ("ulysses", "ring", "gather", "ulysses_ring"):
            for sp in (2, 4, 8):
                ratio = max(many / alone_ for many, alone_ in zip(_errors(segment, sp, name, exact), one, strict=True))
                yield Figure(f"error_{documents}_{name}_{sp}_ranks_over_one", ratio, at_most=AT_MOST)


def _packed(n_tokens: int) -> tuple[tuple[int, int], ...]:
    borders = [0, n_tokens // 9, n_tokens // 3, n_tokens // 2 + 3, n_tokens]
    return tuple(pairwise(borders))


def _segment(n_tokens: int, spans: tuple[tuple[int, int], ...]) -> tuple[Segment, list[torch.Tensor]]:
    """A segment in bf16, and its (out, dq, dk, dv) in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (torch.randn(n_tokens, heads, 64, generator=generator).bfloat16() for heads in (8, 4, 4, 8))
    segment = Segment(q, k, v, grad_out, spans, 64**-0.5)
    return segment, list(alone(replace(segment, q=q.double(), k=k.double(), v=v.double(), grad_out=grad_out.double())))


def _errors(segment: Segment, sp: int, name: str, exact: list[torch.Tensor]) -> list[float]:
    result = alone(segment) if sp == 1 else simulate(name, segment, sp, rings=2)
    return [float(((a.double() - b).square().mean() / b.square().mean()).sqrt()) for a, b in zip(result, exact, strict=True)]
