"""Do to a running ZeRO-3 training what machines do to it, and print what came of it as a table.

    python -m tools.crash.faults [--kills 10] [--seed 0] [--only WORD] [--again]

Every case trains a very small model on CPU ranks without a launcher, so ranks have to end by themselves. A fault is
real: SIGKILL, SIGSTOP, a full file system (a small tmpfs; where this process may not mount one, a limit of the file
size), a flipped byte, a file without read permission. Then the same command is started again. A case holds where every
rank ended in time, with the right exit code and the reason on stderr, and where the losses of all steps and the weights
at the end are those of an undisturbed training, bit for bit.

Needs nothing but the checkout. Finished cases are kept in runs/crash_faults/faults.json and not done again, unless
--again is given. The table goes to stdout and to runs/crash_faults/table.md. Exits with 1 where a case does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tools.crash.killing import ROOT

STEPS, EVERY = 40, 2
HOME = ROOT / "runs" / "crash_faults"
END_S = 30.0  # within which a fault has to end all ranks that are left
PATIENCE_S = 240.0  # for a whole training on a busy machine
TIMEOUT_S = 6  # parallel.timeout_s of the cases with a stopped rank
ALL = -1  # of ranks
TEXT = (
    40
    * "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n"
)


def overrides(name: str, runs: Path = HOME) -> list[str]:
    """The command line of a case."""
    return [
        f"runs_folder={runs}", f"name={name}", "experiment=tiny_4k", "model.path=null", "rope=longrope2",
        "rope.factors=null", "rope.critical_index=2", "rope.tail=[2.0]", "rope.target_window_tokens=128",
        "model.original_window_tokens=64", "model.architecture.max_position_embeddings=64",
        "model.architecture.hidden_size=32", "model.architecture.head_dim=16",
        "model.architecture.num_hidden_layers=1", "model.architecture.vocab_size=400",
        "model.architecture.intermediate_size=48", "data.vocab_size=400", "data.segment_tokens=128",
        "data.short_tokens=0", "data.long_tokens=0", f"data.path={HOME}/corpus",
        f"data.sources=[{{name: text, kind: folder, path: {HOME}/text}}]", "parallel.sp=1", "optim.warmup_steps=2",
        "optim.segments_per_step=4", "optim.lr=1e-2", "threads=1", "device=cpu", "logger=jsonl",
        f"optim.steps={STEPS}", f"engine.checkpoint_every_steps={EVERY}",
    ]  # fmt: skip


# ---- one start ----


class Fault(NamedTuple):
    """What happens inside a rank.

    Attributes:
        kind: a key of ``INSIDE``.
        rank: where; ALL: on every rank.
        nth: at the n-th step or checkpoint of the start.
        at: a number between 0 and 1 that chooses the moment within.
    """

    kind: str
    rank: int
    nth: int = 1
    at: float = 0.0


class Ended(NamedTuple):
    """How a start ended.

    Attributes:
        codes: exit codes by rank, negative for a signal; None for a rank that had not ended in time.
        errs: stderr by rank.
        seconds: from the fault (or the start, without one) to the end of the last rank.
    """

    codes: list[int | None]
    errs: list[str]
    seconds: float


def start(
    arguments: Sequence[str],
    world: int,
    fault: Fault | None = None,
    patience_s: float = PATIENCE_S,
    left: Sequence[int] = (),
) -> Ended:
    """Run ``train`` on ``world`` ranks to its end.

    Args:
        arguments: of the command line.
        world: ranks.
        fault: inside a rank.
        patience_s: after the fault, or after the start without one; then the ranks are killed.
        left: ranks that are not waited for, and killed when the others have ended.
    """
    from tests.ranks import forking

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    struck = HOME / "struck"
    struck.unlink(missing_ok=True)
    process = forking().Process
    ranks = [
        process(target=_rank, args=(rank, world, port, list(arguments), fault), daemon=True) for rank in range(world)
    ]
    for one in ranks:
        one.start()
    began = _wait(ranks, left, struck, patience_s if fault is None else PATIENCE_S, patience_s)
    codes = [one.exitcode for one in ranks]
    seconds = time.time() - began
    for one in ranks:
        one.kill()
        one.join()
    return Ended(codes, [(HOME / f"{rank}.err").read_text(errors="replace") for rank in range(world)], seconds)


def _wait(ranks: list[BaseProcess], left: Sequence[int], struck: Path, before_s: float, after_s: float) -> float:
    """Wait for the ranks; returns the time of the fault, or of the start."""
    began, limit = time.time(), time.time() + before_s
    awaited = [one for number, one in enumerate(ranks) if number not in left]
    fell = False
    while any(one.exitcode is None for one in awaited) and time.time() < limit:
        if not fell and struck.exists():
            fell, began = True, struck.stat().st_mtime
            limit = began + after_s
        time.sleep(0.02)
    return struck.stat().st_mtime if struck.exists() else began


def _rank(rank: int, world: int, port: int, arguments: list[str], fault: Fault | None) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    err = os.open(HOME / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 1)
    os.dup2(err, 2)

    from lr2train.cli.door import main
    from lr2train.train import train

    if fault is not None and fault.rank in (rank, ALL):
        INSIDE[fault.kind](fault)
    sys.argv = ["train", *arguments]
    main("train", train)


# ---- faults inside a rank ----


def strike(number: int = signal.SIGKILL) -> None:
    """Send this process a signal, and note when."""
    (HOME / "struck").touch()
    os.kill(os.getpid(), number)


def in_step(fault: Fault, act: Callable[[], None]) -> None:
    """Call ``act`` when the n-th step of this start begins."""
    from lr2train.training.deepspeed.engine import Engine

    own, begun = Engine.step, []

    def step(engine: Any, *arguments: Any) -> Any:
        begun.append(0)
        if len(begun) == fault.nth:
            act()
        return own(engine, *arguments)

    Engine.step = step


def kill_in_step(fault: Fault) -> None:
    """SIGKILL at any moment of the n-th step, or shortly after."""
    in_step(fault, lambda: threading.Timer(0.1 * fault.at, strike).start())


def stop_in_step(fault: Fault) -> None:
    """SIGSTOP at the begin of the n-th step."""
    in_step(fault, lambda: strike(signal.SIGSTOP))


def terminate_in_step(fault: Fault) -> None:
    """SIGTERM at the begin of the n-th step."""
    in_step(fault, lambda: strike(signal.SIGTERM))


def fail_in_step(fault: Fault) -> None:
    """A defect on one rank."""

    def fail() -> None:
        (HOME / "struck").touch()
        raise ArithmeticError("out of memory, say")

    in_step(fault, fail)


def fail_and_block(fault: Fault) -> None:
    """One rank fails; the others wait for an event, as a rank under nccl waits for its device: no peer wakes them."""
    failing = int(os.environ["RANK"]) == 1
    fail_in_step(fault) if failing else in_step(fault, lambda: threading.Event().wait() and None)


def kill_while_writing(fault: Fault) -> None:
    """SIGKILL at one of six moments of the n-th checkpoint: in a file, after it, after all of a rank's files, and on
    rank 0 before the manifest, after it, and after the name.
    """
    from lr2train.training.deepspeed import checkpoint

    moment, begun = int(fault.at * 6), []
    draft, written, publish, name = (
        checkpoint.draft, checkpoint.Draft._written, checkpoint._publish, checkpoint._name_latest
    )  # fmt: skip

    def due() -> bool:
        return len(begun) == fault.nth

    def drafted(*arguments: Any) -> Any:
        begun.append(0)
        return draft(*arguments)

    def write(self: Any, path: Path, state: Any) -> Any:
        if due() and moment == 0:
            self.put(state, str(path))
            os.truncate(path, path.stat().st_size // 2)
            strike()
        found = written(self, path, state)
        if due() and (moment == 1 or (moment == 2 and path == self.states[-1][0])):
            strike()
        return found

    def published(*arguments: Any) -> None:
        if due() and moment == 3:
            strike()
        publish(*arguments)

    def named(*arguments: Any) -> None:
        if due() and moment == 4:
            strike()
        name(*arguments)
        if due() and moment == 5:
            strike()

    checkpoint.draft, checkpoint.Draft._written = drafted, write
    checkpoint._publish, checkpoint._name_latest = published, named


def small_files(fault: Fault) -> None:
    """No file of this process may grow beyond a few bytes from the n-th step on: as on a full disk, a short write."""
    in_step(fault, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY)))


def without_the_rights_of_root(_: Fault) -> None:
    """Drop the capabilities with which root reads a file without read permission (CAP_DAC_OVERRIDE, _READ_SEARCH)."""
    if os.geteuid() != 0:
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # effective
    assert libc.capset(header, sets) == 0


INSIDE: dict[str, Callable[[Fault], None]] = {
    "kill_in_step": kill_in_step,
    "stop_in_step": stop_in_step,
    "terminate_in_step": terminate_in_step,
    "fail_in_step": fail_in_step,
    "fail_and_block": fail_and_block,
    "kill_while_writing": kill_while_writing,
    "small_files": small_files,
    "without_the_rights_of_root": without_the_rights_of_root,
}


# ---- what came of it ----


def losses(folder: Path) -> dict[int, float]:
    """step -> loss from metrics.jsonl, as written; each step must stand once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "a step is missing or stands twice"
    return {line["step"]: line["loss"] for line in lines}


