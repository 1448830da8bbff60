"""Reproduce the paper's tables in miniature: `bash launch/reproduce.sh [quick | demo]`, or

    python -m tools.reproduce [full | quick | demo] [--runs FOLDER] [--jobs N] [--document FILE]

It trains base models, searches factors, trains every row of the paper's tables, evaluates, and writes
FOLDER/reproduction.html and FOLDER/REPRODUCTION.md. The same command goes on after an interrupt or a kill. Each step is
a command that you could type: ``--commands`` prints all of them and runs nothing. ``--jobs 0`` writes the results of
what has run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lr2train import progress
from lr2train.cli.door import EXIT_INTERRUPTED, door
from tools.reproduce import write
from tools.reproduce.bed import FORMS
from tools.reproduce.steps import steps_of
from tools.reproduce.work import Driver


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", nargs="?", choices=[*FORMS], default="full", help="what is run (default: full)")
    parser.add_argument("--runs", type=Path, help="folder of all runs (default: runs/reproduce; runs/reproduce_demo)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="steps at a time (default: 2)"
    )
    parser.add_argument("--commands", action="store_true", help="print the commands of all steps and run nothing")
    parser.add_argument("--document", type=Path, help="write REPRODUCTION.md to this file too, once every step is done")
    return parser.parse_args(words)


def reproduce(given: argparse.Namespace) -> int:
    """Run what is left, write the results; returns the exit code."""
    form = FORMS[given.form]
    runs: Path = given.runs or Path("runs") / form.folder
    steps = steps_of(form, runs)
    if given.commands:
        print(*(step.command(runs) for step in steps), sep="\n")
        return 0
    driver = Driver(steps, runs, given.jobs)
    outcome = driver.run() if given.jobs else driver.look()
    finished = (len(outcome.done), len(steps))
    seconds = sum(driver.journal.seconds(step) for step in steps if step.name in outcome.done)
    sections = write.sections_of(form, runs, outcome.failed, finished, seconds)
    print(write.text(sections))
    document = given.document if finished[0] == finished[1] else None  # a part does not replace the whole
    write.write(form, sections, runs / "reproduction.html", document)
    progress.say("reproduce", f"{finished[0]} of {finished[1]} steps finished; page: {runs / 'reproduction.html'}")
    for name, reason in outcome.failed.items():
        progress.say("reproduce", f"{name}: {reason}")
    return EXIT_INTERRUPTED if outcome.interrupted else 1 if outcome.failed else 0


if __name__ == "__main__":
    with door("reproduce"):
        code = reproduce(arguments())
    sys.exit(code)
