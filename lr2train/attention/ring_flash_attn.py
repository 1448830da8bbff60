"""The zigzag ring of the library ring-flash-attn (Zhu Zilin, MIT licence), as a strategy to compare ours with, on CUDA.

Choice: its modules are imported one by one, around the package's own import, which asks transformers for a name that is gone. Cost: it
serves one causal span over the whole segment, no sliding window, and needs flash-attn 2. What it sends is the classic ring: whole shards
to a neighbour in every step, gradients of keys and values in fp32.

Bytes that each rank sends for a layer, of 2 Hkv D b n an exchanged shard of n = T / sp tokens: forward (sp - 1) shards; backward (sp - 1)
shards and sp shards of gradients in fp32 (4 bytes instead of b).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from lr2train.attention.ring import refuse_uneven, ring_pairs
from lr2train.attention.strategy import Strategy, Traffic, Work
from lr2train.attention.tiles import Spans
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh

_GRADIENT_BYTES = 4


def ring_flash_attn(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, mesh: Mesh, window_tokens: int | None = None) -> Tensor:
    """Attention of this rank's zigzag shard: q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D].

    Raises UserError for spans other than one over the whole segment, a sliding window, and where the library cannot be imported. Sends
    through its own calls, which ``comm.counting`` does not see.
    """
    _refuse_shape(spans, q.shape[0] * mesh.sp_size, window_tokens)
    rows = (x.contiguous().unsqueeze(0) for x in (q, k, v))
    return zigzag_function()(*rows, softmax_scale=scale, causal=True, group=mesh.sp_group).squeeze(0)


def zigzag_function() -> Callable[..., Tensor]:
    """The library's zigzag ring attention. Raises UserError where it, or the flash-attn that it calls, cannot be imported."""
    name = "ring_flash_attn"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise UserError("parallel.strategy=ring_flash_attn needs the library; pip install ring-flash-attn==0.1.8, or set it to ring")
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
    except (ImportError, OSError) as error:
        raise UserError(f"parallel.strategy=ring_flash_attn needs flash-attn 2 on CUDA ({error}); set parallel.strategy to ring") from error


def _refuse_shape(spans: Spans, n_tokens: int, window_tokens: int | None) -> None:
    if spans != ((0, n_tokens),):
        raise UserError(
            f"parallel.strategy=ring_flash_attn serves one span over the segment, and this one has {len(spans)} spans over {n_tokens} tokens; "
            "set parallel.strategy to ring"
        )
    if window_tokens is not None and window_tokens < n_tokens:
        raise UserError(f"parallel.strategy=ring_flash_attn has no sliding window ({window_tokens} tokens); set parallel.strategy to ring")


def _refuse(work: Work) -> None:
    refuse_uneven(work, 2 * work.sp, "ring_flash_attn")
    _refuse_shape(work.spans, work.n_tokens, work.window_tokens)
    zigzag_function()


def _traffic(work: Work, rank: int) -> Traffic:
    elements = 2 * work.n_kv_heads * work.head_size * (work.n_tokens // work.sp)
    shards = (work.sp - 1) * elements * work.bytes_per_element
    return Traffic(shards, shards + work.sp * elements * _GRADIENT_BYTES)


RING_FLASH_ATTN = Strategy("ring_flash_attn", ring_flash_attn, "zigzag", _refuse, _traffic, ring_pairs)
