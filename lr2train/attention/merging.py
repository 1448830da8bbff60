"""The merge of a ring as one Triton kernel: reads both parts once, and writes the sum in place.

In plain PyTorch ``kernel.merge`` over some rows of the accumulators moves about 50 bytes of device memory an element of
out: rows are taken out, widened, weighed, added and put back. The kernel moves 10: it reads out (fp32) and the part
(bf16), and writes out. Imported by ``kernel.merge_into`` alone, on CUDA, because it imports triton.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of out that one program holds


def merge_rows(out: Tensor, lse: Tensor, rows: slice | Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """``kernel.merge_into`` for fp32 accumulators: out [T, H, D] and lse [T, H], contiguous; part_out [N, H, D] in any
    dtype, part_lse [N, H]; rows: N rows, each at most once.
    """
    assert out.is_contiguous() and lse.is_contiguous(), "rows of the accumulators are written where they lie"
    assert out.dtype == lse.dtype == torch.float32, f"accumulators of {out.dtype} and {lse.dtype}"
    n_rows, n_heads, size = part_out.shape
    if n_rows == 0:
        return
    padded = triton.next_power_of_2(size)
    heads = min(triton.next_power_of_2(n_heads), max(_ELEMENTS // padded, 1))
    indexed = isinstance(rows, Tensor)
    _merge[(n_rows, triton.cdiv(n_heads, heads))](
        out, lse, part_out.contiguous(), part_lse.contiguous(),
        rows if indexed else lse,  # a tensor that is not read
        0 if indexed else rows.start,
        n_heads, size, indexed, heads, padded,
    )  # fmt: skip


@triton.jit
def _merge(
    out, lse, part_out, part_lse, rows, first,
    n_heads, size, INDEXED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row and HEADS of its heads; the formula is ``kernel.merge``'s."""
    row = tl.program_id(0).to(tl.int64)
    into = tl.load(rows + row).to(tl.int64) if INDEXED else first + row
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, SIZE)
    is_head = heads < n_heads
    is_element = is_head[:, None] & (dims[None, :] < size)
    old = tl.load(lse + into * n_heads + heads, mask=is_head, other=0.0)
    new = tl.load(part_lse + row * n_heads + heads, mask=is_head, other=0.0).to(tl.float32)
    top = tl.maximum(old, new)
    top = tl.where(top == float("-inf"), 0.0, top)  # -inf minus -inf would be nan
    total = tl.exp(old - top) + tl.exp(new - top)
    joined = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    finite = tl.where(total > 0.0, joined, 0.0)
    at = into * n_heads * size + heads[:, None] * size + dims[None, :]
    part_at = row * n_heads * size + heads[:, None] * size + dims[None, :]
    kept = tl.load(out + at, mask=is_element, other=0.0)
    added = tl.load(part_out + part_at, mask=is_element, other=0.0).to(tl.float32)
    merged = tl.exp(old - finite)[:, None] * kept + tl.exp(new - finite)[:, None] * added
    tl.store(out + at, merged, mask=is_element)
    tl.store(lse + into * n_heads + heads, joined, mask=is_head)
