"""Rounding error of bf16 attention on 2, 4 and 8 ranks over the error on one rank.

The ranks run one after another in this process (``tools.gpu.simulation``), on the kernel of the device at hand; the
reference is the same
attention on one rank in float64. A ring merges as many partial results as it has ranks; because it does so in fp32 and
rounds once, its
error must not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from tools.bench.figures import Figure
from tools.gpu.simulation import LayerInputs, alone, simulate

AT_MOST = 1.5
GRADIENTS = ("out", "dq", "dk", "dv")


def measure(quick: bool) -> Iterator[Figure]:
    """The largest ratio over the four tensors, by strategy, ranks and documents (quick: a shorter segment)."""
    n_tokens = 512 if quick else 4096
    for documents, spans in (("one", ((0, n_tokens),)), ("packed", _packed(n_tokens))):
        segment, exact = _segment(n_tokens, spans)
        one = _errors(segment, 1, "", exact)
        print(
            f"{documents}: error of one rank "
            + ", ".join(f"{name} {error:.2e}" for name, error in zip(GRADIENTS, one, strict=True))
        )
        for name in ("ulysses", "ring", "gather", "ulysses_ring"):
            for sp in (2, 4, 8):
                ratio = max(many / alone_ for many, alone_ in zip(_errors(segment, sp, name, exact), one, strict=True))
                yield Figure(f"error_{documents}_{name}_{sp}_ranks_over_one", ratio, at_most=AT_MOST)


def _packed(n_tokens: int) -> tuple[tuple[int, int], ...]:
    borders = [0, n_tokens // 9, n_tokens // 3, n_tokens // 2 + 3, n_tokens]
    return tuple(pairwise(borders))


def _segment(n_tokens: int, spans: tuple[tuple[int, int], ...]) -> tuple[LayerInputs, list[torch.Tensor]]:
    """Inputs in bf16, and (out, dq, dk, dv) of those inputs in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (torch.randn(n_tokens, heads, 64, generator=generator).bfloat16() for heads in (8, 4, 4, 8))
    segment = LayerInputs(q, k, v, grad_out, spans, 64**-0.5)
    return segment, list(alone(replace(segment, q=q.double(), k=k.double(), v=v.double(), grad_out=grad_out.double())))


def _errors(segment: LayerInputs, sp: int, name: str, exact: list[torch.Tensor]) -> list[float]:
    result = alone(segment) if sp == 1 else simulate(name, segment, sp, rings=2)
    return [
        float(((a.double() - b).square().mean() / b.square().mean()).sqrt()) for a, b in zip(result, exact, strict=True)
    ]
