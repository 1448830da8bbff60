"""Messages and progress for a person: single lines, and a live line with the time left. All go to stderr, from rank 0
alone.

Choice: a live line on a terminal, never wider than the terminal. Elsewhere lines that grow rarer, from 15 seconds to 10
minutes, so that a log of weeks stays readable. stdout is for results.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lr2train.ranks import rank

T = TypeVar("T")
_FIRST_S, _LONGEST_S, _SHARE = 15.0, 600.0, 0.05  # between two lines of a log: a twentieth of the time so far
_BAR_CELLS, _LEAST_BAR_CELLS = 24, 8


def say(verb: str, message: str) -> None:
    """Print ``[verb] message`` to stderr, on rank 0 alone."""
    if rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # nobody reads stderr any more; the work goes on
            print(f"[{verb}] {message}", file=sys.stderr, flush=True)


Tick = Callable[[float, float, str], None]
"""(done, total, note) -> None: reports how much is done. The total may change between calls. Parts of the note, most
important first, are separated by ", "."""


def track(
    items: Iterable[T], total: int, description: str, done: int = 0, note: Callable[[], str] = str
) -> Iterator[T]:
    """Iterate over ``items`` and show progress and the time left.

    Args:
        items: the remaining ones.
        total: number of items, with those done before.
        description: of the work, for the beginning of the line.
        done: number of items done before (a resumed run).
        note: asked after every item.
    """
    with meter(description, done) as tick:
        for number, item in enumerate(items, done + 1):
            yield item
            tick(number, total, note())


@contextlib.contextmanager
def meter(description: str, done: float = 0, unit: str = "") -> Iterator[Tick]:
    """Show progress of work that is no loop over items; yields the function to report with.

    Args:
        description: of the work, for the beginning of the line.
        done: amount done before; not counted for the time left.
        unit: of the amount, such as tokens; the line then has its rate too.
    """
    if rank() != 0:
        yield lambda *_: None
        return
    work = Work(description, done, unit)
    with _live(work) if _on_terminal() else _lines(work) as tick:
        yield tick


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@dataclass
class Work:
    """How much of some work is done, and how that reads.

    Attributes:
        before: amount done before this start.
        now: amount done; None before the first report.
    """

    description: str
    before: float = 0
    unit: str = ""
    start_s: float = field(default_factory=lambda: time.monotonic())
    now: float | None = None
    total: float = 0
    note: str = ""

    def report(self, now: float, total: float, note: str) -> None:
        """Take a report."""
        self.now, self.total, self.note = now, total, note

    @property
    def moved(self) -> bool:
        """Whether anything was done since the start."""
        return self.now is not None and self.now > self.before

    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start_s

    def left_s(self) -> float | None:
        """Seconds that the rest takes at the rate so far; None while the rate is unknown."""
        if self.now is None or not self.moved:
            return None
        return max(0.0, self.spent_s() / (self.now - self.before) * (self.total - self.now))

    def parts(self) -> list[str]:
        """What is said after the amount, most important first."""
        left = self.left_s()
        rate = (
            f"{_number((self.now or 0) - self.before, self.spent_s())} {self.unit}/s"
            if self.unit and self.moved
            else ""
        )
        time_left = "" if left is None else f"{duration(left)} left"
        return [part for part in (time_left, *self.note.split(", "), rate, duration(self.spent_s())) if part]

    def counted(self) -> str:
        """``3/12`` for integers, a percentage for fractions."""
        if self.now is None:
            return ""
        if isinstance(self.now, int):
            return f"{self.now:,}/{self.total:,}"
        return f"{self.now / self.total:.0%}" if self.total else ""


def _number(amount: float, seconds: float) -> str:
    rate = amount / max(seconds, 1e-9)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``: two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = whole // 60
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes < 48 * 60
        else f"{minutes // 1440} d {minutes // 60 % 24} h"
    )


def fitted(work: Work, cells: int) -> str:
    """The work as one line of at most ``cells`` characters: what is less important is left out first."""
    line = f"{work.description} {work.counted()}".strip()
    taken: list[str] = []
    for part in work.parts():
        if len(", ".join([line, *taken, part])) > cells:
            break
        taken.append(part)
    room = min(cells - len(", ".join([line, *taken])) - 3, _BAR_CELLS)
    if work.now is not None and work.total and room >= _LEAST_BAR_CELLS:
        full = round(min(1.0, work.now / work.total) * room)
        line += f" [{'#' * full}{'-' * (room - full)}]"
    line = ", ".join([line, *taken])
    return line if len(line) <= cells else line[: max(0, cells - 1)] + "…"[: max(0, cells)]


@contextlib.contextmanager
def _live(work: Work) -> Iterator[Tick]:
    """One line that stays below everything else that is printed; the last state remains."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    # Results on stdout that go to a file must not pass through rich, which would print them here.
    with Live(_Line(work), console=console, refresh_per_second=4, redirect_stdout=sys.stdout.isatty()):
        yield work.report


@dataclass
class _Line:
    """Rich asks it anew at each refresh, so the time goes on and the width follows the terminal."""

    work: Work

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield Text(fitted(self.work, options.max_width - 1), no_wrap=True, overflow="crop")


@contextlib.contextmanager
def _lines(work: Work) -> Iterator[Tick]:
    """Lines for a log: the first after 15 seconds, then after a twentieth of the time so far, at most ten minutes.

    Work that was over sooner says nothing: what came of it is said elsewhere.
    """
    last_s, told = work.start_s, False

    def tick(now: float, total: float, note: str) -> None:
        nonlocal last_s, told
        work.report(now, total, note)
        if work.moved and time.monotonic() - last_s >= pause_s(work.spent_s()):
            last_s, told = time.monotonic(), True
            _tell(work)

    yield tick
    if work.moved and told:  # the last report
        _tell(work)


def pause_s(spent_s: float) -> float:
    """Seconds between two lines of a log, after so much time."""
    return min(_LONGEST_S, max(_FIRST_S, _SHARE * spent_s))


def _tell(work: Work) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(", ".join([f"{work.description}: {work.counted()}", *work.parts()]), file=sys.stderr, flush=True)
