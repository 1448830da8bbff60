"""Axes of the drawings: legends, marks of critical indices, ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lr2train.reporting.canvas import Look
from lr2train.reporting.scales import CEILING


def legend_inside(axes: Axes, look: Look) -> None:
    """At the upper left, where rising curves leave room; the legend covers the grid behind it."""
    legend = axes.legend(loc="upper left", frameon=True, facecolor=look.card, edgecolor=look.card, framealpha=1.0)
    legend.set_zorder(4)


def legend_above(figure: FigureBase, axes: Axes) -> None:
    """In rows of three above the axes. A legend of the figure does not shrink the axes; a wide one of the axes does."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.5
    )


def mark_indices(axes: Axes, look: Look, marks: dict[str, int | None], strong: str = "rcd") -> None:
    """Vertical lines with names above the axes. Equal indices share a name; close names take two rows."""
    at: dict[int, list[str]] = {}
    for name, index in marks.items():
        if index is not None:
            at.setdefault(index, []).append(name)
    left, right = axes.get_xlim()
    row, last = 0, -math.inf  # names closer than 14 % of the axis alternate between two rows
    for index, names in sorted(at.items()):
        heavy = strong in names
        color = look.ink if heavy else look.muted
        axes.axvline(
            index, color=color, linewidth=1.2 if heavy else 0.8, linestyle="-" if heavy else (0, (2, 2)), zorder=1.5
        )
        row = 1 - row if index - last < 0.14 * (right - left) else 0
        last = index
        axes.annotate(
            f"{' = '.join(names)} {index}",
            (index, 1),
            (0, 3 + 10 * row),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
            weight="bold" if heavy else "normal",
        )


def whole_numbers(axis: Axis, values: Sequence[int] | np.ndarray) -> None:
    """Ticks at the values; at every second, fifth, tenth … where there are many values."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) <= 13 * step or step == 1000)
    axis.set_major_locator(FixedLocator([value for value in values if value % step == 0 or len(values) == 1]))


def log_y(axes: Axes) -> None:
    """Log scale with plain numbers; the cut at ``CEILING`` keeps hopeless candidates from squeezing the rest."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    high = min(high, max(low, 1.0) * CEILING)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(
        MaxNLocator(5) if high < 4 * low else LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def plain(value: float, _: object) -> str:
    """A tick label without padding zeros."""
    return f"{value:g}"


def percent(value: float, _: object) -> str:
    """A tick label of a share 0 … 1."""
    return f"{value:.0%}"
