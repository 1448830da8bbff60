"""Figures of benchmarks: printed last, one ``name: value`` a line; the exit status says whether all bounds hold.

``on_ranks`` runs a measurement in several processes.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured number; ``at_most`` and ``at_least`` are its bounds, if any."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value keeps its bounds; nan keeps none."""
        below = self.at_most is None or self.value <= self.at_most
        above = self.at_least is None or self.value >= self.at_least
        return below and above


def conclude(figures: Iterable[Figure]) -> int:
    """Print missed bounds, then all figures; the exit status is 1 where a bound is missed, else 0."""
    figures = list(figures)
    for figure in figures:
        if not figure.holds:
            bound = f"at most {figure.at_most:g}" if figure.at_most is not None else f"at least {figure.at_least:g}"
            print(f"MISSED: {figure.name} is {figure.value:.6g}, wanted {bound}")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g}", flush=True)
    return 0 if all(figure.holds for figure in figures) else 1


def main(doc: str | None, subject: str, commands: Sequence[str]) -> int:
    """Command line over modules ``tools.bench.<subject>_<command>``, each with ``measure(quick) -> figures``."""
    prog = f"python -m tools.bench.{subject}"
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--quick", action="store_true", help="a smaller input; the bounds are meant for the full one")
    arguments = parser.parse_args()
    return conclude(importlib.import_module(f"tools.bench.{subject}_{arguments.command}").measure(arguments.quick))


def on_ranks(rank: Callable[..., None], ranks: int, *arguments: Any) -> Any:
    """What one of ``ranks`` new processes puts into the queue.

    Args:
        rank: a function of a module; called with the number of the rank, a folder that all share, ``arguments``, and
            the queue.
        ranks: how many processes.
        arguments: the same for all.

    Raises:
        RuntimeError: a process failed; its own output says why.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=rank, args=(number, Path(folder), *arguments, queue), daemon=True)
            for number in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the ranks ended with exit codes {[process.exitcode for process in processes]}")
        return queue.get()
