"""Runs steps side by side, one process and one thread each, and keeps what is finished.

Choice: a verb starts in a fork of one server that has imported torch and DeepSpeed once, which saves seven seconds of a
core at each start. A finished step stands in ``done.jsonl`` with its arguments and does not start again. An unfinished
one resumes by its verb's own means. A failed step costs only the steps that need it. Cost: a step that was finished
before a change of the code is not run again; remove its line.

Several drivers may share a folder: a step is taken by a lock on its file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

from lr2train import progress
from lr2train.cli.door import EXIT_INTERRUPTED
from lr2train.config import UserError
from tools.reproduce.steps import MAP, Step

PATIENCE_S = 60.0  # of an interrupted verb, to write its checkpoint
PRELOAD = ["lr2train.train", "lr2train.search", "lr2train.evaluate", "deepspeed", "tools.reproduce.work"]


def run_step(verb: str, arguments: Sequence[str], log: Path) -> None:
    """In a process of its own: the verb, with its output in ``log``. The exit code is the verb's.

    Ctrl-C of the terminal reaches the driver alone, which ends the verbs: a second signal would stop a verb while it
    writes its checkpoint.
    """
    os.setsid()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if verb == MAP:
        from tools import map_rcd

        sys.argv = ["map_rcd", *arguments]
        sys.exit(map_rcd.main())
    from lr2train.__main__ import main

    sys.argv = ["lr2train", verb, *arguments]
    main()


ProcessOf = Callable[[str, Sequence[str], Path], BaseProcess]


def forked(verb: str, arguments: Sequence[str], log: Path) -> BaseProcess:
    """A process that runs the verb, forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context.Process(target=run_step, args=(verb, list(arguments), log))


def kind_of(name: str, verb: object) -> tuple[str, str]:
    """What decides how long a step takes: its verb and its extension ratio; the training of a base has none."""
    ratio = re.search(r"_(\d+x)(_|$)", name)
    return str(verb), ratio[1] if ratio else ""


@dataclass
class Journal:
    """Finished steps with their arguments and seconds; lines survive a kill."""

    file: Path
    known: dict[str, dict[str, object]] = field(default_factory=dict)
    _size: int = 0
    _medians: dict[tuple[str, str], float] = field(default_factory=dict)

    def read(self) -> None:
        """Read the lines again: another driver may have added some. A line that a kill cut short is left out."""
        size = self.file.stat().st_size if self.file.exists() else 0
        if size == self._size:
            return
        self._size = size
        self._medians.clear()
        for text in self.file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                self.known[line["step"]] = line

    def add(self, step: Step, arguments: Sequence[str], seconds: float) -> None:
        """Note a finished step."""
        line = {"step": step.name, "verb": step.verb, "seconds": round(seconds, 1), "arguments": list(arguments)}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.known[step.name] = line
        self._medians.clear()

    def has(self, step: Step, runs: Path) -> bool:
        """Whether the step is finished, with the arguments that it has now."""
        line = self.known.get(step.name)
        return line is not None and step.result(runs).exists() and line["arguments"] == step.arguments(runs)

    def seconds(self, step: Step) -> float:
        """Seconds of a finished step."""
        return float(str(self.known[step.name]["seconds"]))

    def seconds_of(self, kind: tuple[str, str]) -> float | None:
        """Median seconds of the finished steps of a kind; None where there is none."""
        if not self._medians:  # once for every new line: the driver asks for each step, every second
            seconds: dict[tuple[str, str], list[float]] = {}
            for name, line in self.known.items():
                seconds.setdefault(kind_of(name, line["verb"]), []).append(float(str(line["seconds"])))
            self._medians = {one: statistics.median(found) for one, found in seconds.items()}
        return self._medians.get(kind)


@dataclass
class Running:
    """A step at work."""

    step: Step
    arguments: list[str]
    process: BaseProcess
    lock: IO[str]
    start_s: float = field(default_factory=time.monotonic)


