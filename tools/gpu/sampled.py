"""Sampled rows of a long segment beside float64: out, lse and dq of some queries, dk and dv of some keys.

A whole segment of 131072 tokens has too many scores to write out. A row of out and dq follows from one query over all
keys. A row of dk and dv follows from one key under all queries. The sample holds the first and last rows, the rows
around document borders, and random ones.

Choice: the exact dk and dv take the log-sum-exp and the delta of all queries from the kernel under test. Both are
checked on the sampled queries. Cost: an lse that is wrong on unsampled queries alone would hide in dk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tools.gpu.kernels import using
from tools.gpu.parity import LIMITS, Answer, Compute, ParityCase, Row, draw, error_ratio, lse_error
from tools.gpu.simulation import LayerInputs

_SAMPLE = 24  # random rows beside the fixed ones


class _Sampled(NamedTuple):
    """out, dq and lse of sampled queries, dk and dv of sampled keys."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    lse: Tensor


def check_long(
    kernels: Sequence[str], device: torch.device, dtype: torch.dtype, n_tokens: int, compute: Compute
) -> Iterator[Row]:
    """A row for each kernel: one document, and packed documents, of a segment of ``n_tokens``."""
    share = n_tokens // 16
    packed = tuple((start, start + share) for start in range(0, n_tokens - share, share))
    for name in kernels:
        row = Row(name, f"sampled, {n_tokens}", str(dtype).removeprefix("torch."))
        for spans, window in ((((0, n_tokens),), None), (packed, None), (((0, n_tokens),), share)):
            case = ParityCase((4, 1), 128, dtype, spans, n_tokens, window)
            try:
                with using(name):
                    row.add(case, *_compare(case, device, compute))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel that cannot run is a result; the check continues
                row.error = f"{case.title}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                break
        yield row


def _compare(case: ParityCase, device: torch.device, compute: Compute) -> tuple[dict[str, float], float]:
    inputs = draw(case, device)
    answer = compute(inputs)
    rows = _rows(case).to(device)
    exact, plain = (_by_definition(inputs, answer, rows, dtype) for dtype in (torch.float64, case.dtype))
    ours = (answer.out, *answer.grads)
    ratios = {
        name: error_ratio(whole[rows], true, rough, rough)
        for name, whole, true, rough in zip(LIMITS, ours, exact[:4], plain[:4], strict=True)
    }
    assert answer.lse is not None
    return ratios, lse_error(answer.lse[rows], exact.lse)


def _rows(case: ParityCase) -> Tensor:
    """Sampled positions, each inside a document."""
    random = torch.randint(case.n_tokens, (_SAMPLE,), generator=torch.Generator().manual_seed(0)).tolist()
    borders = [border for start, stop in case.spans[-2:] for border in (start, start + 1, stop - 1)]
    return torch.tensor(sorted({row for row in (0, 1, *borders, *random) if any(a <= row < b for a, b in case.spans)}))


def _by_definition(inputs: LayerInputs, answer: Answer, rows: Tensor, dtype: torch.dtype) -> _Sampled:
    q, k, v, grad_out = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    group, scale = q.shape[1] // k.shape[1], inputs.scale
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    document = torch.full((len(q),), -1, device=q.device)
    for number, (start, stop) in enumerate(inputs.spans):
        document[start:stop] = number
    place = torch.arange(len(q), device=q.device)

    def seen(queries: Tensor, keys: Tensor) -> Tensor:
        ahead = place[queries][:, None] - place[keys]
        window = ahead < (inputs.sliding_window or len(q))
        return (document[queries][:, None] == document[keys]) & (ahead >= 0) & window

    scores = torch.einsum("ihd,jhd->hij", q[rows], k).mul(scale).masked_fill(~seen(rows, place), float("-inf"))
    weights = scores.softmax(-1)
    out = torch.einsum("hij,jhd->ihd", weights, v)
    products = torch.einsum("ihd,jhd->hij", grad_out[rows], v)
    ds = weights * (products - (grad_out[rows] * out).sum(-1).T[..., None])
    dq = scale * torch.einsum("hij,jhd->ihd", ds, k)
    assert answer.lse is not None
    lse, delta = answer.lse.T.to(dtype), (grad_out * answer.out.to(dtype)).sum(-1).T  # [Hq, T]
    columns = torch.einsum("ihd,jhd->hij", q, k[rows]).mul(scale)
    p = (columns - lse[..., None]).exp().masked_fill(~seen(place, rows), 0.0)
    dv = torch.einsum("hij,ihd->jhd", p, grad_out)
    dk = scale * torch.einsum(
        "hij,ihd->jhd", p * (torch.einsum("ihd,jhd->hij", grad_out, v[rows]) - delta[..., None]), q
    )
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return _Sampled(out, dq, dk, dv, scores.double().logsumexp(-1).T)
