"""Messages and progress for a person: single lines, and a bar with the time left. All go to stderr, from rank 0 alone.

Choice: a bar on a terminal; elsewhere a line every 15 seconds, so that a log file stays readable. stdout is for
results.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lr2train.ranks import rank

T = TypeVar("T")


def say(verb: str, message: str) -> None:
    """Print ``[verb] message`` to stderr, on rank 0 alone."""
    if rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # nobody reads stderr any more; the work goes on
            print(f"[{verb}] {message}", file=sys.stderr, flush=True)


Tick = Callable[[float, float, str], None]
"""(done, total, note) -> None: reports how much is done. The total may change between calls."""


def track(items: Iterable[T], total: int, description: str, done: int = 0) -> Iterator[T]:
    """Iterate over ``items`` and show progress and the time left.

    Args:
        items: the remaining ones.
        total: number of items, with those done before.
        description: of the work, for the beginning of the line.
        done: number of items done before (a resumed run).
    """
    with meter(description, done) as tick:
        for number, item in enumerate(items, done + 1):
            yield item
            tick(number, total, "")


@contextlib.contextmanager
def meter(description: str, done: float = 0) -> Iterator[Tick]:
    """Show progress of work that is no loop over items; yields the function to report with.

    Args:
        description: of the work, for the beginning of the line.
        done: amount done before; not counted for the time left.
    """
    if rank() != 0:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bar(description, done) as tick:
            yield tick
    else:
        with _lines(description, done) as tick:
            yield tick


@contextlib.contextmanager
def _bar(description: str, done: float) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, completed=int(done), note="", counted="")
        yield lambda now, total, note: bar.update(
            task, completed=now, total=total, note=note, counted=_counted(now, total)
        )


@contextlib.contextmanager
def _lines(description: str, done: float, every_s: float = 15.0) -> Iterator[Tick]:
    start = last = time.monotonic()
    state: tuple[float, float, str] | None = None

    def tick(now_done: float, total: float, note: str) -> None:
        nonlocal last, state
        state = now_done, total, note
        if now_done > done and time.monotonic() - last >= every_s:
            last = time.monotonic()
            tell(*state)

    def tell(now_done: float, total: float, note: str) -> None:
        """Print a line with the time spent and the time left."""
        spent, more = time.monotonic() - start, f", {note}" if note else ""
        left = spent / (now_done - done) * (total - now_done)
        with contextlib.suppress(BrokenPipeError):
            print(
                f"{description}: {_counted(now_done, total)}, {spent:.0f} s, {left:.0f} s left{more}",
                file=sys.stderr,
                flush=True,
            )

    yield tick
    if state and state[0] > done:  # the last report
        tell(*state)


def _counted(done: float, total: float) -> str:
    """``3/12`` for integers, a percentage for fractions."""
    return f"{done}/{total}" if isinstance(done, int) else f"{done / total:.0%}"
