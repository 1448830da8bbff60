"""Start the verb train in a process of its own, through the door of the command line.

Choice: the process forks from the server of ``ranks``, which has imported torch and DeepSpeed, so that a start takes a
second instead of five.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ranks import forking


class Ended(NamedTuple):
    code: int  # the exit code; minus the number of the signal that killed the process
    err: str  # stderr


def train(
    arguments: Sequence[str], folder: Path, strike: tuple[int, int] | None = None, timeout_s: float = 120.0
) -> Ended:
    """Run ``train`` with the arguments of a command line to its end.

    ``strike``: (n, signal): the process sends itself the signal when its n-th step begins. ``folder`` takes a file for
    stderr.
    """
    err = folder / "stderr"
    process = forking().Process(target=_train, args=(list(arguments), err, strike, dict(os.environ)), daemon=True)
    process.start()
    process.join(timeout_s)
    process.kill()  # does nothing to a process that has ended
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, err.read_text())


def _train(arguments: list[str], err: Path, strike: tuple[int, int] | None, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    gc.freeze()  # as the ranks do
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

    from lr2train.cli.door import main
    from lr2train.train import train

    sys.argv = ["train", *arguments]
    if strike:
        strike_in_step(*strike)
    main("train", train)


def strike_in_step(nth: int, number: int) -> None:
    """Have this process send itself a signal when its n-th step begins."""
    from lr2train.training.deepspeed.engine import Engine

    own, begun = Engine.step, []

    def step(engine, *arguments):
        begun.append(0)
        if len(begun) == nth:
            os.kill(os.getpid(), number)
        return own(engine, *arguments)

    Engine.step = step
