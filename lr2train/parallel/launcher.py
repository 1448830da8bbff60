"""Stop a rank whose launcher has died: the process sends itself SIGTERM, so it ends the step in hand, writes a
checkpoint and leaves.

Choice: a thread checks once a second whether the launchers above this process still run. The ``deepspeed`` command
passes no signal on to its ranks, and no launcher can pass SIGKILL on, so ranks would train on for ever. Only parents
that are launchers by their command line are watched: under ``nohup`` a shell may end before its job. Cost: one look
into /proc each second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import PurePath

import psutil

from lr2train.progress import say

_PROGRAMS = {"deepspeed", "torchrun"}
_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_EVERY_S = 1.0


def watch_launcher() -> None:
    """Start watching the launchers of this process, if there are any."""
    found = launchers(psutil.Process())
    if found:
        threading.Thread(target=_watch, args=(found,), name="watch-launcher", daemon=True).start()


def launchers(process: psutil.Process) -> list[psutil.Process]:
    """The launchers above a process, nearest first; empty where the parent is another program."""
    return list(takewhile(_is_launcher, process.parents()))


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:8]
    except psutil.Error:
        return False
    return any(PurePath(word).name in _PROGRAMS or word in _MODULES for word in words)


def _watch(watched: Sequence[psutil.Process]) -> None:
    while all(map(_runs, watched)):
        time.sleep(_EVERY_S)
    say("launcher", "the launcher has ended without a signal; this job ends its step, writes a checkpoint and leaves")
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
