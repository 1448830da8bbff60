"""What a person sees while a verb works: single lines, and a bar with the time left. All goes to stderr, from rank 0 alone.

Choice: on a terminal a bar, elsewhere a line every 15 seconds, so that a log file stays readable. stdout is for results.
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
    """One line for a person, from rank 0 alone. Goes to stderr: stdout is for results."""
    if rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # whoever read the terminal is gone; the work goes on
            print(f"[{verb}] {message}", file=sys.stderr, flush=True)


Tick = Callable[[float, float, str], None]
"""(done, total, note): how far the work is; the total may change as it goes."""


def track(items: Iterable[T], total: int, description: str, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar and the time left, on rank 0; off a terminal, a line now and then instead.

    Args:
        items: what remains to do.
        total: how many there are in all.
        description: what is being done.
        done: how many were done before (a resumed run).
    """
    with meter(description, done) as tick:
        for number, item in enumerate(items, done + 1):
            yield item
            tick(number, total, "")


@contextlib.contextmanager
def meter(description: str, done: float = 0) -> Iterator[Tick]:
    """A progress bar for work that does not iterate: call what it yields now and then.

    Args:
        description: what is being done.
        done: how much was done before, which the time left must not be judged by.
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
        yield lambda now, total, note: bar.update(task, completed=now, total=total, note=note, counted=_counted(now, total))


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
        spent, more = time.monotonic() - start, f", {note}" if note else ""
        left = spent / (now_done - done) * (total - now_done)
        with contextlib.suppress(BrokenPipeError):
            print(f"{description}: {_counted(now_done, total)}, {spent:.0f} s, {left:.0f} s left{more}", file=sys.stderr, flush=True)

    yield tick
    if state and state[0] > done:  # how it ended
        tell(*state)


def _counted(done: float, total: float) -> str:
    """Whole things as they are, shares in percent."""
    return f"{done}/{total}" if isinstance(done, int) else f"{done / total:.0%}"