def same_end(folder: Path, world: int) -> str:
    """Whether losses and weights are those of the undisturbed training on as many ranks."""
    expected = HOME / f"reference_{world}"
    if losses(folder) != losses(expected):
        return "DIFFERENT losses"
    weights = [(one / "model" / "model.safetensors").read_bytes() for one in (folder, expected)]
    return "the same, bit for bit" if weights[0] == weights[1] else "DIFFERENT weights"


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    ranks: int
    times: int
    seconds: float  # the slowest end
    codes: str
    reason: str
    goes_on: str
    losses: str
    holds: bool


def last_line(err: str) -> str:
    """The last line that lr2train or Python printed, without what differs from start to start."""
    lines = [line.strip() for line in err.splitlines() if line.strip() and not line.startswith(("[W", "[I", "frame #"))]
    said = lines[-1] if lines else ""
    said = re.sub(r"^(train|lr2train)( \(rank \d+\))?: ", "", said).replace(str(HOME), "runs")
    return re.sub(r"\((seen by rank \d+): .*", r"(\1 …)", said)


def check(ended: Ended, codes: set[int], says: str, silent: Sequence[int] = ()) -> list[str]:
    """What is wrong with the end of a start.

    Args:
        ended: of the start.
        codes: the exit codes that ranks may have.
        says: a pattern that stderr of every rank holds, except the ``silent``.
        silent: ranks that were killed or stopped.
    """
    wrong = []
    for rank, (code, err) in enumerate(zip(ended.codes, ended.errs, strict=True)):
        if rank in silent:
            continue
        if code not in codes:
            wrong.append(f"rank {rank} ended with {code}")
        if not re.search(says, err):
            wrong.append(f"rank {rank} did not say why: {err[-300:]}")
    return wrong


