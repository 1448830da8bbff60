"""kill -9 for jobs of several processes, which launchers start in sessions of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path


def kill(name: str, rank: int | None) -> None:
    """SIGKILL every process with the override ``name=<name>``, or one rank of them."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environ = (process / "environ").read_bytes().split(b"\0")
            if f"name={name}" in line and (rank is None or f"RANK={rank}".encode() in environ):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def seconds_to_its_end(process: subprocess.Popen, name: str, rank: int | None, patience_s: float) -> float:
    """Kill a rank (None: all processes) and wait for the job's end; after ``patience_s`` the whole job is killed.

    The job must not end with exit code 0.
    """
    begin = time.monotonic()
    kill(name, rank)
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        kill(name, None)
    seconds = time.monotonic() - begin
    kill(name, None)
    assert process.wait() != 0, "a killed job ended with exit code 0"
    return seconds
