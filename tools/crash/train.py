"""Kill -9 a ZeRO-3 training again and again, on one, two and four ranks in turn, and see that it ends like an undisturbed one.

    python -m tools.crash.train [--kills 6] [--seed 0] [data.path=... model.path=...]    needs runs/corpus and runs/base (bash launch/demo.sh makes them)

Kills strike in a step, while a checkpoint is written, and when one has just been read (reading writes nothing). Every second one strikes one rank alone:
the job has to end by itself. Then the same training is started again on another number of ranks, which share segments otherwise (`parallel.sp`).
Figures last, one a line as ``name: value``; exits with 1 where a bound is missed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.crash.striking import seconds_to_its_end

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 24
BOUND = 1e-5  # relative; fp32 sums in another order on other ranks, carried on by 24 steps of AdamW
END_BOUND_S = 60.0  # within which the death of a rank has to end the job
NAME = "crash_train"
PLACES = [(2, 1), (4, 2), (1, 1), (2, 2), (4, 4)]  # ranks, and how many of them share a segment
OVERRIDES = [
    "experiment=tiny_4k", "rope.factors=null", "rope.critical_index=12", "rope.tail=[12.8]", "rope.attention_factor=1.155", f"optim.steps={STEPS}",
    "data.group_segments=2", "engine.checkpoint_every_steps=2", "logger=jsonl", "device=cpu", "threads=1",
]  # fmt: skip


def start(name: str, world: int, sp: int, overrides: list[str]) -> subprocess.Popen:
    """The training on so many ranks, in a process group of its own; what it says goes to a file."""
    verb = [sys.executable, "-m", "lr2train.train"] if world == 1 else ["bash", "launch/run.sh", str(world), "train"]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with (ROOT / "runs" / f"{name}.log").open("a") as log:
        command = [*verb, *OVERRIDES, *overrides, f"parallel.sp={sp}", f"name={name}"]
        return subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, stdout=log, stderr=log)


def losses(name: str) -> dict[int, float]:
    """step -> loss of a run's metrics.jsonl, but for a cut last line; every step once."""
    file = ROOT / "runs" / name / "metrics.jsonl"
    text = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing or stands twice"
    return {line["step"]: line["loss"] for line in lines}


def written_by() -> int | None:
    """How many ranks wrote the latest checkpoint."""
    folder = ROOT / "runs" / NAME / "checkpoints"
    latest = folder.with_name("checkpoints.latest.json")
    if not latest.exists():
        return None
    tag = json.loads(latest.read_text())["tag"]
    return json.loads((folder / tag / "manifest.json").read_text())["world"]


def divided_anew() -> int:
    """How often a checkpoint was read on other ranks than wrote it."""
    return (ROOT / "runs" / f"{NAME}.log").read_text().count("was divided anew")


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Until something is seen from outside; False where the training ended before."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return False


def moment(kind: str, rng: random.Random):
    """A condition that comes true once: when a step is done, when a checkpoint has been begun, when one has been read on other ranks."""
    folder, before, begun = ROOT / "runs" / NAME, len(losses(NAME)), divided_anew()
    if kind == "step":
        further = rng.randint(2, 5)
        return lambda: len(losses(NAME)) >= min(before + further, STEPS)
    if kind == "read":
        return lambda: divided_anew() > begun
    known = set(folder.glob("checkpoints/step_*"))
    return lambda: bool(set(folder.glob("checkpoints/step_*")) - known)


def one_round(number: int, rng: random.Random, overrides: list[str]) -> float | None:
    """Start, kill, and see how the job ends; the seconds to its end where one rank was killed, None where the training came through."""
    (world, sp), alone = PLACES[number % len(PLACES)], number % 2 == 1
    kind = ("writing", "step", "read")[number % 3]
    if kind == "read" and written_by() in (None, world):
        kind = "step"  # nothing is divided anew
    process = start(NAME, world, sp, overrides)
    if not wait_for(process, moment(kind, rng)):
        assert process.returncode == 0, f"the training on {world} ranks ended with {process.returncode}: see runs/{NAME}.log"
        return None
    seconds = seconds_to_its_end(process, NAME, rng.randrange(world) if alone else None, 4 * END_BOUND_S)
    print(
        f"kill {number}: {'one rank' if alone else 'everything'} of {world} (sp {sp}), moment: {kind}, {len(losses(NAME))} steps in metrics.jsonl, "
        f"ended after {seconds:.1f} s",
        file=sys.stderr,
    )
    return seconds if alone else 0.0


def main() -> int:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of the training's config")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for name in (NAME, f"{NAME}_reference"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
        (ROOT / "runs" / f"{name}.log").unlink(missing_ok=True)
    assert start(f"{NAME}_reference", 2, 2, arguments.overrides).wait() == 0, (
        f"the undisturbed training failed: see runs/{NAME}_reference.log"
    )
    ends = []
    for number in range(arguments.kills):
        end = one_round(number, rng, arguments.overrides)
        if end is None:
            break
        ends.append(end)
    world, sp = PLACES[arguments.kills % len(PLACES)]
    assert start(NAME, world, sp, arguments.overrides).wait() == 0, f"the resumed training failed: see runs/{NAME}.log"
    return report(ends)


def report(ends: list[float]) -> int:
    """Compare with the undisturbed training and print the figures."""
    expected, found = losses(f"{NAME}_reference"), losses(NAME)
    worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
    last = abs(found[STEPS] - expected[STEPS]) / expected[STEPS]
    print(f"kills: {len(ends)}\nsteps: {len(found)}\ncheckpoints_read_on_other_ranks: {divided_anew()}")
    print(f"slowest_end_after_the_death_of_a_rank_s: {max(ends, default=0.0):.1f}")
    print(f"largest_relative_loss_difference: {worst:.2e}\nrelative_difference_of_the_last_loss: {last:.2e}\nbound: {BOUND:.0e}")
    return int(len(found) != STEPS or worst > BOUND or max(ends, default=0.0) > END_BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
