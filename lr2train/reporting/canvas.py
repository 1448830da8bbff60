"""One matplotlib drawing, two renderings: inline SVG in the page's theme, and a PNG file on white.

Choice: a drawing takes every colour from its ``Look``. The page's look holds placeholder colours, which are replaced in
the SVG by CSS variables of the page: one picture serves the light and the dark theme. Text stays text, in the page's
font. The PNG's look holds the page's light colours. Cost: matplotlib lays out labels in its own font, which is a little
wider than the page's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import matplotlib
from matplotlib.figure import Figure, FigureBase

from lr2train.io import replacing
from lr2train.reporting.style import LIGHT

HALF, WIDE = (4.8, 2.9), (9.6, 4.0)  # inches; 72 SVG units an inch
DOTS_PER_INCH = 150
P = ParamSpec("P")


@dataclass(frozen=True)
class Look:
    """Colours of a drawing."""

    ink: str
    muted: str
    line: str
    card: str
    series: tuple[str, ...]


N_SERIES = 6  # series colours of both themes
# colours that occur nowhere else, so that each can be replaced in the SVG
THEMED = Look("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", tuple(f"#0a0b1{i}" for i in range(N_SERIES)))
PAPER = Look(LIGHT["ink"], LIGHT["muted"], LIGHT["line"], LIGHT["card"], tuple(LIGHT[f"s{i}"] for i in range(N_SERIES)))
_VARIABLES = {
    THEMED.ink: "--ink",
    THEMED.muted: "--muted",
    THEMED.line: "--line",
    THEMED.card: "--card",
    **{color: f"--s{i}" for i, color in enumerate(THEMED.series)},
}


@dataclass(frozen=True)
class Chart:
    """A drawing, rendered on demand.

    Attributes:
        draw: draws into a figure in a look's colours; returns a description for screen readers.
        size: width and height, inches.
    """

    draw: Callable[[FigureBase, Look], str]
    size: tuple[float, float]

    def svg(self) -> str:
        """SVG markup for the page."""
        with matplotlib.rc_context(_style(THEMED)):
            figure = Figure(figsize=self.size, layout="constrained")
            return _markup(figure, self.draw(figure, THEMED))

    def png(self, path: Path, title: str) -> Path:
        """Write the PNG file under a title; a failure leaves the former file."""
        return side_by_side([self], path, title)


def chart(
    size: tuple[float, float] = HALF,
) -> Callable[[Callable[Concatenate[FigureBase, Look, P], str]], Callable[P, Chart]]:
    """Decorator: ``draw(figure, look, *args)`` becomes ``make(*args) -> Chart``."""

    def decorate(draw: Callable[Concatenate[FigureBase, Look, P], str]) -> Callable[P, Chart]:
        @wraps(draw)
        def make(*args: P.args, **kwargs: P.kwargs) -> Chart:
            return Chart(lambda figure, look: draw(figure, look, *args, **kwargs), size)

        del make.__wrapped__  # type: ignore[attr-defined]  # the signature differs
        return make

    return decorate


def side_by_side(charts: Sequence[Chart], path: Path, title: str) -> Path:
    """Draw charts beside each other into one PNG under a title; a failure leaves the former file."""
    width, height = sum(one.size[0] for one in charts), max(one.size[1] for one in charts)
    with matplotlib.rc_context(_style(PAPER)):
        figure = Figure(figsize=(width, height + 0.35), layout="constrained", facecolor=PAPER.card)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, weight="bold", color=PAPER.ink)
        parts = figure.subfigures(1, len(charts), squeeze=False, width_ratios=[one.size[0] for one in charts])[0]
        for part, one in zip(parts, charts, strict=True):
            part.set_facecolor("none")
            one.draw(part, PAPER)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return path


def _style(look: Look) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 8.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": look.ink,
        "axes.labelcolor": look.muted,
        "axes.edgecolor": look.line,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": look.line,
        "grid.linewidth": 0.6,
        "xtick.color": look.muted,
        "ytick.color": look.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "patch.linewidth": 0.0,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
    }


def _markup(figure: Figure, description: str) -> str:
    """The figure as markup of the page; the description salts its ids, which must differ within a page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    # the page sets the size; ids of groups recur in other pictures of the page, and nothing refers to them
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    for color, variable in _VARIABLES.items():  # placeholder colour -> CSS variable of the theme
        svg = svg.replace(color, f"var({variable})")
    return svg
