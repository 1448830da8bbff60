"""Control messages on real ranks: results come in rank order, one rank's error on all, and a killed rank is noticed at
once.
"""

import contextlib
import os
import signal
from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import forking, run_ranks

from lr2train import ranks
from lr2train.config import UserError
from lr2train.parallel import control


def fails(here: bool, error: Exception):
    """A function that raises on some ranks."""

    def fn() -> int:
        if here:
            raise error
        return ranks.rank()

    return fn


def check_messages(rank: int, world: int) -> None:
    assert (ranks.rank(), ranks.world()) == (rank, world)
    big = "x" * (200_000 * rank)  # more than a socket's buffer, and of another size on every rank
    assert control.from_all((rank, big)) == [(r, "x" * (200_000 * r)) for r in range(world)]
    assert control.from_rank_0({"of": rank}) == {"of": 0}
    assert control.together(lambda: rank**2) == [r**2 for r in range(world)]


def check_errors(rank: int, world: int) -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1: KeyError: 'no such'$") as raised:
        control.together(fails(rank == 1, KeyError("no such")))
    assert isinstance(raised.value.__cause__, KeyError if rank == 1 else type(None))
    with pytest.raises(UserError, match=r"^rank 2: set it to 3$"):
        control.together(fails(rank == 2, UserError("set it to 3")))
    with pytest.raises(UserError, match=r"^set it to 3$"):
        control.together(fails(True, UserError("set it to 3")))
    with pytest.raises(RuntimeError, match=r"^rank 1: ValueError: I am 1 \(1 more of 3 ranks failed too\)$"):
        control.together(fails(rank > 0, ValueError(f"I am {rank}")))
    assert control.together(lambda: rank) == list(range(world)), "a raised error leaves nothing half-said"


def check_all(rank: int, world: int) -> None:
    check_messages(rank, world)
    check_errors(rank, world)


def test_messages_and_errors_on_3_ranks(tmp_path):
    run_ranks(check_all, 3, tmp_path=tmp_path)


def test_without_a_process_group_there_is_one_rank():
    assert (ranks.rank(), ranks.world()) == (0, 1)
    assert control.from_all("a") == ["a"]
    assert control.from_rank_0("a") == "a"
    assert control.together(lambda: 5) == [5]
    with pytest.raises(RuntimeError, match=r"^KeyError: 'no such'$"):
        control.together(fails(True, KeyError("no such")))


def surviving(rank: int, killed: int, folder, pipe) -> None:
    """One rank is killed. The others report what they hear and stay alive, so that no process end tells anything."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=3, timeout=timedelta(seconds=600)
    )
    control.together(lambda: rank)
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.recv()
    heard = []
    for _ in range(2):
        try:
            control.together(lambda: rank)
        except RuntimeError as error:
            heard.append(str(error))
    pipe.send(heard)
    signal.pause()


@contextlib.contextmanager
def three_ranks(killed: int, folder):
    """Pipes to three ranks, of which one is killed."""
    context = forking()
    pipes = [context.Pipe() for _ in range(3)]
    ranks = [
        context.Process(target=surviving, args=(rank, killed, folder, pipes[rank][1]), daemon=True) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    try:
        yield [here for here, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert ranks[killed].exitcode == -signal.SIGKILL


def heard_by(pipe) -> str:
    """What a rank was told; the process group's own time-out is 600 s."""
    assert pipe.poll(60), "a rank still waits"
    first, again = pipe.recv()
    assert first == again
    return first


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_rank_is_noticed_by_all_at_once(killed, tmp_path):
    with three_ranks(killed, tmp_path) as pipes:
        others = [pipes[rank] for rank in range(3) if rank != killed]
        for pipe in others:
            pipe.send("go on")
        for pipe in others:
            assert heard_by(pipe).startswith(f"rank {killed} is gone or did not answer (seen by rank ")


def test_a_rank_that_was_busy_when_another_died_hears_of_it_when_it_is_done(tmp_path):
    with three_ranks(1, tmp_path) as pipes:
        pipes[0].send("go on")
        assert heard_by(pipes[0]).startswith("rank 1 is gone")
        pipes[2].send("go on")
        assert heard_by(pipes[2]).startswith("rank 0 is gone"), "it has left"
