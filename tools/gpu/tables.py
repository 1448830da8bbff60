"""Tables of ``gpu.check``: errors, speeds, summary; in colour on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tools.bench.figures import Figure
from tools.gpu.parity import LIMITS, LSE_LIMIT_NATS, Row
from tools.gpu.timing import Timing

WIDTH = 150  # columns, where the output is no terminal


class Line(NamedTuple):
    """A row of a table of speeds."""

    strategy: str
    n_tokens: int  # of the segment
    name: str
    timing: Timing
    over_plain: float | None = None  # time over the time of the plain kernel

    def json(self) -> dict[str, Any]:
        """The row in the JSON file."""
        named = {
            "strategy": self.strategy,
            "segment_tokens": self.n_tokens,
            "name": self.name,
            "over_plain": self.over_plain,
        }
        return {**named, **self.timing.figures(), "rounds_ms": [1e3 * seconds for seconds in self.timing.rounds_s]}


def show_parity(rows: Sequence[Row]) -> None:
    """Errors of every kernel at every level, as ratios to the error of plain attention in the same dtype."""
    bounds = ", ".join(f"{name} {limit:g}" for name, limit in LIMITS.items())
    table = Table(
        title=f"parity with float64: error over plain attention's, at most {bounds}; lse within {LSE_LIMIT_NATS:g} nats"
    )
    for name in ("kernel", "level", "dtype"):
        table.add_column(name)
    for name in ("cases", *LIMITS, "lse"):
        table.add_column(name, justify="right")
    table.add_column("worst case, or reason of failure", overflow="fold")
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in LIMITS]
        comment = row.worst if row.passes else f"FAILS  {row.error or row.worst}"
        style = None if row.passes else "bold red"
        table.add_row(
            row.kernel, row.level, row.dtype, str(row.cases), *ratios, f"{row.lse_nats:.1e}", comment, style=style
        )
    _console().print(table)


def show_speed(title: str, lines: Sequence[Line], clocks: dict[str, dict[str, str]]) -> None:
    """Milliseconds and TFLOP/s, and the GPU's clocks before and after."""
    table = Table(title=f"{title}: medians, TFLOP/s of causal pairs")
    table.add_column("slice")
    table.add_column("timed")
    for name in ("forward ms", "backward ms", "forward TFLOP/s", "backward TFLOP/s", "TFLOP/s", "over plain"):
        table.add_column(name, justify="right")
    for line in lines:
        where, figures = f"{line.strategy}, {line.n_tokens} tokens", line.timing.figures()
        if "error" in figures:
            table.add_row(where, f"{line.name}: {figures['error']}", style="red")
            continue
        numbers = [f"{value:.4g}" for value in figures.values()]
        table.add_row(where, line.name, *numbers, "" if line.over_plain is None else f"{line.over_plain:.3f}")
    console = _console()
    console.print(table)
    for when, said in clocks.items():
        if said:
            console.print(f"{when}: {', '.join(f'{name} {value}' for name, value in said.items())}")


def show_summary(figures: Sequence[Figure]) -> None:
    """Every figure with its target, and whether the target is met."""
    table = Table(title="summary: figures and targets")
    table.add_column("figure")
    for name in ("value", "target"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for figure in figures:
        style = None if figure.holds else "bold red"
        table.add_row(figure.name, f"{figure.value:.4g}", _target(figure), _verdict(figure), style=style)
    _console().print(table)


def _target(figure: Figure) -> str:
    bounds = (("at most", figure.at_most), ("at least", figure.at_least))
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def _verdict(figure: Figure) -> str:
    if not _target(figure):
        return "no target here"
    return "met" if figure.holds else "MISSED"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
