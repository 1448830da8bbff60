"""kill -9 for jobs of several processes, which the launchers put into sessions of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path


def strike(name: str, rank: int | None) -> None:
    """SIGKILL to every process with the override ``name=<name>``, or to one rank of them."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environ = (process / "environ").read_bytes().split(b"\0")
            if f"name={name}" in line and (rank is None or f"RANK={rank}".encode() in environ):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def seconds_to_its_end(process: subprocess.Popen, name: str, rank: int | None, patience_s: float) -> float:
    """Strike a job and wait until it has ended by itself; all of it is killed after ``patience_s``. It must not end as if it were done."""
    begin = time.monotonic()
    strike(name, rank)
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        strike(name, None)
    seconds = time.monotonic() - begin
    strike(name, None)
    assert process.wait() != 0, "a killed job said that it had done its work"
    return seconds
