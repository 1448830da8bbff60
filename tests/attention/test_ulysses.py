"""Ulysses and local on real ranks: every rank's output and gradients are its shard of one process's attention."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lr2train.attention.kernel import attend
from lr2train.attention.local import crosses_shards, local
from lr2train.attention.strategy import PackedSegment
from lr2train.attention.ulysses import ulysses
from lr2train.config import UserError
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh, make_mesh
from tests.attention.reference import random_qkv, relative_error

CROSSING = ((0, 3), (3, 40), (45, 62), (62, 64))
ALIGNED = ((0, 3), (3, 16), (18, 32), (32, 40), (48, 63))
# more key heads than ranks, fewer, one, and a number that neither divides the ranks nor is divided by them
HEADS = ((8, 4), (8, 2), (8, 1), (12, 6), (12, 3))


def check_strategy(strategy, spans, heads, mesh: Mesh) -> None:
    whole = [x.requires_grad_() for x in random_qkv(64, *heads, 16, torch.float64, seed=mesh.dp_rank)]
    expected, _ = attend(*whole, spans, 0.3)
    generator = torch.Generator().manual_seed(mesh.dp_rank + 10)
    grad_out = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(grad_out)

    layout = Layout("contiguous", 64, mesh.sp_rank, mesh.sp_size)
    mine = [layout.shard(x.detach(), 0).clone().requires_grad_() for x in whole]
    out = strategy(PackedSegment(spans, 64, mesh.sp_size), mesh)(*mine, 0.3)
    out.backward(layout.shard(grad_out, 0))
    assert relative_error(out, layout.shard(expected, 0)) < 1e-12
    for shard, x in zip(mine, whole, strict=True):
        assert relative_error(shard.grad, layout.shard(x.grad, 0)) < 1e-12


def count_collectives(mesh: Mesh) -> None:
    """q, k and v share one exchange: two forward, two backward."""
    calls, original = [], dist.all_to_all_single
    dist.all_to_all_single = lambda out, x, **kw: calls.append(x.numel()) or original(out, x, **kw)
    q, k, v = (x.requires_grad_() for x in random_qkv(16, 8, 2, 4))
    n_tokens = 16 * mesh.sp_size
    out = ulysses(PackedSegment(((0, n_tokens),), n_tokens, mesh.sp_size), mesh)(q, k, v, 0.5)
    kv_heads = max(2, mesh.sp_size)
    assert calls == [16 * 4 * (8 + 2 * kv_heads), 16 * 4 * 8], "the docstring's formula, times sp / (sp - 1)"
    out.sum().backward()
    assert sorted(calls[2:]) == sorted(calls[:2])
    dist.all_to_all_single = original


def check_all(rank: int, world: int, sizes: tuple[int, ...]) -> None:
    for sp in sizes:
        mesh = make_mesh(sp)
        for heads in HEADS:
            check_strategy(ulysses, CROSSING, heads, mesh)
        check_strategy(ulysses, ((0, 64),), (8, 2), mesh)
        check_strategy(local, ALIGNED, (8, 2), mesh)
        with pytest.raises(UserError, match="tokens 3:40 are one span across a border"):
            check_strategy(local, CROSSING, (8, 2), mesh)
        count_collectives(mesh)


def test_on_2_ranks(tmp_path):
    run_ranks(check_all, 2, (2,), tmp_path=tmp_path)


def test_on_4_ranks_as_one_group_and_as_two(tmp_path):
    run_ranks(check_all, 4, (4, 2), tmp_path=tmp_path)


def test_one_rank_without_torch_distributed():
    for strategy in (local, ulysses):
        for heads in HEADS:
            check_strategy(strategy, CROSSING, heads, Mesh())


def test_heads_that_ranks_cannot_share_are_refused():
    mesh = Mesh(world=8, sp_size=8)
    with pytest.raises(UserError, match=r"num_attention_heads=12 .* parallel.sp=8 .*set parallel.strategy to auto"):
        ulysses(PackedSegment(((0, 64),), 64, 8), mesh)(*random_qkv(8, 12, 4, 8), 1.0)


def test_local_serves_each_shard_with_its_own_spans():
    """All ranks in one process: local needs no collective."""
    q, k, v = random_qkv(64, 4, 2, 16)
    whole, _ = attend(q, k, v, ALIGNED, 0.3)
    layouts = [Layout("contiguous", 64, rank, 4) for rank in range(4)]
    attentions = [local(PackedSegment(ALIGNED, 64, 4), Mesh(world=4, sp_size=4, sp_rank=rank)) for rank in range(4)]
    ranks = zip(layouts, attentions, strict=True)
    shards = [of_rank(*(layout.shard(x, 0) for x in (q, k, v)), 0.3) for layout, of_rank in ranks]
    torch.testing.assert_close(layouts[0].gather(shards, 0), whole)


def test_crosses_shards_names_the_first_span_that_does():
    assert crosses_shards(ALIGNED, 16) is None
    assert crosses_shards(CROSSING, 16) == (3, 40)
    assert crosses_shards(CROSSING, 64) is None