def go_on(name: str, world: int, more: Sequence[str] = (), runs: Path = HOME) -> tuple[str, str]:
    """Start the command again to its end; returns what is wrong, and how losses and weights compare."""
    ended = start([*overrides(name, runs), *more], world)
    if set(ended.codes) != {0}:
        return f"the same command ended with {ended.codes}: {ended.errs[0][-500:]}", "-"
    return "", same_end(runs / name, world)


GONE = r"rank \d+( or its machine)? is gone|a rank is gone or does not answer"


def row(fault: str, ended: Sequence[Ended], wrong: list[str], went_on: tuple[str, str], how: str, reason: str) -> Row:
    """The line of a case; what is wrong goes to stderr."""
    wrong = [*wrong, *filter(None, [went_on[0]])]
    for one in wrong:
        print(f"{fault}: {one}", file=sys.stderr)
    found = sorted({str(code) for one in ended for code in one.codes if code is not None and code >= 0})
    holds = not wrong and went_on[1].startswith("the same")
    slowest = max((one.seconds for one in ended), default=0.0)
    world = len(ended[0].codes)
    return Row(fault, world, len(ended), slowest, ", ".join(found) or "-", reason, how, went_on[1], holds)


# ---- cases ----


def killed(fault: str, kind: str, world: int, times: int, rng: random.Random, moments: Callable[[int], Fault]) -> Row:
    """SIGKILL ``times`` times in one run: one rank, or every third time all ranks."""
    name, ends, wrong = f"{kind}_{world}", [], []
    reason = ""
    for number in range(times):
        strike_at = moments(number)
        ended = start(overrides(name), world, strike_at, END_S)
        silent = [rank for rank, code in enumerate(ended.codes) if code == -signal.SIGKILL]
        if not silent:
            wrong.append(f"kill {number} did not hit: {ended.codes}")
        wrong += check(ended, {1}, GONE, silent)
        others = [last_line(err) for rank, err in enumerate(ended.errs) if rank not in silent]
        reason = reason or next(iter(others), "")
        ends.append(ended)
        print(f"{fault} {number}: {ended.codes} after {ended.seconds:.1f} s", file=sys.stderr)
    return row(fault, ends, wrong, go_on(name, world), "the same command", reason)


