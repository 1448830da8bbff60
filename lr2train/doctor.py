"""doctor: look at this machine, its packages and its ranks, and tell what would stop a run.

    lr2train doctor
    lr2train doctor runs_folder=/scratch/runs
    deepspeed --no_local_rank --module lr2train doctor       all ranks, also torchrun

Paste the output into an issue: it holds no token, key, user name or public address. Problems come first, each with a
remedy. No config, model or GPU is needed; nothing is compiled, downloaded or kept.

Exit code: 0, or 2 where a problem would stop a run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from lr2train import ranks
from lr2train.cli.door import EXIT_BAD_INPUT, main
from lr2train.config import Config, Device
from lr2train.diagnosis import devices, machine, network, packages
from lr2train.diagnosis import ranks as together
from lr2train.diagnosis.findings import Findings, in_words, stops
from lr2train.parallel import control, processes


def doctor(config: Config) -> list[Findings]:
    """Run the verb: print the findings of all ranks; returns them in rank order, on every rank."""
    mine, folder = Findings(), Path(config.runs_folder)
    packages.look(mine)
    found = _of_all(config, mine, folder)
    if ranks.rank() == 0:
        print(in_words(found), flush=True)
    return found


def _of_all(config: Config, mine: Findings, folder: Path) -> list[Findings]:
    """Every rank's findings; this rank's alone where the ranks cannot meet."""
    met = ranks.world() == 1 or _meet(config, mine)
    devices.look(mine)
    machine.look(mine, folder)
    network.look(mine)
    if not met or ranks.world() == 1:
        return [mine]
    together.look(mine, folder)
    found = control.from_all(mine)
    processes.stop()
    return found


def _meet(config: Config, mine: Findings) -> bool:
    """Join the ranks with gloo, whatever their device: a broken nccl must not keep the ranks apart here."""
    try:
        processes.start(replace(config, device=Device.cpu))
        control.from_all(None)
    except (RuntimeError, ValueError) as error:  # torch's classes of a time-out, a refused connection, a bad port
        mine.problem(
            f"the {ranks.world()} ranks do not meet ({' '.join(str(error).split())[:200]})",
            "set GLOO_SOCKET_IFNAME to the interface that leads to MASTER_ADDR, and let its port through",
            stops=True,
        )
        return False
    return True


def from_the_command_line(config: Config) -> None:
    if stops(doctor(config)):
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main("doctor", from_the_command_line)
