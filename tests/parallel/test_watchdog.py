"""A rank that is blocked in something that no peer wakes is ended by its watchdog, with the reason and the exit code.

Every rank is a real process; a rank that waits for an event stands for a rank that waits for its device.
"""

import contextlib
import os
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import forking

from lr2train.config import UserError
from lr2train.parallel import watchdog
from lr2train.parallel.failure import told_to_all
from lr2train.ranks import PeerGone

ERRORS = {"user": UserError("set it to 3"), "other": KeyError("no such"), "gone": PeerGone("rank 5 is gone")}
WORLD = 3


def rank_of(rank: int, folder, how: str, failing: int) -> None:
    """Joins, then one rank fails; the others wait for an event that never comes."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    watchdog._EVERY_S, watchdog._GRACE_S, watchdog._LATER_S = 0.05, 0.2, 0.2
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=600)
    )
    watchdog.watch_failures()
    dist.barrier()
    ENDS[how](rank, failing, how)


def blocked_on_the_device(rank: int, failing: int, how: str) -> None:
    with told_to_all():
        if rank == failing:
            raise ERRORS[how]
        threading.Event().wait()


def in_order(rank: int, failing: int, how: str) -> None:
    """A rank leaves for good while another still works: no watchdog has a say."""
    if rank == 0:
        with contextlib.suppress(KeyboardInterrupt), told_to_all():
            raise KeyboardInterrupt
    else:
        threading.Event().wait(1.0)  # longer than a watchdog would wait
    dist.destroy_process_group()


def held_up(rank: int, failing: int, how: str) -> None:
    """All have heard of the failure and are about to end, but one is held up."""
    watchdog._LEAVING_S = 0.3
    try:
        with told_to_all():
            raise UserError("the same on all ranks")
    except UserError:
        if rank == failing:
            threading.Event().wait()


ENDS = dict.fromkeys(ERRORS, blocked_on_the_device) | {"in order": in_order, "held up": held_up}


def ended(tmp_path, how: str, failing: int = 1) -> tuple[list[int | None], list[str]]:
    """Exit codes and stderr of all ranks; every rank has to end within 30 s."""
    context = forking()
    ranks = [context.Process(target=rank_of, args=(rank, tmp_path, how, failing), daemon=True) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes, [(tmp_path / f"{rank}.err").read_text() for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("user", 2, "rank 1: set it to 3"),
        ("other", 1, "rank 1: KeyError: 'no such'"),
        ("gone", 1, "rank 5 is gone"),
    ],
)
def test_blocked_ranks_end_with_the_reason_of_the_rank_that_failed(tmp_path, how, code, says):
    codes, errs = ended(tmp_path, how)
    assert [codes[0], codes[2]] == [code, code]
    assert codes[1] == 1, "its own error, as Python ends"
    assert [errs[0], errs[2]] == [f"lr2train (rank {rank}): {says}\n" for rank in (0, 2)]


def test_an_orderly_end_is_left_alone(tmp_path):
    assert ended(tmp_path, "in order") == ([0, 0, 0], ["", "", ""])


def test_a_rank_that_is_held_up_at_its_end_is_ended(tmp_path):
    codes, errs = ended(tmp_path, "held up", failing=2)
    assert codes == [0, 0, 2]
    assert errs[2] == "lr2train (rank 2): rank 2: the same on all ranks\n"


class Lost:
    """A store whose machine has gone."""

    def check(self, _: list[str]) -> bool:
        raise dist.DistNetworkError("Connection was likely closed")


def test_a_lost_store_means_that_rank_0_is_gone(monkeypatch):
    monkeypatch.setattr(watchdog, "_EVERY_S", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE_S", 60.0)
    said = []
    monkeypatch.setattr(watchdog, "_end", said.append)
    dog = watchdog.Watchdog(Lost())
    [thread] = [one for one in threading.enumerate() if one.name == "watch-failures"]
    while dog.heard is None:
        thread.join(0.01)
    dog.leave()
    thread.join()
    assert dog.heard.text.startswith("rank 0 or its machine is gone, its own log says why (seen by rank 0: Connection")
    assert said == [], "the main thread left by itself"
