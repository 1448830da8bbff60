"""kill -9 a search repeatedly, on one, two and four ranks in turn: it must end as an undisturbed search does.

    python -m tools.crash.search [--kills 6] [--seed 0] [search=paper …]

Needs runs/corpus, which ``bash launch/demo.sh`` makes. Every second kill hits one rank alone; then the
job must end by itself within a minute, with its journal intact. The other kills hit all processes at once. After each
kill the same search is started on another number of ranks. The last lines read ``name: value``. Exits with 1 where a
bound is missed.
"""

import json
import random
import subprocess
import sys
import time

from lr2train.rope.factors import Factors
from tools.crash import killing
from tools.crash.killing import ROOT, begin, seconds_to_its_end

END_BOUND_S = 60.0  # within which the death of a rank has to end the job
NAME = "crash_search"
OVERRIDES = [
    "experiment=tiny_4k", "rope.target_window_tokens=1024", "search.population=16", "search.top_k=4",
    "search.generations=5", "search.documents=3", "search.questions=8", "search.distractors=4",
    "search.final_documents=4", "device=cpu", "threads=1",
]  # fmt: skip


def start(name: str, world: int, overrides: list[str]) -> subprocess.Popen:
    """Start the search on ``world`` ranks."""
    return killing.start("search", world, name, [*OVERRIDES, *overrides])


def evaluations() -> list[dict]:
    """Complete lines of the journal; a kill may cut the last line."""
    file = ROOT / "runs" / NAME / "journal.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(process: subprocess.Popen, lines: int) -> bool:
    """Wait until the journal has so many lines; False where the search ended before."""
    while process.poll() is None:
        if len(evaluations()) >= lines:
            return True
        time.sleep(0.02)
    return False


def one_round(number: int, world: int, rng: random.Random, overrides: list[str]) -> float | None:
    """Start and kill the search.

    Returns:
        Seconds from the death of one rank to the end of the job; 0 where all processes were killed; None where the
        search ended before the kill.
    """
    process, alone = start(NAME, world, overrides), number % 2 == 1 and world > 1
    reached = wait_for(process, len(evaluations()) + rng.randint(1, 12))
    if not reached:
        assert process.returncode == 0, (
            f"the search on {world} ranks ended with {process.returncode}: see runs/{NAME}.log"
        )
        return None
    seconds = seconds_to_its_end(process, NAME, rng.randrange(world) if alone else None, 4 * END_BOUND_S)
    print(
        f"kill {number}: {'one rank' if alone else 'everything'} of {world}, {len(evaluations())} evaluations, ended "
        f"after {seconds:.1f} s",
        file=sys.stderr,
    )
    return seconds if alone else 0.0


def main() -> int:
    """Run, kill and compare; the exit status."""
    arguments = begin(__doc__, "search", NAME)
    rng = random.Random(arguments.seed)
    assert start(f"{NAME}_reference", 1, arguments.overrides).wait() == 0, "the undisturbed search failed"
    ends = []
    for number in range(arguments.kills):
        end = one_round(number, (4, 2, 1, 4)[number % 4], rng, arguments.overrides)
        if end is None:
            break
        ends.append(end)
    assert start(NAME, 2, arguments.overrides).wait() == 0, "the resumed search failed"
    return report(ends)


def report(ends: list[float]) -> int:
    """Compare with the undisturbed search and print the figures; the exit status."""
    folders = [ROOT / "runs" / name for name in (NAME, f"{NAME}_reference")]
    same_winner = Factors.load(folders[0] / "factors.json") == Factors.load(folders[1] / "factors.json")
    keys = ("best", "best_perplexity", "perplexities", "documents", "document_forwards")
    histories = [
        [[json.loads(line)[key] for key in keys] for line in (one / "generations.jsonl").read_text().splitlines()]
        for one in folders
    ]
    entries = evaluations()
    twice = len(entries) - len({(entry["candidate"], entry["document"]) for entry in entries})
    print(
        f"kills: {len(ends)}\nevaluations: {len(entries)}\nevaluated_twice: "
        f"{twice}\nslowest_end_after_the_death_of_a_rank_s: {max(ends, default=0.0):.1f}"
    )
    print(f"same_generations: {histories[0] == histories[1]}\nsame_winner: {same_winner}")
    return int(
        not (same_winner and histories[0] == histories[1] and twice == 0 and max(ends, default=0.0) < END_BOUND_S)
    )


if __name__ == "__main__":
    sys.exit(main())
