"""The library ring-flash-attn as an oracle: its own loops on real ranks, its kernel calls handed to ours on CPU.

The library's loops differ from ours in everything but the mathematics: whole shards go to a neighbour, and gradients of
keys circulate in fp32. Inputs are fp64, because the library takes ``.to(float32)`` for a copy and overwrites its own
sums where inputs are fp32 already. The library merges in fp32: the tolerance of 2e-6 allows for that.
"""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lr2train.attention.blocks import Block, CappedScale, Queries
from lr2train.attention.kernel import backward_block, forward_block
from lr2train.attention.ring_flash_attn import LibraryAttention, ring_flash_attn, zigzag_function
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Tile
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh, make_mesh
from tests.attention.reference import relative_error
from tests.attention.test_strategies import check_result, expected_of, run_shard, segment_of

LENGTHS = ((0, 1), (1, 3), (3, 40), (40, 41), (41, 90), (90, 96))  # it wants packed documents without gaps
KERNEL_CALLS = []


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    """flash-attn 2.7's, of one row [1, T, H, D], over our kernel: (out, lse [1, H, T], mask, random state)."""
    KERNEL_CALLS.append("forward")
    out, lse = forward_block(q[0], k[0], v[0], one_tile(q, k, causal), softmax_scale)
    return out[None], lse.T[None], None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    KERNEL_CALLS.append("backward")
    queries = Queries(q[0], out[0], softmax_lse[0].T, dout[0])
    grads = backward_block(queries, k[0], v[0], one_tile(q, k, causal), softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into[0] = grad


def one_tile(q, k, causal) -> Block:
    """All queries of q [1, Tq, H, D] over all keys of k [1, Tk, H, D]."""
    return Block((Tile(0, q.shape[1], 0, k.shape[1], 0 if causal else q.shape[1]),))


def packed_tiles(cu_q, cu_k) -> Block:
    """Documents between cumulative lengths."""
    assert len(cu_q) == len(cu_k)
    return Block(tuple(Tile(*a, *b, 0) for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)))


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
):  # fmt: skip
    """Packed documents, masks aligned to the bottom right: lse [H, N]."""
    out, lse = forward_block(q, k, v, packed_tiles(cu_seqlens_q, cu_seqlens_k), softmax_scale)
    return out, lse.T, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
):  # fmt: skip
    queries = Queries(q, out, softmax_lse.T, dout)
    grads = backward_block(queries, k, v, packed_tiles(cu_seqlens_q, cu_seqlens_k), softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)


def hand_it_our_kernel() -> None:
    """Stand in for flash-attn 2.7, in a process of its own: the rank's."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__path__ = []
    varlen = _flash_attn_varlen_forward, _flash_attn_varlen_backward
    for function in (_flash_attn_forward, _flash_attn_backward, *varlen):
        setattr(interface, function.__name__, function)
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def check_whole_segment(mesh: Mesh) -> None:
    """As a strategy: its zigzag ring, ours and the explicit mask agree."""
    for heads in ((4, 4), (8, 2), (6, 3), (4, 1)):
        segment = segment_of(((0, 96),), heads, dtype=torch.float64)
        KERNEL_CALLS.clear()
        theirs, layout, _ = run_shard("ring_flash_attn", segment, mesh)
        assert ["forward"] * mesh.sp_size + ["backward"] * mesh.sp_size == KERNEL_CALLS, "its loops ran over our kernel"
        ours, _, _ = run_shard("ring", segment, mesh)
        check_result(theirs, expected_of(segment), "the library", layout=layout)
        for a, b in zip(theirs, ours, strict=True):
            assert relative_error(a, b) < 2e-6


def check_packed(mesh: Mesh) -> None:
    """Its gathering of packed documents over contiguous shards beside ours."""
    from ring_flash_attn import llama3_flash_attn_varlen as library

    segment = segment_of(LENGTHS, (8, 2), dtype=torch.float64)
    ours, layout, _ = run_shard("gather", segment, mesh)
    bounds = torch.tensor([0, *(stop for _, stop in LENGTHS)], dtype=torch.int32)
    place = {"rank": mesh.sp_rank, "world_size": mesh.sp_size}
    *cumulative, keys = library.llama3_flash_attn_prepare_cu_seqlens(bounds, causal=True, **place)
    leaves = [layout.shard(x, 0).clone().requires_grad_() for x in (segment.q, segment.k, segment.v)]
    out = library.llama3_flash_attn_varlen_func(
        *leaves, *cumulative, heads_k_stride=1, local_k_slice=keys, softmax_scale=segment.scale, causal=True,
        group=mesh.sp_group,
    )  # fmt: skip
    out.backward(layout.shard(segment.grad_out, 0))
    theirs = [out.detach(), *(x.grad for x in leaves)]
    check_result(theirs, expected_of(segment), "the library, packed", layout=layout)
    for a, b in zip(theirs, ours, strict=True):
        assert relative_error(a, b) < 2e-6


def check_all(rank: int, world: int) -> None:
    hand_it_our_kernel()
    zigzag_function()
    mesh = make_mesh(world)
    check_whole_segment(mesh)
    check_packed(mesh)
    with pytest.raises(UserError, match="parallel.strategy=ring_flash_attn .*6 spans over 96 tokens"):
        run_shard("ring_flash_attn", segment_of(LENGTHS, (4, 4)), mesh)
    dist.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_its_loops_over_our_kernel_agree_with_ours(world, tmp_path):
    run_ranks(check_all, world, tmp_path=tmp_path)


def test_capped_scores_are_refused():
    x = torch.zeros(4, 2, 8)
    with pytest.raises(UserError, match=r"ring_flash_attn does not cap scores; set parallel\.strategy=auto"):
        LibraryAttention(None)(x, x, x, CappedScale(1.0, 50.0))


def test_without_flash_attn_it_is_refused_with_the_remedy():
    """As on this machine, where flash-attn is not installed: nothing is stood in for it in this process."""
    segment = PackedSegment(((0, 96),), 96, 2)
    with pytest.raises(UserError, match=r"flash-attn 2 on CUDA \(.*flash_attn.*\); set parallel.strategy to ring"):
        STRATEGIES["ring_flash_attn"].refuse(SegmentWork(segment, 4, 4, 8))
    with pytest.raises(UserError, match=r"has no sliding window \(12 tokens\)"):
        ring_flash_attn(segment, Mesh(), sliding_window=12)
