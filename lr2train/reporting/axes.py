"""Axes of the drawings: legends, marks of critical indices, ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, NullLocator

from lr2train.reporting.canvas import Look

LEAST_LOSS = 1e-7  # nats; a loss of 0 has no logarithm
_ROUND = [1 + digit * 10.0**power for power in range(-7, 0) for digit in (1, 2, 5)]
_ROUND += [digit * 10.0**power for power in range(7) for digit in (2, 5, 10)]
_LINE = 56  # characters of a legend's line


def legend(figure: FigureBase, axes: Axes) -> None:
    """Above the axes, in as many columns as its longest name allows. A legend of the axes would cover curves."""
    handles, names = axes.get_legend_handles_labels()
    longest = max((len(name) for name in names), default=0)
    columns = min(max(_LINE // (longest + 6), 1), 3)
    figure.legend(handles, names, loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.5)


def mark_indices(axes: Axes, look: Look, marks: Mapping[str, int | None], strong: str = "rcd") -> None:
    """Vertical lines with names above the axes. Equal indices share a name; close names take two rows."""
    at: dict[int, list[str]] = {}
    for name, index in marks.items():
        if index is not None:
            at.setdefault(index, []).append(name)
    left, right = axes.get_xlim()
    row, last = 0, -math.inf  # names closer than 18 % of the axis alternate between two rows
    for index, names in sorted(at.items()):
        heavy = strong in names
        color, style = (look.ink, "-") if heavy else (look.muted, (0, (2, 2)))
        axes.axvline(index, color=color, linewidth=1.2 if heavy else 0.8, linestyle=style, zorder=1.5)
        row = 1 - row if index - last < 0.18 * (right - left) else 0
        last = index
        place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{' = '.join(names)} {index}", (index, 1), (0, 3 + 11 * row), color=color, **place)


def whole_numbers(axis: Axis, values: Sequence[int] | np.ndarray) -> None:
    """Ticks at the values; at every second, fifth, tenth … where there are many values."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) <= 9 * step or step == 1000)
    axis.set_major_locator(FixedLocator([value for value in values if value % step == 0 or len(values) == 1]))


def loss_of(perplexities: Sequence[float] | np.ndarray) -> np.ndarray:
    """ln p, at least ``LEAST_LOSS``, for an axis of ``perplexity_axis``."""
    return np.log(np.maximum(np.asarray(perplexities, dtype=float), 1.0 + LEAST_LOSS))


def perplexity_axis(axes: Axes, of: str) -> None:
    """The y axis as perplexities on the log scale of their loss: 1.004 and 1.03 differ as much as 1.4 and 12.

    A good search ends near a perplexity of 1. Call it after drawing ``loss_of``; ``of`` is needle or text.
    """
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([math.log(tick) for tick in perplexity_ticks(low, high)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(tick_labels(perplexity_label))
    axes.set_ylabel(f"{of} perplexity (log of loss)")


def perplexity_ticks(low: float, high: float) -> list[float]:
    """At most seven perplexities, round where the range holds round ones.

    Args:
        low, high: losses, above 0.
    """
    between = sorted({tick for tick in _ROUND if low <= math.log(tick) <= high})
    if len(between) < 3:
        return [math.exp(loss) for loss in np.geomspace(low, high, 4)]
    return between[:: math.ceil(len(between) / 7)]


def perplexity_label(loss: float) -> str:
    """A loss as its perplexity."""
    value = math.exp(min(loss, 700.0))
    return f"{value:.7g}" if value < 1.001 else f"{value:.4g}"


def tick_labels(show: object) -> Formatter:
    """Labels of ticks by a function of the value alone."""
    return FuncFormatter(lambda value, _: show(value))  # type: ignore[operator]
