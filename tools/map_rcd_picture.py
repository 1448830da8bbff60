"""The picture of ``map_rcd``: needle perplexity over critical index and tail scale as a heat map.

The fixed methods (YaRN, NTK, PI) stand beside the map, in the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm
from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lr2train.reporting.canvas import Chart, Look, chart
from lr2train.reporting.heatmap import text_color
from lr2train.reporting.population import bounded
from lr2train.reporting.scales import PerplexityScale
from lr2train.rope.spectrum import Spectrum

NAMES = {"yarn": "YaRN", "ntk": "NTK", "pi": "PI"}
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
def _map(figure: FigureBase, look: Look, lines: Sequence[Json], spectrum: Spectrum) -> str:
    grid = [line for line in lines if line["scale"] is not None]
    beside = [line for line in lines if line["scale"] is None]
    indices, scales = (sorted({line[key] for line in grid}) for key in ("critical_index", "scale"))
    places = {
        (indices.index(line["critical_index"]), scales.index(line["scale"])): bounded(line["perplexity"])
        for line in grid
    }
    scale = PerplexityScale.over(np.array([*places.values()]))
    left, right, bar = figure.subplots(1, 3, width_ratios=(max(len(indices), 4), 1, 0.3))
    _cells(left, look, places, scale)
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
    _beside(right, look, beside, max(len(scales), len(beside)), scale)
    _bar(figure, bar, scale)
    return "needle perplexity by critical index and scale of the tail"


def _beside(axes: Axes, look: Look, lines: Sequence[Json], rows: int, scale: PerplexityScale) -> None:
    """The fixed methods from the top, in cells of the map's height."""
    _cells(axes, look, {(0, rows - 1 - i): bounded(line["perplexity"]) for i, line in enumerate(lines)}, scale)
    axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, rows - 0.5), xticks=[])
    axes.set_yticks(
        [rows - 1 - i for i in range(len(lines))],
        [NAMES.get(str(line["method"]), str(line["method"])) for line in lines],
    )


def _cells(axes: Axes, look: Look, places: dict[Place, float], scale: PerplexityScale) -> None:
    """Squares with numbers, coloured by their place on the scale."""
    norm = _norm(scale)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (column, row), perplexity in places.items():
        color = COLORS(float(norm(scale.clip([perplexity])[0])))
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, edgecolor=look.card, linewidth=1.2))
        axes.text(column, row, _short(perplexity), ha="center", va="center", fontsize=8, color=text_color(*color[:3]))


def _norm(scale: PerplexityScale) -> FuncNorm:
    return FuncNorm((scale.forward, scale.inverse), scale.best, max(scale.worst, scale.best * (1 + 1e-6)))


def _short(perplexity: float) -> str:
    """At most six characters."""
    for limit, shown in ((1.1, "{:.4f}"), (10, "{:.3f}"), (100, "{:.1f}"), (1e4, "{:.0f}")):
        if perplexity < limit:
            return shown.format(perplexity)
    return f"{perplexity:.0e}".replace("e+0", "e")


def _bar(figure: FigureBase, axes: Axes, scale: PerplexityScale) -> None:
    bar = figure.colorbar(ScalarMappable(_norm(scale), COLORS), cax=axes, label=scale.label("needle"))
    bar.ax.yaxis.set_major_locator(FixedLocator([tick for tick in scale.ticks() if scale.best <= tick <= scale.worst]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(scale.name))
