"""kill -9 for jobs of several processes, which launchers start in sessions of their own."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def begin(doc: str | None, job: str, name: str) -> argparse.Namespace:
    """Read the command line of a proof, and remove the runs ``name`` and ``<name>_reference`` of an earlier call."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help=f"overrides of the {job}'s config")
    arguments = parser.parse_args()
    for one in (name, f"{name}_reference"):
        shutil.rmtree(ROOT / "runs" / one, ignore_errors=True)
        (ROOT / "runs" / f"{one}.log").unlink(missing_ok=True)
    return arguments


def start(verb: str, world: int, name: str, overrides: Sequence[str]) -> subprocess.Popen:
    """Start a verb on ``world`` CPU ranks in its own process group; its output goes to ``runs/<name>.log``."""
    command = [sys.executable, "-m", f"lr2train.{verb}"] if world == 1 else ["bash", "launch/run.sh", str(world), verb]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with (ROOT / "runs" / f"{name}.log").open("a") as log:
        whole = [*command, *overrides, f"name={name}"]
        return subprocess.Popen(whole, cwd=ROOT, env=environ, start_new_session=True, stdout=log, stderr=log)


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
