"""What only several ranks can find out together: offsets of clocks, and whether they see one folder."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from lr2train.diagnosis.findings import Findings
from lr2train.diagnosis.machine import CLOCK, existing
from lr2train.parallel import control
from lr2train.ranks import rank

_ROUNDS = 5
_LATE_S = 1.0


def look(found: Findings, runs_folder: Path) -> None:
    """Note the offset of this rank's clock and whether it sees rank 0's file in runs_folder. A collective."""
    _offset(found)
    _shared(found, runs_folder)


def _offset(found: Findings) -> None:
    """The offset to rank 0's clock, from the quickest of some rounds.

    In a round all ranks exchange, then read their clocks. The readings lie within the round's duration of each other,
    so that duration bounds the error.
    """
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        control.from_all(None)
        now = time.time()
        times = control.from_all(now)
        rounds.append((time.perf_counter() - start, now - times[0]))
    error_s, ahead_s = min(rounds)
    off = abs(ahead_s) > error_s + _LATE_S
    found.note(CLOCK, "offset to rank 0", f"{ahead_s:+.1f} s" if off else f"none above {_LATE_S:g} s")
    if off:
        found.problem(f"the clock is {ahead_s:+.0f} s from rank 0's", "set the clocks of all machines by NTP")


def _shared(found: Findings, runs_folder: Path) -> None:
    """Every rank looks for a file that rank 0 makes, and removes, where runs_folder is or will be."""
    folder = existing(runs_folder)
    name = control.from_rank_0(f".doctor.{secrets.token_hex(4)}.tmp")
    file = folder / name
    if rank() == 0:
        _made(file)
    there = control.from_all(_made_by_rank_0(file, folder))
    if rank() == 0:
        file.unlink(missing_ok=True)
    if there[0] and not there[rank()]:
        found.problem(
            f"runs_folder={runs_folder} is another folder than rank 0's",
            "set runs_folder to a folder on a file system that all machines share",
            stops=True,
        )


def _made(file: Path) -> None:
    try:
        file.touch()
    except OSError:  # noted already: the folder cannot be written
        return


def _made_by_rank_0(file: Path, folder: Path) -> bool:
    """Whether the file is there, once rank 0 has had its turn. A collective."""
    control.from_all(None)
    os.listdir(folder)  # has a network file system look anew
    return file.exists()
