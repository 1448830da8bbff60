"""Kill -9 a two-rank ZeRO-3 training again and again and see that it ends like an undisturbed one.

    python tools/crash_train.py [--kills 5] [--seed 0]        needs runs/corpus and runs/base (bash launch/demo.sh makes them)

Every rank and the launcher are killed at random moments, checkpoints in the making included; then the same command is given again. Prints the largest
difference of the losses from the undisturbed run's, step by step; exits with 1 where it is above the bound.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
BOUND = 1e-5  # relative; a resumed run repeats the same arithmetic, gloo's reductions may add in another order
OVERRIDES = ["experiment=tiny_4k", "rope.factors=null", "rope.critical_index=12", "rope.tail=[12.8]", "rope.attention_factor=1.155"]


def start(name: str) -> subprocess.Popen:
    """The training under the launcher, in a process group of its own."""
    command = [
        "bash",
        "launch/run.sh",
        "2",
        "train",
        *OVERRIDES,
        f"name={name}",
        f"optim.steps={STEPS}",
        "engine.checkpoint_every_steps=3",
        "logger=jsonl",
    ]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_everything(name: str) -> None:
    """SIGKILL to every process whose command line names the run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if f"name={name}" in line and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def losses(name: str) -> dict[int, float]:
    """step -> loss of a run's metrics.jsonl; every step once."""
    lines = [json.loads(line) for line in (ROOT / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing or stands twice"
    return {line["step"]: line["loss"] for line in lines}


def main() -> int:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for name in ("crash_reference", "crash"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    begin = time.monotonic()
    assert start("crash_reference").wait() == 0, "the undisturbed run failed"
    whole = time.monotonic() - begin
    kills = 0
    while kills < arguments.kills:
        process, moment = start("crash"), rng.uniform(0.25, 0.55) * whole
        try:
            process.wait(timeout=moment)
            break  # it came through between two kills
        except subprocess.TimeoutExpired:
            kills += 1
            kill_everything("crash")
            process.wait()
            metrics = ROOT / "runs" / "crash" / "metrics.jsonl"
            print(
                f"kill {kills}: killed after {moment:.1f} s at step {len(metrics.read_text().splitlines()) if metrics.exists() else 0}",
                file=sys.stderr,
            )
    assert start("crash").wait() == 0, "the resumed run failed"
    expected, found = losses("crash_reference"), losses("crash")
    worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
    print(f"kills: {kills}\nsteps: {len(found)}\nlargest_relative_loss_difference: {worst:.2e}\nbound: {BOUND:.0e}")
    return int(len(found) != STEPS or worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
