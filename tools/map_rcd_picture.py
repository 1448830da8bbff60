"""The picture of ``map_rcd``: needle perplexity over critical index and tail scale as a heat map.

The fixed methods (none, YaRN, NTK, PI) stand beside the map, in the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from lr2train.reporting.axes import loss_of, perplexity_label, perplexity_ticks, tick_labels
from lr2train.reporting.canvas import Chart, Drawn, Look, chart
from lr2train.reporting.needle_map import text_color
from lr2train.reporting.population import bounded
from lr2train.rope.spectrum import Spectrum

NAMES = {"none": "none", "yarn": "YaRN", "ntk": "NTK", "pi": "PI"}
COLORS = colormaps["cividis_r"]  # a low perplexity is bright
CELL = (0.6, 0.48)  # inches
Json = dict[str, Any]
Place = tuple[int, int]  # column, row


def rcd_map(lines: Sequence[Json], spectrum: Spectrum) -> Chart:
    """The map of one attention factor.

    Args:
        lines: ``method, critical_index, scale, perplexity`` each. A line without a scale is a fixed method; at least
            one line has a scale.
        spectrum: for d10 and tcd.
    """
    n_columns = len({line["critical_index"] for line in lines if line["scale"] is not None})
    n_rows = max(3, len({line["scale"] for line in lines if line["scale"] is not None}))
    return replace(_map(lines, spectrum), size=(CELL[0] * max(n_columns, 4) + 3.1, CELL[1] * n_rows + 0.9))


@chart()
def _map(figure: FigureBase, look: Look, lines: Sequence[Json], spectrum: Spectrum) -> Drawn:
    grid = [line for line in lines if line["scale"] is not None]
    beside = [line for line in lines if line["scale"] is None]
    indices, scales = (sorted({line[key] for line in grid}) for key in ("critical_index", "scale"))
    places = {
        (indices.index(line["critical_index"]), scales.index(line["scale"])): bounded(line["perplexity"])
        for line in grid
    }
    losses = loss_of([*places.values()])
    norm = LogNorm(losses.min(), max(losses.max(), losses.min() * 1.001))
    left, right, bar = figure.subplots(1, 3, width_ratios=(max(len(indices), 4), 1, 0.3))
    _cells(left, look, places, norm)
    best = min(places, key=lambda place: places[place])
    left.add_patch(
        Rectangle(
            (best[0] - 0.5, best[1] - 0.5),
            1,
            1,
            fill=False,
            edgecolor=look.series[1],
            linewidth=2.4,
            zorder=3,
            clip_on=False,
        )
    )
    left.set(
        xlim=(-0.5, len(indices) - 0.5),
        ylim=(-0.5, len(scales) - 0.5),
        xlabel="critical index rcd",
        ylabel="tail, multiples of s",
    )
    left.set_xticks(range(len(indices)), [str(index) for index in indices])
    left.set_yticks(range(len(scales)), [f"{one:g} s" for one in scales])
    for name, index in {"d10": spectrum.lowest_critical_index, "tcd": spectrum.critical_index}.items():
        if index in indices:
            at = (indices.index(index), len(scales) - 0.5)
            left.annotate(
                f"{name}\n▾",
                at,
                (0, 1),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                linespacing=0.9,
                weight="bold",
            )
    _beside(right, look, beside, max(len(scales), len(beside)), norm)
    _bar(figure, bar, norm)
    columns = {key: [line[key] for line in lines] for key in ("method", "critical_index", "scale", "perplexity")}
    return "Needle perplexity by critical index and scale of the tail.", columns


def _beside(axes: Axes, look: Look, lines: Sequence[Json], rows: int, norm: LogNorm) -> None:
    """The fixed methods from the top, in cells of the map's height."""
    _cells(axes, look, {(0, rows - 1 - i): bounded(line["perplexity"]) for i, line in enumerate(lines)}, norm)
    axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, rows - 0.5), xticks=[])
    axes.set_yticks(
        [rows - 1 - i for i in range(len(lines))],
        [NAMES.get(str(line["method"]), str(line["method"])) for line in lines],
    )


def _cells(axes: Axes, look: Look, places: dict[Place, float], norm: LogNorm) -> None:
    """Squares with numbers, coloured by the logarithm of the loss; beyond the map's worst, in its colour."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (column, row), perplexity in places.items():
        color = COLORS(float(norm(loss_of([perplexity])[0])))
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, edgecolor=look.card, linewidth=1.2))
        axes.text(column, row, _short(perplexity), ha="center", va="center", fontsize=8, color=text_color(*color[:3]))


def _short(perplexity: float) -> str:
    """At most six characters."""
    for limit, shown in ((1.1, "{:.4f}"), (10, "{:.3f}"), (100, "{:.1f}"), (1e4, "{:.0f}")):
        if perplexity < limit:
            return shown.format(perplexity)
    return f"{perplexity:.0e}".replace("e+0", "e")


def _bar(figure: FigureBase, axes: Axes, norm: LogNorm) -> None:
    bar = figure.colorbar(ScalarMappable(norm, COLORS), cax=axes, label="needle perplexity (log of loss)")
    ticks = perplexity_ticks(float(norm.vmin or 0), float(norm.vmax or 1))
    bar.ax.yaxis.set_major_locator(FixedLocator([*loss_of(ticks)]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(tick_labels(perplexity_label))