@dataclass
class Outcome:
    """What came of the steps: name -> reason for those that failed, or that wait for a failed one."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class Driver:
    """Works through steps.

    Args:
        steps: every step stands after those that it reads.
        runs: folder of all runs; logs and locks lie in ``logs/``.
        jobs: steps at a time.
        process_of: makes the process of a step, not yet started.
    """

    def __init__(self, steps: Sequence[Step], runs: Path, jobs: int, process_of: ProcessOf = forked) -> None:
        self._steps, self._runs, self._jobs = list(steps), runs, jobs
        self._logs = runs / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._process_of = process_of
        self._running: dict[str, Running] = {}
        self.journal = Journal(runs / "done.jsonl")
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run all steps that can run; a signal ends the running ones, which resume at the next start."""
        before = {one: signal.signal(one, _interrupt) for one in (signal.SIGTERM, signal.SIGHUP)}
        try:
            waits = self._start_ready()
            with progress.meter("reproduce", self._done_s()) as tick:
                while waits or self._running:
                    self._collect()
                    waits = self._start_ready()
                    tick(self._done_s(), sum(map(self._expected, self._steps)), self._note())
        except KeyboardInterrupt:
            self.outcome.interrupted = True
            self._stop()
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        return self.outcome

    def look(self) -> Outcome:
        """What is finished; nothing is run."""
        self.journal.read()
        for step in self._steps:
            if all(one in self.outcome.done for one in step.after) and self.journal.has(step, self._runs):
                self.outcome.done.add(step.name)
        return self.outcome

    def _start_ready(self) -> bool:
        """Start what can start; returns whether a step waits for another driver."""
        self.journal.read()
        taken = False
        for step in self._steps:
            if step.name in self.outcome.done or step.name in self.outcome.failed or step.name in self._running:
                continue
            if lost := [one for one in step.after if one in self.outcome.failed]:
                self.outcome.failed[step.name] = f"waits for {lost[0]}"
            elif all(one in self.outcome.done for one in step.after):
                if self.journal.has(step, self._runs):
                    self.outcome.done.add(step.name)
                elif len(self._running) < self._jobs:
                    taken |= not self._start(step)
        if taken and not self._running:
            time.sleep(1)
        return taken

    def _start(self, step: Step) -> bool:
        """Start a step; False if another driver works on it."""
        lock = (self._logs / f"{step.name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self.journal.read()
        if self.journal.has(step, self._runs):  # another driver has finished it meanwhile
            lock.close()
            self.outcome.done.add(step.name)
            return True
        try:
            arguments = step.arguments(self._runs)
        except UserError as error:
            self.outcome.failed[step.name] = str(error)
            return True
        log = self._logs / f"{step.name}.log"
        with log.open("a") as file:
            file.write(f"$ {step.command(self._runs)}\n")
        process = self._process_of(step.verb, arguments, log)
        process.start()
        self._running[step.name] = Running(step, arguments, process, lock)
        return True

    def _collect(self) -> None:
        """Wait for one running step at least, up to a second."""
        wait([one.process.sentinel for one in self._running.values()], timeout=1.0)
        for name, one in list(self._running.items()):
            if one.process.exitcode is None:
                continue
            del self._running[name]
            self._ended(one)

    def _ended(self, one: Running) -> None:
        name, code = one.step.name, one.process.exitcode
        one.process.join()
        if code == 0 and one.step.result(self._runs).exists():
            self.journal.add(one.step, one.arguments, time.monotonic() - one.start_s)
            self.outcome.done.add(name)
        elif code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # somebody ended the step alone: end all
        else:
            log = self._logs / f"{name}.log"
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            self.outcome.failed[name] = f"exit code {code}: {said[-1] if said else 'no output'} ({log})"
            progress.say("reproduce", f"{name} failed, {self.outcome.failed[name]}")
        one.lock.close()

    def _stop(self) -> None:
        """Ask the running verbs to stop, and wait until they have written what they have."""
        progress.say("reproduce", "interrupted; the same command goes on where this one ended")
        running = list(self._running.values())
        for one in running:
            one.process.terminate()  # SIGTERM acts as Ctrl-C in a verb
        until = time.monotonic() + PATIENCE_S
        for one in running:
            one.process.join(max(0.0, until - time.monotonic()))
            if one.process.is_alive():
                one.process.kill()

    def _note(self) -> str:
        count = f"{len(self.outcome.done)} of {len(self._steps)} steps"
        lost = f", {len(self.outcome.failed)} failed or waiting for one that did" if self.outcome.failed else ""
        return f"{count}{lost}, now {' and '.join(self._running)}"

    def _done_s(self) -> float:
        """Expected seconds of the finished steps, and of what the running ones have done."""
        done = sum(self._expected(step) for step in self._steps if step.name in self.outcome.done)
        spent = ((time.monotonic() - one.start_s, self._expected(one.step)) for one in self._running.values())
        return done + sum(min(seconds, expected) for seconds, expected in spent)

    def _expected(self, step: Step) -> float:
        """Seconds that a step takes: as the finished ones of its kind, else a guess."""
        verb, ratio = kind = kind_of(step.name, step.verb)
        guess = {"train": 15.0 if ratio else 300.0, MAP: 90.0}.get(verb, 20.0)
        longer = int(ratio.removesuffix("x")) / 8 if ratio else 1.0
        guess *= longer**1.5  # products grow by the length, attention by its square
        return self.journal.seconds_of(kind) or guess


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
