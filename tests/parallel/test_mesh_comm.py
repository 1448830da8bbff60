"""The mesh and the collectives, on real ranks against what one process computes."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from lr2train.config import UserError
from lr2train.parallel.comm import Transfer, all_to_all, counting, exchange_rows, transfer
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


def check_a_second_derivative_is_refused(rank: int, world: int) -> None:
    """What arrives has no graph, so a second derivative would be zero and say nothing."""
    x = torch.ones(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(all_to_all(x, 1, 0, dist.group.WORLD).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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


def check_inner_mesh(rank: int, world: int) -> None:
    for sp, ring in ((4, 2), (4, 4), (2, 2), (4, 1), (1, 1)):
        mesh = make_mesh(sp, timeout_s=30, ring=ring)
        assert (mesh.ring_size, mesh.ulysses_size) == (ring, sp // ring)
        assert mesh.ring_rank * mesh.ulysses_size + mesh.ulysses_rank == mesh.sp_rank
        first = rank - mesh.sp_rank
        neighbours = [first + mesh.ring_rank * mesh.ulysses_size + i for i in range(mesh.ulysses_size)]
        assert dist.get_process_group_ranks(mesh.ulysses_group) == neighbours, "consecutive: the fast links"
        if ring > 1:
            same_heads = [first + i * mesh.ulysses_size + mesh.ulysses_rank for i in range(ring)]
            assert dist.get_process_group_ranks(mesh.ring_group) == same_heads
        else:
            assert mesh.ring_group is None
    with pytest.raises(UserError, match=r"parallel.ring=3 .* parallel.sp=4; set parallel.ring to one of \[1, 2, 4\]"):
        make_mesh(4, ring=3)


def check_uneven_exchange(rank: int, world: int) -> None:
    """Rank a sends a + b rows to rank b: its own number, so that it can be told whose they are."""
    sent = [0 if other == rank else rank + other for other in range(world)]
    received = [0 if other == rank else rank + other for other in range(world)]
    with counting() as counts:
        into = torch.empty(sum(received), 3)
        work = exchange_rows(torch.full((sum(sent), 3), float(rank)), sent, into, received, dist.group.WORLD)
    work.wait()
    assert into[:, 0].tolist() == [other for other in range(world) for _ in range(received[other])]
    assert counts == {"all_to_all": sum(sent) * 3 * 4}


def check_transfers(rank: int, world: int) -> None:
    """Two transfers in flight in opposite directions, with nothing on one link: order and tag tell them apart."""
    back, forth = (rank - 1) % world, (rank + 1) % world
    empty = 2  # the rank that has nothing to send in the first phase
    first = torch.full((0 if rank == empty else 2, 2), float(rank))
    arriving = torch.empty(0 if forth == empty else 2, 2)
    second, other = torch.full((3,), 10.0 + rank), torch.empty(3)
    with counting() as counts:
        works = transfer(Transfer(back, [first]), Transfer(forth, [arriving]), dist.group.WORLD, tag=0)
        works += transfer(Transfer(forth, [second]), Transfer(back, [other]), dist.group.WORLD, tag=1)
    for work in works:
        work.wait()
    assert torch.equal(arriving, torch.full_like(arriving, forth))
    assert torch.equal(other, torch.full((3,), 10.0 + back))
    assert counts == {"send": first.nbytes + second.nbytes}


def check_counts(rank: int, world: int) -> None:
    """A count begun in the forward goes on in the backward, after the block; outside of any block nothing is kept."""
    x = torch.ones(4, 8, requires_grad=True)
    with counting() as counts:
        out = all_to_all(x, 1, 0, dist.group.WORLD)
    part = x.nbytes // world * (world - 1)
    assert counts == {"all_to_all": part}
    all_to_all(x, 1, 0, dist.group.WORLD)
    assert counts["all_to_all"] == part
    out.sum().backward()
    assert counts == {"all_to_all": 2 * part}


def check_all(rank: int, world: int) -> None:
    check_all_to_all(rank, world)
    check_a_second_derivative_is_refused(rank, world)
    check_mesh(rank, world)
    check_inner_mesh(rank, world)
    check_uneven_exchange(rank, world)
    check_transfers(rank, world)
    check_counts(rank, world)


def test_collectives_and_mesh_on_4_ranks(tmp_path):
    run_ranks(check_all, 4, tmp_path=tmp_path)


def test_without_torch_distributed_everything_is_one_rank():
    assert make_mesh(1) == Mesh()
    with pytest.raises(UserError, match=r"parallel.sp=2 does not divide the 1 ranks"):
        make_mesh(2)
    x = torch.randn(2, 3)
    assert all_to_all(x, 0, 1, None) is x


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
