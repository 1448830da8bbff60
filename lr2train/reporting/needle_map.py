"""Needle heat maps: document length across, needle depth down, accuracy as colour and number (paper, Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from lr2train.reporting.canvas import Chart, Drawn, Look, chart, stacked
from lr2train.reporting.numbers import context_length

PANEL = (3.4, 2.7)  # inches
MOST_NUMBERS = 200  # cells of a panel; beyond, colours alone are readable
COLUMNS = 3
Json = dict[str, Any]


def needle_map(rows: Sequence[Json]) -> Chart:
    """The rows of ``evaluate.json`` as panels of one picture."""
    across, down = min(len(rows), COLUMNS), -(-len(rows) // COLUMNS)
    return replace(_map(rows), size=(PANEL[0] * across, PANEL[1] * down))


@chart()
def _map(figure: FigureBase, look: Look, rows: Sequence[Json]) -> Drawn:
    across, down = min(len(rows), COLUMNS), -(-len(rows) // COLUMNS)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, look, row)
    for axes in [*panels][len(rows) :]:
        axes.remove()
    parts = {row["label"]: {key: [cell.get(key) for cell in row["cells"]] for key in row["cells"][0]} for row in rows}
    return " ".join(map(_words, rows)), stacked(parts, "model")


def mean_accuracy(row: Json) -> float:
    """Mean accuracy over the cells that were answered; nan where none was."""
    shares = [cell["accuracy"] for cell in row["cells"] if cell["accuracy"] is not None]
    return sum(shares) / len(shares) if shares else float("nan")


def _words(row: Json) -> str:
    answered = [cell for cell in row["cells"] if cell["accuracy"] is not None]
    if not answered:
        return f"{row['label']}: no needle was answered."
    least = min(answered, key=lambda cell: cell["accuracy"])
    where = f"{least['length_tokens']:,} tokens and depth {least['depth']:.0%}"
    return f"{row['label']}: mean needle accuracy {mean_accuracy(row):.0%}, least {least['accuracy']:.0%} at {where}."


def _panel(axes: Axes, look: Look, row: Json) -> None:
    lengths, depths = (sorted({cell[key] for cell in row["cells"]}) for key in ("length_tokens", "depth"))
    shares = np.full((len(depths), len(lengths)), np.nan)
    for cell in row["cells"]:
        at = depths.index(cell["depth"]), lengths.index(cell["length_tokens"])
        shares[at] = np.nan if cell["accuracy"] is None else cell["accuracy"]
    mesh = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolor=look.card, linewidth=1.2)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    every = slice(None, None, -(-len(lengths) // 8))
    axes.set_xticks((np.arange(len(lengths)) + 0.5)[every], [context_length(length) for length in lengths][every])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="document length, tokens", ylabel="depth")
    axes.set_title(f"{row['label']}, mean {mean_accuracy(row):.0%}", fontsize=9, loc="left", color=look.ink)
    if shares.size > MOST_NUMBERS:
        return
    for (down, across), share in np.ndenumerate(shares):
        if np.isfinite(share):
            color = text_color(*mesh.cmap(mesh.norm(share))[:3])
            axes.text(across + 0.5, down + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=color)


def text_color(red: float, green: float, blue: float) -> str:
    """Black or white, whichever is readable on a background; parts 0 … 1."""
    return "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
