"""Errors of attention kernels beside attention written out in float64: out, lse and gradients.

Kernels are called at several levels: whole segments, blocks, and strategies on simulated ranks.

The limit of an error comes from *plain attention*: the same expression written out in the kernel's dtype, with every
score, weight and gradient rounded. An error is the largest difference to float64. Its *ratio* divides by plain
attention's largest difference plus a fraction of a rounding of the largest value. Measure and limits are those of
FlashAttention's own tests (Dao, flash-attention, tests/test_flash_attn.py): 2 for out, 3 for gradients.

On simulated ranks, the error of the same kernel on one rank may exceed plain attention's. Then the divisor is the
one-rank error, up to twice the plain divisor. lse has no plain counterpart in bf16; its limit is absolute, in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lr2train.attention.blocks import Block, Queries
from lr2train.attention.kernel import attend, backward_block, forward_block, merge
from lr2train.attention.tiles import Spans, Tile
from tools.gpu.kernels import using
from tools.gpu.simulation import LayerInputs, alone, simulate

LIMITS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
LSE_LIMIT_NATS = 1e-3  # kernels sum in fp32; a score of 2^4 in fp32 is exact to 2^-19
_FLOOR = 1 / 8  # rounding units of the largest value (in fp32: 4); plain attention may have no error by luck

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)


class ParityCase(NamedTuple):
    """One input: (query, key) heads, head size, dtype, document spans of ``n_tokens``, a sliding window or None."""

    heads: tuple[int, int]
    head_size: int
    dtype: torch.dtype
    spans: Spans
    n_tokens: int
    sliding_window: int | None = None

    @property
    def title(self) -> str:
        """For the table."""
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.heads[0]}/{self.heads[1]} heads of {self.head_size}, {len(self.spans)} spans{window}"


@dataclass
class Row:
    """The worst errors of one kernel, level (rows, blocks, a strategy on ranks) and dtype."""

    kernel: str
    level: str
    dtype: str
    cases: int = 0
    ratios: dict[str, float] = field(default_factory=dict)  # of out, dq, dk, dv
    lse_nats: float = 0.0
    worst: str = ""
    error: str | None = None

    @property
    def passes(self) -> bool:
        """Whether all cases keep their limits; nan keeps none."""
        kept = all(self.ratios.get(name, float("nan")) <= limit for name, limit in LIMITS.items())
        return self.error is None and kept and self.lse_nats <= LSE_LIMIT_NATS

    def add(self, case: ParityCase, ratios: dict[str, float], lse_nats: float) -> None:
        """Add the errors of one case."""
        self.cases += 1
        for name, ratio in ratios.items():
            if not ratio <= max(self.ratios.values(), default=-1.0):  # nan is the worst
                self.worst = f"{name}: {case.title}"
            self.ratios[name] = _worse(self.ratios.get(name, 0.0), ratio)
        self.lse_nats = _worse(self.lse_nats, lse_nats)


Compute = Callable[[LayerInputs], "Answer"]


class Level(NamedTuple):
    """A way to call a kernel: its name, the call, simulated ranks, and whether every token belongs to a span."""

    name: str
    compute: Compute
    ranks: int = 1
    no_gaps: bool = True


class Answer(NamedTuple):
    """out [T, Hq, D], lse [T, Hq] (None where the level returns none), gradients of q, k and v."""

    out: Tensor
    lse: Tensor | None
    grads: Sequence[Tensor]


def check(kernels: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> Iterator[Row]:
    """A row for each kernel, level and dtype."""
    for name, dtype, level in itertools.product(kernels, dtypes, _levels(quick)):
        row = Row(name, level.name, str(dtype).removeprefix("torch."))
        with using(name):
            for case in _cases(dtype, quick, level):
                try:
                    row.add(case, *_compare(case, level, device))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a kernel that cannot run is a result; the check continues
                    row.error = f"{case.title}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    break
        yield row


def _levels(quick: bool) -> Iterable[Level]:
    yield Level("rows", attend_rows, no_gaps=False)
    yield Level("blocks", _blocks)
    for ranks in (4,) if quick else (2, 4, 8):
        for strategy in ("ulysses", "ring", "gather"):
            yield Level(f"{strategy} on {ranks}", _ranks(strategy, ranks, 1), ranks)
    yield Level("ulysses_ring on 2x2", _ranks("ulysses_ring", 4, 2), 4)


def _cases(dtype: torch.dtype, quick: bool, level: Level) -> Iterator[ParityCase]:
    n_tokens = 64 if quick else 512
    whole, packed = ((0, n_tokens),), _packed(n_tokens, level.no_gaps)
    head_sizes = ((40, 256) if quick else HEAD_SIZES) if level.ranks == 1 else (64,) if quick else (96, 128)
    for (n_heads, n_kv_heads), head_size in itertools.product(HEADS.values(), head_sizes):
        heads = math.lcm(n_heads, level.ranks), n_kv_heads  # as many as ulysses can share
        for spans, sliding_window in ((whole, None), (packed, None), (whole, n_tokens // 3), (packed, n_tokens // 7)):
            yield ParityCase(heads, head_size, dtype, spans, n_tokens, sliding_window)


def _packed(n_tokens: int, no_gaps: bool) -> Spans:
    """Documents of 1, 2, odd and many tokens that cross every border of sequence shards; a gap unless ``no_gaps``."""
    share = n_tokens // 8
    lengths = [1, 2, share - 1, share, share, 2 * share + 3]
    borders = [0, *itertools.accumulate(lengths), n_tokens]
    spans = tuple(itertools.pairwise(borders))
    return spans if no_gaps else (*spans[:2], *spans[3:])


def _compare(case: ParityCase, level: Level, device: torch.device) -> tuple[dict[str, float], float]:
    """Ratios of errors by tensor, and the largest error of lse in nats."""
    inputs = draw(case, device)
    exact, plain, ours = written_out(inputs, torch.float64), written_out(inputs, case.dtype), level.compute(inputs)
    one_rank = alone(inputs) if level.ranks > 1 else _tensors(plain)
    named = zip(LIMITS, _tensors(ours), _tensors(exact), _tensors(plain), one_rank, strict=True)
    ratios = {name: error_ratio(*tensors) for name, *tensors in named}
    return ratios, 0.0 if ours.lse is None else lse_error(ours.lse, exact.lse)


def _tensors(answer: Answer) -> tuple[Tensor, ...]:
    return answer.out, *answer.grads


def draw(case: ParityCase, device: torch.device) -> LayerInputs:
    """A segment of numbers that follow from the case alone."""
    generator = torch.Generator().manual_seed(case.head_size + case.heads[0])
    (n_heads, n_kv_heads), size = case.heads, case.head_size
    drawn = (
        torch.randn(case.n_tokens, heads, size, generator=generator)
        for heads in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    )
    q, k, v, grad_out = (x.to(device, case.dtype) for x in drawn)
    return LayerInputs(q, k, v, grad_out, case.spans, size**-0.5, case.sliding_window)


def error_ratio(x: Tensor, exact: Tensor, plain: Tensor, one_rank: Tensor, least: float = 0.0) -> float:
    """The largest error of ``x`` over the allowed error (see the module's docstring); nan where ``x`` holds nan.

    ``least`` is allowed in any case, as where ``x`` is a part of a larger tensor.
    """
    floor = max(_FLOOR * torch.finfo(plain.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    error, allowed, alone_error = ((other.double() - exact).abs().max().item() for other in (x, plain, one_rank))
    allowed += max(floor * exact.abs().max().item(), torch.finfo(torch.float32).tiny, least)
    return error / max(allowed, min(alone_error, 2 * allowed))


def lse_error(lse: Tensor, exact: Tensor | None) -> float:
    """The largest difference in nats; nan where other rows than the exact ones are -inf."""
    assert exact is not None
    inside = exact.isfinite()
    if not torch.equal(lse.isfinite(), inside):
        return float("nan")
    return (lse.double() - exact)[inside].abs().max().item()


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a


# ---- attention written out ----


def mask_of(spans: Spans, n_tokens: int, sliding_window: int | None) -> Tensor:
    """bool [T, T]: may query i look at key j."""
    document = torch.full((n_tokens,), -1)
    for number, (start, stop) in enumerate(spans):
        document[start:stop] = number
    i, j = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    mask = (document[:, None] == document[None]) & (document[:, None] >= 0) & (j <= i)
    return mask if sliding_window is None else mask & (i - j < sliding_window)


def written_out(inputs: LayerInputs, dtype: torch.dtype) -> Answer:
    """softmax(scale q k^T) v with an explicit mask, every step in ``dtype``; a token outside every span has out 0, lse
    -inf, gradient 0.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, readers = leaves[0], leaves[0].shape[1] // leaves[1].shape[1]
    k, v = (x.repeat_interleave(readers, 1) for x in leaves[1:])
    mask = mask_of(inputs.spans, len(q), inputs.sliding_window).to(q.device)
    blind = ~mask.any(-1)
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(inputs.scale).masked_fill(~(mask | blind[:, None]), float("-inf"))
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).masked_fill(blind[:, None, None], 0.0)
    out.backward(inputs.grad_out.to(dtype))
    lse = scores.detach().logsumexp(-1).T.masked_fill(blind[:, None], float("-inf"))
    return Answer(out.detach(), lse, [leaf.grad for leaf in leaves if leaf.grad is not None])


