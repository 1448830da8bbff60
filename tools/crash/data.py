"""kill -9 at random moments: of tokenizing in ``prepare`` (real processes, two workers), and of a training epoch.

    python -m tools.crash.data [--quick]

Tokenizing: the job is killed at a random moment after it has begun a token shard, and is started again. A job that ends
before its kill is compared with an undisturbed one, and the next job begins anew. A finished token shard must not be
made again: its manifest keeps time and inode over the restart. Text as in ``bench.data_tokenize``; the epoch is in
``data_epoch``. The last lines read ``name: value``. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.bench.data_tokenize import write_text
from tools.bench.figures import Figure, conclude
from tools.crash import data_epoch

KILLS, QUICK_KILLS = 20, 4
TEXT_BYTES = 12_000_000
SHARD_BYTES = 300_000
WORKERS = 2
LATEST_S = 4.0  # latest kill, after the job has begun a token shard
ROOT = Path(__file__).resolve().parent.parent.parent
DATA = (".bin", ".idx", ".lengths.npy", ".targets.npy", ".hashes.npy", ".origins.txt")


def measure(quick: bool) -> Iterable[Any]:
    """Figures of tokenizing and of an epoch."""
    yield from _stage_1(QUICK_KILLS if quick else KILLS)
    yield from data_epoch.measure(quick)


def _stage_1(kills: int) -> Iterable[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_text(folder, TEXT_BYTES)
        _finish(_start(folder, "undisturbed"))
        wanted = _contents(folder / "undisturbed")
        found = _kill_repeatedly(folder, kills, wanted)
    print(
        f"stage 1: {len(wanted) // len(DATA) // 2} shards; killed with so many finished: "
        f"{', '.join(map(str, found['finished']))}"
    )
    yield Figure("stage_1_kills", len(found["finished"]), at_least=kills)
    yield Figure("stage_1_finished_shards_made_again", found["again"], at_most=0)
    yield Figure("stage_1_most_shards_in_hand_lost", max(found["lost"]), at_most=WORKERS)
    yield Figure("stage_1_corpora_compared", found["compared"], at_least=1)
    yield Figure("stage_1_corpora_that_differ", found["differ"], at_most=0)


def _kill_repeatedly(folder: Path, kills: int, wanted: dict[str, bytes]) -> dict[str, Any]:
    moment = random.Random(0)
    found: dict[str, Any] = {"finished": [], "lost": [], "again": 0, "compared": 0, "differ": 0}
    done: dict[str, tuple[int, int]] = {}
    while True:
        leftovers = _partial(folder / "disturbed")
        job = _start(folder, "disturbed")
        killed = len(found["finished"]) < kills and _kill_at(
            job, folder / "disturbed", leftovers, moment.uniform(0, LATEST_S)
        )
        if not killed:
            _finish(job)
        now = _finished(folder / "disturbed")
        found["again"] += sum(now.get(name) != stamp for name, stamp in done.items())
        done = now
        if killed:
            found["finished"].append(len(now))
            found["lost"].append(_begun(folder / "disturbed"))
        else:
            found["compared"] += 1
            found["differ"] += _contents(folder / "disturbed") != wanted
            shutil.rmtree(folder / "disturbed")
            done = {}
            if len(found["finished"]) >= kills:
                return found


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    overrides = [
        f"data.sources=[{{name: text, path: {folder / 'documents.jsonl'}}}]",
        f"data.tokenizer={folder / 'tokenizer.json'}", "data.segment_tokens=16384",
        "model.original_window_tokens=2048", f"data.shard_bytes={SHARD_BYTES}", f"data.workers={WORKERS}",
        f"runs_folder={folder}", f"name={name}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "lr2train.prepare", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=(folder / f"{name}.log").open("a")
    )


def _finish(job: subprocess.Popen[bytes]) -> None:
    if job.wait():
        raise RuntimeError(f"prepare ended with {job.returncode}: {job.args}")


def _kill_at(job: subprocess.Popen[bytes], folder: Path, leftovers: set[str], delay_s: float) -> bool:
    """Kill the job ``delay_s`` after it has begun a token shard; False where it ended before."""
    while job.poll() is None and not _partial(folder) - leftovers:
        time.sleep(0.01)
    try:
        job.wait(delay_s)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGKILL)
    return job.wait() == -signal.SIGKILL


def _finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Finished token shards -> (inode, time), which change where a shard is made again."""
    files = {file.name: file.stat() for file in folder.glob("store/text/train-*.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def _begun(folder: Path) -> int:
    """Token shards that were unfinished."""
    return len({name.split(".")[1].split("-")[1] for name in _partial(folder)})


def _partial(folder: Path) -> set[str]:
    """Temporary files of token shards, of a running or a killed writer."""
    return {file.name for file in folder.glob("store/text/.*-*.bin.*.tmp")}


def _contents(folder: Path) -> dict[str, bytes]:
    """File name -> content of the corpus's data files."""
    return {file.name: file.read_bytes() for file in folder.glob("store/text/*") if file.name.endswith(DATA)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills")
    sys.exit(conclude(measure(parser.parse_args().quick)))