def case_kill_in_step(times: int, rng: random.Random) -> Row:
    def moment(number: int) -> Fault:
        where = ALL if number % 3 == 2 else rng.randrange(2)
        return Fault("kill_in_step", where, rng.randint(1, 4), rng.random())

    return killed("kill -9 of a rank, or of all, in a random step", "kill_in_step", 2, times, rng, moment)


def case_kill_while_writing(times: int, rng: random.Random) -> Row:
    def moment(number: int) -> Fault:
        place = number % 6
        where = 0 if place > 2 else rng.randrange(4)  # rank 0 alone writes manifest and name
        return Fault("kill_while_writing", where, 1 + number % 2, (place + 0.5) / 6)

    return killed("kill -9 while a checkpoint is written", "kill_while_writing", 4, times, rng, moment)


def case_full_disk(_: int, rng: random.Random) -> Row:
    name, disk = "full_disk", HOME / "disk"
    size = sum(path.stat().st_size for path in (HOME / "reference_2").rglob("*") if path.is_file())
    with tmpfs(disk, int(0.8 * size)) as grow:
        if grow is None:
            ended = start(overrides(name), 2, Fault("small_files", 1, 5), END_S)
            wrong = check(ended, {2}, r"the checkpoint .*cannot be written|File too large")
            limited, said = "full disk (file size limit)", last_line(ended.errs[0])
            return row(limited, [ended], wrong, go_on(name, 2), "the same command", said)
        ended = start(overrides(name, disk), 2)
        wrong = check(ended, {2}, r"No space left on device|cannot be written .*free some room")
        reason = last_line(ended.errs[0])
        grow()
        return row(
            "full disk (tmpfs)", [ended], wrong, go_on(name, 2, runs=disk), "the same command, with room", reason
        )


