"""One rank's error in the middle of common work ends all ranks with its reason; every rank is a real process."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from lr2train.config import UserError
from lr2train.parallel.failure import told_to_all

ERRORS = {"user": UserError("set it to 3"), "other": KeyError("no such")}


def failing_together(rank: int, world: int, failing: int, how: str) -> None:
    """A collective that one rank never joins. Its time-out is torch's: half an hour."""
    with told_to_all():
        dist.all_reduce(torch.zeros(1))
        if rank == failing and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == failing:
            raise ERRORS[how]
        dist.all_reduce(torch.zeros(1))


def said_by(tmp_path, failing: int, how: str) -> dict[int, str]:
    """The last line of each rank's traceback."""
    with pytest.raises(RankError) as raised:
        run_ranks(failing_together, 3, failing, how, tmp_path=tmp_path)
    texts = str(raised.value).split("rank ", 1)[1].split("\nrank ")
    parts = [text for text in texts if " of failing_together:" in text]
    return {int(text[0]): text.strip().splitlines()[-1] for text in parts}


@pytest.mark.parametrize(
    ("failing", "how", "own", "told"),
    [
        (
            1,
            "user",
            "lr2train.config.fields.UserError: set it to 3",
            "lr2train.config.fields.UserError: rank 1: set it to 3",
        ),
        (0, "other", "KeyError: 'no such'", "RuntimeError: rank 0: KeyError: 'no such'"),
    ],
)
def test_every_rank_ends_with_the_reason_of_the_one_that_failed(tmp_path, failing, how, own, told):
    assert said_by(tmp_path, failing, how) == {rank: own if rank == failing else told for rank in range(3)}


def test_a_killed_rank_is_said_to_be_gone(tmp_path):
    said = said_by(tmp_path, 2, "killed")
    assert set(said) == {0, 1}
    gone = "lr2train.ranks.PeerGone: a rank is gone or does not answer, its own log says why (seen by rank "
    assert all(text.startswith(gone) for text in said.values()), said


def test_one_rank_alone_raises_its_own_error():
    with pytest.raises(KeyError, match="mine"), told_to_all():
        raise KeyError("mine")