# ---- our attention at each level ----


def attend_rows(inputs: LayerInputs) -> Answer:
    """The door that models go through."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = attend(q, k, v, inputs.spans, inputs.scale, sliding_window=inputs.sliding_window)
    out.backward(inputs.grad_out)
    return Answer(out.detach(), lse, [leaf.grad for leaf in (q, k, v) if leaf.grad is not None])


def _blocks(inputs: LayerInputs) -> Answer:
    """As a ring computes: each document's keys are cut in two, so that queries and keys of a block differ in number;
    partial results are
    merged, and each block's backward is given the merged out and lse.
    """
    cut = [tuple(tile for tile in tiles if tile.n_queries and tile.n_keys) for tiles in _cut_keys(inputs.spans)]
    parts = [Block(tiles, inputs.sliding_window) for tiles in cut]
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    out, lse = forward_block(q, k, v, parts[0], scale)
    for part in parts[1:]:
        out, lse = merge(out, lse, *forward_block(q, k, v, part, scale))
    queries = Queries(q, out.to(q.dtype), lse, inputs.grad_out)
    shares = [backward_block(queries, k, v, part, scale) for part in parts]
    grads = [
        torch.stack([share.to(lse.dtype) for share in of_one]).sum(0).to(q.dtype)
        for of_one in zip(*shares, strict=True)
    ]
    return Answer(queries.out, lse, grads)


def _cut_keys(spans: Spans) -> tuple[list[Tile], list[Tile], list[Tile]]:
    """Each span as three lists of tiles: second part over first part (full), first over itself, second over itself."""
    full, first, second = [], [], []
    for start, stop in spans:
        cut = start + (stop - start + 2) // 3
        full.append(Tile(cut, stop, start, cut, stop - cut))
        first.append(Tile(start, cut, start, cut, 0))
        second.append(Tile(cut, stop, cut, stop, 0))
    return full, first, second


def _ranks(strategy: str, ranks: int, rings: int) -> Compute:
    def compute(inputs: LayerInputs) -> Answer:
        out, *grads = simulate(strategy, inputs, ranks, rings)
        return Answer(out, None, grads)

    return compute