@contextlib.contextmanager
def tmpfs(folder: Path, size: int):
    """A small file system at ``folder``; yields a function that makes it large, or None where mounting is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 1024}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def interrupted(name: str, world: int, nth: int) -> Ended:
    """A run that was asked to stop in its n-th step."""
    return start(overrides(name), world, Fault("terminate_in_step", world - 1, nth), END_S)


def damaged(name: str, fault: str, harm: Callable[[Path], None], says: str, inside: Fault | None) -> Row:
    """A shard of the latest of two checkpoints is harmed; the run refuses it, and goes on from the one before."""
    interrupted(name, 2, 5)
    checkpoints = sorted((HOME / name / "checkpoints").glob("step_*"))
    [shard] = checkpoints[-1].glob("*zero_pp_rank_1_*optim_states.pt")
    harm(shard)
    ended = start(overrides(name), 2, inside)
    wrong = check(ended, {2}, says)
    remedy = re.search(r"set (engine\.resume_from=\d+)", ended.errs[0])
    if remedy is None:
        return row(fault, [ended], [*wrong, "no remedy"], ("", "-"), "-", last_line(ended.errs[0]))
    shard.chmod(0o644)
    went_on = go_on(name, 2, [remedy[1]])
    return row(fault, [ended], wrong, went_on, f"{remedy[1].partition('=')[0]}=N, as said", last_line(ended.errs[0]))


def flip(shard: Path) -> None:
    """Change one byte in the middle."""
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def case_flipped_byte(_: int, rng: random.Random) -> Row:
    return damaged("flipped_byte", "a flipped byte in a shard", flip, "cannot be used .*checksum", None)


def case_unreadable(_: int, rng: random.Random) -> Row:
    return damaged(
        "unreadable", "an unreadable shard", lambda shard: shard.chmod(0), "cannot be used .*Permission denied",
        Fault("without_the_rights_of_root", ALL),
    )  # fmt: skip


def stopped(rank: int, world: int) -> Row:
    name, fault = f"stopped_{rank}", f"rank {rank} stopped (SIGSTOP) for longer than parallel.timeout_s={TIMEOUT_S}"
    arguments = [*overrides(name), f"parallel.timeout_s={TIMEOUT_S}"]
    ended = start(arguments, world, Fault("stop_in_step", rank, 4), TIMEOUT_S + END_S, [rank])
    wrong = check(ended, {1}, rf"no answer from rank {rank}|rank {rank} (is gone|does not answer)", [rank])
    said = last_line(ended.errs[1 if rank == 0 else 0])
    return row(fault, [ended], wrong, go_on(name, world), "the same command", said)


def case_stopped_1(_: int, rng: random.Random) -> Row:
    return stopped(1, 4)


def case_stopped_0(_: int, rng: random.Random) -> Row:
    return stopped(0, 2)


def case_defect(_: int, rng: random.Random) -> Row:
    ended = start(overrides("defect"), 2, Fault("fail_in_step", 1, 4), END_S)
    wrong = check(ended, {1}, "ArithmeticError: out of memory, say")
    return row("a defect in one rank", [ended], wrong, go_on("defect", 2), "the same command", last_line(ended.errs[0]))


def case_blocked(_: int, rng: random.Random) -> Row:
    ended = start(overrides("blocked"), 4, Fault("fail_and_block", ALL, 4), END_S)
    wrong = check(ended, {1}, "ArithmeticError: out of memory, say")
    return row(
        "a defect in one rank; the others blocked in host code, as on a device", [ended], wrong, go_on("blocked", 4),
        "the same command", last_line(ended.errs[0]),
    )  # fmt: skip


def case_terminated(_: int, rng: random.Random) -> Row:
    ended = interrupted("terminated", 2, 4)
    wrong = [] if ended.codes == [130, 130] else [f"exit codes {ended.codes}"]
    went_on, said = go_on("terminated", 2), last_line(ended.errs[0])
    return row("SIGTERM to one rank", [ended], wrong, went_on, "the same command", said)


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


# ---- the table ----


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    names = ("fault", "ranks", "times", "slowest end (s)", "exit codes", "said", "goes on with", "losses, weights")
    head = f"| {' | '.join(names)} |\n"
    lines = [
        f"| {r.fault} | {r.ranks} | {r.times} | {r.seconds:.1f} | {r.codes} | {r.reason} | {r.goes_on} | {r.losses}"
        f"{'' if r.holds else ' (DOES NOT HOLD)'} |"
        for r in rows
    ]
    return head + "|" + "---|" * 8 + "\n" + "\n".join(lines) + "\n"


def prepared() -> None:
    """Write the corpus and train the references, where they are missing."""
    from lr2train.cli.composition import compose
    from lr2train.prepare import prepare

    if not (HOME / "corpus" / "corpus.json").exists():
        (HOME / "text").mkdir(parents=True, exist_ok=True)
        for number in range(30):
            (HOME / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[: 60 + 150 * number])
        kept = [one for one in overrides("corpus") if not one.startswith("optim.")]
        prepare(compose("prepare", kept))
    for world in (2, 4):
        if not (HOME / f"reference_{world}" / "train.json").exists():
            ended = start(overrides(f"reference_{world}"), world)
            assert set(ended.codes) == {0}, ended.errs[0][-2000:]


def main() -> int:
    """Do the cases that are not done; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    if given.again:
        shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    prepared()
    file = HOME / "faults.json"
    done: dict[str, list[Any]] = json.loads(file.read_text()) if file.exists() else {}
    for name, case in CASES.items():
        if given.only in name and not (name in done and Row(*done[name]).holds):
            begin = time.monotonic()
            for left in HOME.glob(f"{name}*"):
                shutil.rmtree(left, ignore_errors=True)
            found = case(given.kills, random.Random(f"{given.seed} {name}"))
            done[name] = list(found)
            file.write_text(json.dumps(done, indent=1))
            state = "holds" if found.holds else "DOES NOT HOLD"
            print(f"[faults] {name}: {state}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    rows = [Row(*done[name]) for name in CASES if name in done]
    (HOME / "table.md").write_text(table(rows))
    print(table(rows))
    return int(not all(one.holds for one in rows))


if __name__ == "__main__":
    sys.exit(main())
