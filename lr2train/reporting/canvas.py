"""One matplotlib drawing, two renderings: inline SVG in the page's theme, and PNG on white beside its numbers as CSV.

Choice: a drawing takes every colour from its ``Look``. The page's look holds placeholder colours, which are replaced in
the SVG by CSS variables of the page: one picture serves the light and the dark theme. Text stays text, in the page's
font. The PNG's look holds the light colours of ``style.css``. Cost: matplotlib lays out labels in its own font, which
is a little wider than the page's, and an SVG has no tooltips.
"""

from __future__ import annotations

import csv
import io as text_io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TextIO

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure, FigureBase

from lr2train.io import replacing, write_text

SIZE = (4.8, 3.1)  # inches; 72 SVG units an inch: one to one on a phone
DOTS_PER_INCH = 200
N_SERIES = 6  # series colours of both themes
NAMES = ("ink", "muted", "line", "card", *(f"s{i}" for i in range(N_SERIES)))  # CSS variables
P = ParamSpec("P")
Columns = Mapping[str, Any]
Drawn = tuple[str, Columns]
"""A description for screen readers, and the drawn numbers: columns of equal length."""


@dataclass(frozen=True)
class Look:
    """Colours of a drawing."""

    ink: str
    muted: str
    line: str
    card: str
    series: tuple[str, ...]


def _look(colors: Sequence[str]) -> Look:
    return Look(*colors[:4], series=tuple(colors[4:]))


THEMED = _look([f"#0a0b{i:02}" for i in range(len(NAMES))])  # colours that occur nowhere else


@cache
def style_sheet() -> str:
    """The page's style sheet."""
    return (Path(__file__).parent / "style.css").read_text("utf-8")


@cache
def paper() -> Look:
    """The style sheet's light colours, which stand before the dark ones."""
    colors = dict(reversed(_colors()))
    return _look([colors[name] for name in NAMES])


@cache
def night() -> Look:
    """The style sheet's dark colours."""
    colors = dict(_colors())
    return _look([colors[name] for name in NAMES])


def _colors() -> list[tuple[str, str]]:
    return re.findall(r"--(\w+): (#\w{6})", style_sheet())


@dataclass(frozen=True)
class Chart:
    """A drawing, rendered on demand.

    Attributes:
        draw: draws into a figure in a look's colours.
        size: width and height, inches.
    """

    draw: Callable[[FigureBase, Look], Drawn]
    size: tuple[float, float]

    def svg(self) -> Markup:
        """Markup for the page."""
        file = text_io.StringIO()
        description, _ = self._render(THEMED, file, format="svg", transparent=True, metadata={"Date": None})
        return _markup(file.getvalue(), description)

    def write(self, path: Path) -> list[Path]:
        """Write ``path``.png and ``path``.csv; a failure leaves the former files."""
        picture, numbers = (path.parent / f"{path.name}.{suffix}" for suffix in ("png", "csv"))
        with replacing(picture) as file:
            _, columns = self._render(paper(), file, format="png", dpi=DOTS_PER_INCH)
        write_text(numbers, csv_of([*columns], zip(*columns.values(), strict=True)))
        return [picture, numbers]

    def write_themes(self, path: Path) -> list[Path]:
        """Write ``path``-light.svg and ``path``-dark.svg, transparent; the same bytes for the same numbers."""
        paths = [path.parent / f"{path.name}-{theme}.svg" for theme in ("light", "dark")]
        for file, look in zip(paths, (paper(), night()), strict=True):
            drawn = text_io.StringIO()
            self._render(look, drawn, format="svg", transparent=True, metadata={"Date": None})
            write_text(file, _standalone(drawn.getvalue()))
        return paths

    def _render(self, look: Look, file: TextIO | BinaryIO | Any, **options: Any) -> Drawn:
        with matplotlib.rc_context(_style(look)):
            figure = Figure(figsize=self.size, layout="constrained", facecolor=look.card)
            drawn = self.draw(figure, look)
            matplotlib.rcParams["svg.hashsalt"] = drawn[0]  # ids must differ within a page
            figure.savefig(file, **options)
        return drawn


def chart(
    size: tuple[float, float] = SIZE,
) -> Callable[[Callable[Concatenate[FigureBase, Look, P], Drawn]], Callable[P, Chart]]:
    """Decorator: ``draw(figure, look, *args)`` becomes ``make(*args) -> Chart``."""

    def decorate(draw: Callable[Concatenate[FigureBase, Look, P], Drawn]) -> Callable[P, Chart]:
        @wraps(draw)
        def make(*args: P.args, **kwargs: P.kwargs) -> Chart:
            return Chart(lambda figure, look: draw(figure, look, *args, **kwargs), size)

        del make.__wrapped__  # type: ignore[attr-defined]  # the signature differs
        return make

    return decorate


def stacked(parts: Mapping[str, Columns], name: str) -> dict[str, list[Any]]:
    """Columns below each other; a first column ``name`` tells the parts apart."""
    columns: dict[str, list[Any]] = {name: []}
    for part, numbers in parts.items():
        columns[name] += [part] * len(next(iter(numbers.values())))
        for key, values in numbers.items():
            columns.setdefault(key, []).extend(values)
    return columns


def csv_of(head: Sequence[str], rows: Any) -> str:
    """Rows as CSV; None becomes an empty cell."""
    out = text_io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


def _style(look: Look) -> dict[Any, Any]:
    style: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9.0, "text.color": look.ink, "axes.facecolor": "none"}
    style |= dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9.0)
    style |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), look.muted)
    style |= dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0)
    style |= {"axes.edgecolor": look.line, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": look.line, "grid.linewidth": 0.6}
    return style | {"legend.frameon": False, "patch.linewidth": 0.0, "lines.linewidth": 1.6}


def _standalone(svg: str) -> str:
    """A file of its own: text in the viewer's font, numbers to a hundredth of a point, no metadata."""
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'Segoe UI', Roboto, sans-serif", svg)
    return re.sub(r"(\.\d\d)\d+", r"\1", svg)


def _markup(svg: str, description: str) -> Markup:
    """The page sets the size. Ids of groups recur in other pictures of the page, and nothing refers to these ids."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    for name, color in zip(NAMES, (*(getattr(THEMED, one) for one in NAMES[:4]), *THEMED.series), strict=True):
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg)
