"""flash-attn 4 takes our calls and compiles its kernels, without a GPU.

    pip install -r requirements-flash-attn-4.txt triton    (in an environment of its own)
    python -m tools.gpu.compile_flash4 90 | 100

Tensors are fake, so nothing is computed. The library's own interface runs: its assertions see our shapes, lengths and
windows, and its compiler makes the forward and the backward kernel for the GPU named by compute capability (90 H100 and
H200, 100 B200). Minutes. The tests check the same calls against the library's signatures, without installing it.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lr2train.attention import cuda
from lr2train.attention.blocks import Queries

WINDOWS = ((-1, 0), (511, 0), (511, -1), (-1, -1))  # causal; sliding; of a ring's later queries; full
HEADS = ((8, 2), (4, 4))


def main() -> int:
    capability = int(sys.argv[1])
    named = {"FLASH_ATTENTION_ARCH": f"sm_{capability}", "CUTE_DSL_ARCH": f"sm_{capability}a"}
    os.environ |= {**named, "FLASH_ATTENTION_NUM_SMS": "132"}
    if (reason := cuda.refusal("flash_attn_4", capability // 10)) is not None:
        print(f"flash_attn_4 {reason}", file=sys.stderr)
        return 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        for (left, right), heads in product(WINDOWS, HEADS):
            q, k, v = (
                torch.empty(4096, n, 128, dtype=torch.bfloat16, device="cuda") for n in (heads[0], *heads[1:] * 2)
            )
            borders = torch.empty(3, dtype=torch.int32, device="cuda")
            varlen, start = cuda.Varlen(borders, borders, 2048, 2048, left, right), time.perf_counter()
            out, lse = cuda._flash4_forward(q, k, v, varlen, 0.088)
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, (heads[0], 4096), torch.float32)
            queries = Queries(q, out, lse, torch.empty_like(out))
            grads = cuda._flash4_backward(queries, k, v, varlen, 0.088)
            assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
            seconds = time.perf_counter() - start
            print(f"sm_{capability}, {heads} heads, window ({left}, {right}): compiled in {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
