"""The zigzag ring of the library ring-flash-attn (Zhu Zilin, MIT licence), as a strategy to compare our ring with, on
CUDA.

Choice: the library's modules are imported one by one, around the package's own import, which asks transformers for a
name that is gone. Cost: the library serves one document over the whole segment, no sliding window, and needs flash-attn
2. It is the classic ring: every step sends whole sequence shards to a neighbour, and gradients of keys and values in
fp32.

Bytes that each rank sends for a layer, in exchanged shards of 2 Hkv D b n with n = T / sp tokens: forward (sp - 1)
shards; backward (sp - 1) shards, and sp shards of gradients in fp32 (4 bytes in the place of b).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch.distributed as dist
from torch import Tensor

from lr2train.attention.blocks import softcap_of
from lr2train.attention.ring import refuse_uneven, ring_pairs
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy, Traffic
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh

_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class LibraryAttention:
    """Attention of this rank's zigzag shard by the library, whose own sends ``comm.counting`` does not see."""

    group: dist.ProcessGroup | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D]. Raises UserError as ``zigzag_function``, and for
        scores that are capped.
        """
        if softcap_of(scale):
            raise UserError("parallel.strategy=ring_flash_attn does not cap scores; set parallel.strategy=auto")
        batch = (x.contiguous().unsqueeze(0) for x in (q, k, v))
        return zigzag_function()(*batch, softmax_scale=scale, causal=True, group=self.group).squeeze(0)


def ring_flash_attn(segment: PackedSegment, mesh: Mesh, sliding_window: int | None = None) -> LibraryAttention:
    """This rank's attention. Raises UserError for packed documents and for a sliding window."""
    _refuse_shape(segment, sliding_window)
    return LibraryAttention(mesh.sp_group)


def zigzag_function() -> Callable[..., Tensor]:
    """The library's zigzag ring attention.

    Raises:
        UserError: the library, or the flash-attn that the library calls, cannot be imported.
    """
    name = "ring_flash_attn"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            remedy = "pip install ring-flash-attn==0.1.8, or set it to ring"
            raise UserError(f"parallel.strategy=ring_flash_attn needs the library; {remedy}")
        package = ModuleType(name)  # in the place of the package's own import
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
    except (ImportError, OSError) as error:
        needed = f"parallel.strategy=ring_flash_attn needs flash-attn 2 on CUDA ({error})"
        raise UserError(f"{needed}; set parallel.strategy to ring") from error


def _refuse_shape(segment: PackedSegment, sliding_window: int | None) -> None:
    n_tokens = segment.n_tokens
    if segment.spans != ((0, n_tokens),):
        raise UserError(
            "parallel.strategy=ring_flash_attn serves one span over the segment, and this segment has "
            f"{len(segment.spans)} spans over {n_tokens} tokens; set parallel.strategy to ring"
        )
    if sliding_window is not None and sliding_window < n_tokens:
        refused = f"parallel.strategy=ring_flash_attn has no sliding window ({sliding_window} tokens)"
        raise UserError(f"{refused}; set parallel.strategy to ring")


# ---- declarations ----


def _refuse(work: SegmentWork) -> None:
    refuse_uneven(work.segment, 2 * work.segment.sp, "ring_flash_attn")
    _refuse_shape(work.segment, work.sliding_window)
    zigzag_function()


def _traffic(work: SegmentWork, rank: int) -> Traffic:
    sp = work.segment.sp
    elements = 2 * work.n_kv_heads * work.head_size * work.segment.shard_tokens
    shards = (sp - 1) * elements * work.bytes_per_element
    return Traffic(shards, shards + sp * elements * _GRADIENT_BYTES)


RING_FLASH_ATTN = Strategy("ring_flash_attn", ring_flash_attn, "zigzag", _refuse, _traffic, ring_pairs)
