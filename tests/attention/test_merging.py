"""Merging a part into rows of fp32 accumulators in place: the plain way, and the Triton kernel in its interpreter."""

import importlib.util
import math
import os

import pytest
import torch

from lr2train.attention.kernel import merge, merge_into

_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = _INSTALLED and not INTERPRETED and torch.cuda.is_available()
ROWS = {
    "all": slice(0, 9),
    "a slice": slice(3, 8),
    "an index": torch.tensor([8, 0, 3, 4]),
    "none": torch.tensor([], dtype=torch.int64),
}
SHAPES = [(1, 8), (5, 24), (4, 128), (33, 128)]  # heads and head size: padded, and cut over several programs


def parts(rows, heads, size, dtype):
    """(out, lse) of 9 rows and a part of some; in some rows one side or both saw no key."""
    generator = torch.Generator().manual_seed(heads)
    n = len(torch.arange(9)[rows])
    out, part = (torch.randn(length, heads, size, generator=generator) for length in (9, n))
    lse, part_lse = (6 * torch.randn(length, heads, generator=generator) for length in (9, n))
    for x, of in ((out, lse), (part, part_lse)):
        nothing = torch.rand(of.shape, generator=generator) < 0.2
        of[nothing], x[nothing] = -math.inf, 0.0
    lse[:1], out[:1] = -math.inf, 0.0
    part_lse[:1], part[:1] = -math.inf, 0.0
    return out, lse, part.to(dtype), part_lse


def merged(rows, out, lse, part, part_lse):
    """The reference: ``merge`` row by row, into copies."""
    out, lse = out.clone(), lse.clone()
    for number, row in enumerate(torch.arange(9)[rows].tolist()):
        out[row], lse[row] = (
            x[0] for x in merge(out[row][None], lse[row][None], part[number][None], part_lse[number][None])
        )
    return out, lse


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_merged_in_place_and_others_stay(rows):
    out, lse, *part = parts(rows, 5, 24, torch.bfloat16)
    expected = merged(rows, out, lse, *part)
    merge_into(out, lse, rows, *part)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="NOT CHECKED: needs triton and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), SHAPES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_kernel_merges_as_the_plain_way(rows, heads, size, dtype):
    from lr2train.attention.merging import merge_rows

    out, lse, *part = parts(rows, heads, size, dtype)
    expected = merged(rows, out, lse, *part)
    device = "cuda" if ON_GPU else "cpu"
    out, lse, *part = (x.to(device) for x in (out, lse, *part))
    merge_rows(out, lse, rows.to(device) if isinstance(rows, torch.Tensor) else rows, *part)
    # exp, log and logaddexp in another order: a few roundings of fp32
    torch.testing.assert_close(out.cpu(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.cpu(), expected[1], rtol=1e-6, atol=2e-6)
