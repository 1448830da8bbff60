"""kill -9 a ZeRO-3 training repeatedly, on one, two and four ranks in turn: it must end as an undisturbed one does.

    python -m tools.crash.train [--kills 6] [--seed 0] [data.path=… model.path=…]

Needs runs/corpus, which ``bash launch/demo.sh`` makes. Kills hit during a step, while a checkpoint is
written, and right after a checkpoint was read on other ranks. Every second kill hits one rank alone; then the job must
end by itself. After each kill the same training is started with other ranks and another ``parallel.sp``. The last lines
read ``name: value``. Exits with 1 where a bound is missed.
"""

import json
import random
import subprocess
import sys
import time

from tools.crash import killing
from tools.crash.killing import ROOT, begin, seconds_to_its_end

STEPS = 24
BOUND = 1e-5  # relative; other ranks sum fp32 in another order, over 24 steps of AdamW
END_BOUND_S = 60.0  # within which the death of a rank has to end the job
NAME = "crash_train"
PLACES = [(2, 1), (4, 2), (1, 1), (2, 2), (4, 4)]  # (ranks, parallel.sp)
OVERRIDES = [
    "experiment=tiny_4k", "rope.factors=null", "rope.critical_index=12", "rope.tail=[12.8]",
    "rope.attention_factor=1.155", f"optim.steps={STEPS}", "data.group_segments=2",
    "engine.checkpoint_every_steps=2", "logger=jsonl", "device=cpu", "threads=1",
]  # fmt: skip


def start(name: str, world: int, sp: int, overrides: list[str]) -> subprocess.Popen:
    """Start the training on ``world`` ranks, ``sp`` of which share a segment."""
    return killing.start("train", world, name, [*OVERRIDES, *overrides, f"parallel.sp={sp}"])


def losses(name: str) -> dict[int, float]:
    """step -> loss from metrics.jsonl, without a cut last line; each step must occur once."""
    file = ROOT / "runs" / name / "metrics.jsonl"
    text = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    lines = [line for line in lines if line["step"]]  # step 0 has the held-out loss alone
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing or recorded twice"
    return {line["step"]: line["loss"] for line in lines}


def written_by() -> int | None:
    """Ranks that wrote the latest checkpoint; None without a checkpoint."""
    folder = ROOT / "runs" / NAME / "checkpoints"
    latest = folder.with_name("checkpoints.latest.json")
    if not latest.exists():
        return None
    tag = json.loads(latest.read_text())["tag"]
    return json.loads((folder / tag / "manifest.json").read_text())["world"]


def divided_anew() -> int:
    """Checkpoints so far that were read on another number of ranks, from the log."""
    return (ROOT / "runs" / f"{NAME}.log").read_text().count("was divided anew")


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Wait until ``condition()``; False where the training ended before."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return False


def moment(kind: str, rng: random.Random):
    """A condition: some steps later, at the begin of a checkpoint, or after one was read on other ranks."""
    folder, before, begun = ROOT / "runs" / NAME, len(losses(NAME)), divided_anew()
    if kind == "step":
        further = rng.randint(2, 5)
        return lambda: len(losses(NAME)) >= min(before + further, STEPS)
    if kind == "read":
        return lambda: divided_anew() > begun
    known = set(folder.glob("checkpoints/step_*"))
    return lambda: bool(set(folder.glob("checkpoints/step_*")) - known)


def one_round(number: int, rng: random.Random, overrides: list[str]) -> float | None:
    """Start and kill the training.

    Returns:
        Seconds from the death of one rank to the end of the job; 0 where all processes were killed; None where the
        training ended before the kill.
    """
    (world, sp), alone = PLACES[number % len(PLACES)], number % 2 == 1
    kind = ("writing", "step", "read")[number % 3]
    if kind == "read" and written_by() in (None, world):
        kind = "step"  # the same ranks divide nothing anew
    process = start(NAME, world, sp, overrides)
    if not wait_for(process, moment(kind, rng)):
        assert process.returncode == 0, (
            f"the training on {world} ranks ended with {process.returncode}: see runs/{NAME}.log"
        )
        return None
    seconds = seconds_to_its_end(process, NAME, rng.randrange(world) if alone else None, 4 * END_BOUND_S)
    print(
        f"kill {number}: {'one rank' if alone else 'everything'} of {world} (sp {sp}), moment: {kind}, "
        f"{len(losses(NAME))} steps in metrics.jsonl, "
        f"ended after {seconds:.1f} s",
        file=sys.stderr,
    )
    return seconds if alone else 0.0


def main() -> int:
    """Run, kill and compare; the exit status."""
    arguments = begin(__doc__, "training", NAME)
    rng = random.Random(arguments.seed)
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
    """Compare with the undisturbed training and print the figures; the exit status."""
    expected, found = losses(f"{NAME}_reference"), losses(NAME)
    worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
    last = abs(found[STEPS] - expected[STEPS]) / expected[STEPS]
    print(f"kills: {len(ends)}\nsteps: {len(found)}\ncheckpoints_read_on_other_ranks: {divided_anew()}")
    print(f"slowest_end_after_the_death_of_a_rank_s: {max(ends, default=0.0):.1f}")
    print(
        f"largest_relative_loss_difference: {worst:.2e}\nrelative_difference_of_the_last_loss: {last:.2e}\nbound: "
        f"{BOUND:.0e}"
    )
    return int(len(found) != STEPS or worst > BOUND or max(ends, default=0.0) > END_BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
