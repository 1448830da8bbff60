"""The mesh and the collectives, on real ranks against what one process computes."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from lr2train.config import UserError
from lr2train.parallel.comm import all_gather, all_to_all
from lr2train.parallel.mesh import Mesh, make_mesh


def inputs(world: int) -> list[torch.Tensor]:
    """One tensor [4, 8, 3] for each rank, known to all."""
    return list(torch.randn(world, 4, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def check_all_to_all(rank: int, world: int) -> None:
    for scatter_dim, gather_dim in ((0, 1), (1, 0), (1, 2)):
        parts = [x.clone().requires_grad_() for x in inputs(world)]
        expected = [torch.cat([x.chunk(world, scatter_dim)[r] for x in parts], gather_dim) for r in range(world)]
        out = all_to_all(mine := inputs(world)[rank].requires_grad_(), scatter_dim, gather_dim, dist.group.WORLD)
        assert torch.equal(out, expected[rank])
        sum((x * (r + x)).sum() for r, x in enumerate(expected)).backward()
        (out * (rank + out)).sum().backward()
        assert torch.equal(mine.grad, parts[rank].grad)
        out = all_to_all(inputs(world)[rank].requires_grad_(), scatter_dim, gather_dim, dist.group.WORLD)
        assert torch.equal(all_to_all(out, gather_dim, scatter_dim, dist.group.WORLD), inputs(world)[rank])


def check_all_gather(rank: int, world: int) -> None:
    for dim in (0, 1, 2):
        parts = [x.clone().requires_grad_() for x in inputs(world)]
        whole = torch.cat(parts, dim)
        out = all_gather(mine := inputs(world)[rank].requires_grad_(), dim, dist.group.WORLD)
        assert torch.equal(out, whole)
        sum((whole * (r + whole)).sum() for r in range(world)).backward()
        (out * (rank + out)).sum().backward()
        torch.testing.assert_close(mine.grad, parts[rank].grad)


def check_mesh(rank: int, world: int) -> None:
    for sp in (1, 2, 4):
        mesh = make_mesh(sp, timeout_s=30)
        assert (mesh.rank, mesh.world) == (rank, world)
        assert (mesh.sp_rank, mesh.dp_rank, mesh.sp_size, mesh.dp_size) == (rank % sp, rank // sp, sp, world // sp)
        for group, size, own in ((mesh.sp_group, sp, mesh.sp_rank), (mesh.dp_group, world // sp, mesh.dp_rank)):
            assert dist.get_world_size(group) == size
            assert dist.get_rank(group) == own
        total = torch.tensor([rank])
        dist.all_reduce(total, group=mesh.dp_group)
        assert total.item() == sum(range(mesh.sp_rank, world, sp)), (
            "the dp group joins ranks of one sp rank, and a group of one is not the world"
        )
    for sp in (3, 8, 0):
        with pytest.raises(UserError, match=rf"parallel.sp={sp} does not divide the 4 ranks .* one of \[1, 2, 4\]"):
            make_mesh(sp)


def check_all(rank: int, world: int) -> None:
    check_all_to_all(rank, world)
    check_all_gather(rank, world)
    check_mesh(rank, world)


def test_collectives_and_mesh_on_4_ranks(tmp_path):
    run_ranks(check_all, 4, tmp_path=tmp_path)


def test_without_torch_distributed_everything_is_one_rank():
    assert make_mesh(1) == Mesh()
    with pytest.raises(UserError, match=r"parallel.sp=2 does not divide the 1 ranks"):
        make_mesh(2)
    x = torch.randn(2, 3)
    assert all_to_all(x, 0, 1, None) is x
    assert all_gather(x, 0, None) is x


def fails_on_rank_1(rank: int, world: int) -> None:
    if rank == 1:
        raise UserError("the second rank has a reason")
    dist.barrier()


def returns(rank: int, world: int, x: torch.Tensor) -> torch.Tensor:
    return x + rank


def test_run_ranks_returns_results_and_raises_what_a_rank_raised(tmp_path):
    assert [x.tolist() for x in run_ranks(returns, 2, torch.tensor([5]), tmp_path=tmp_path)] == [[5], [6]]
    with pytest.raises(RankError, match=r"^rank 1 of fails_on_rank_1:(.|\n)*UserError: the second rank has a reason"):
        run_ranks(fails_on_rank_1, 2, tmp_path=tmp_path)
    with pytest.raises(TimeoutError, match=r"2 of 2 ranks are still running after 0.001 s"):
        run_ranks(returns, 2, torch.tensor([5]), tmp_path=tmp_path, timeout_s=0.001)
