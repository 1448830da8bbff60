"""Charts as inline SVG that follows the page's theme.

Choice: matplotlib draws with placeholder colours, and each is replaced by a CSS variable of the page, so the same picture is right in
light and dark. Text stays text, in the page's font. Cost: matplotlib measures labels in its own font, a little wider than most.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS

INK, MUTED, LINE, CARD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0b1{i}" for i in range(6))
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", CARD: "--card", **{color: f"--s{i}" for i, color in enumerate(SERIES)}}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
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
HALF, WIDE = (4.8, 2.9), (9.6, 4.0)  # inches of 72 units
HOPELESS = 1e6  # perplexities beyond are all the same
Json = dict[str, Any]


P = ParamSpec("P")


def themed(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with the placeholder colours, legends and colour bars included, and leave matplotlib's settings as they were."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inside


def smooth(values: Sequence[float] | np.ndarray, steps: int) -> np.ndarray:
    """Mean over ``steps`` values centred on each; at the ends over those that there are. No lag, unlike an exponential mean."""
    ones, window = np.ones(len(values)), np.ones(min(max(steps | 1, 1), 2 * len(values) - 1))
    return _centred(np.asarray(values, dtype=float), window) / _centred(ones, window)


def _centred(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    half = len(window) // 2
    return np.convolve(values, window)[half : half + len(values)]


@themed
def factor_curves(factors: Factors, critical_index: int | None) -> str:
    """lambda_i over the cosine index, beside what fixed rules give for the same model and target."""
    figure, axes = _blank("factors", WIDE)
    spectrum, target = factors.spectrum, factors.target_window_tokens
    others = (("PI", "pi", "--", 5), ("NTK", "ntk", "-.", 1), ("YaRN", "yarn", "--", 2), ("LongRoPE v1, start", "longrope", ":", 3))
    for label, method, line, color in others:
        axes.plot(METHODS[method](spectrum, target).rescale, line, color=SERIES[color], linewidth=1.3, label=label)
    axes.plot(factors.rescale, "o-", color=SERIES[0], markersize=3.2, linewidth=2.2, label=f"this run ({factors.method})", zorder=5)
    axes.axhspan(factors.scale, 2 * factors.scale, color=SERIES[0], alpha=0.07, linewidth=0)
    axes.text(0, factors.scale * 1.06, f"s … 2s  (s = {factors.scale:g})", color=MUTED, fontsize=8)
    axes.set_yscale("log", base=2)
    _mark_indices(axes, {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index})
    axes.set(xlabel="cosine index i  (fast rotation → slow rotation)", ylabel="rescale factor λᵢ  (log scale)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    return _svg(figure, "factors", "rescale factors by cosine index")


def _mark_indices(axes: Axes, marks: dict[str, int | None]) -> None:
    top = axes.get_ylim()[1]
    axes.set_ylim(top=top * 1.25)
    for name, index in marks.items():
        if index is not None:
            axes.axvline(
                index,
                color=INK if name == "rcd" else MUTED,
                linewidth=1.2 if name == "rcd" else 0.8,
                linestyle="-" if name == "rcd" else (0, (2, 2)),
            )
            axes.text(
                index + 0.15,
                top * 1.1,
                f"{name} {index}",
                fontsize=8,
                color=INK if name == "rcd" else MUTED,
                weight="bold" if name == "rcd" else "normal",
            )


@themed
def search_progress(generations: Sequence[Json]) -> str:
    """Best, median and middle half of the population's needle perplexity by generation."""
    figure, axes = _blank("progress")
    steps = [one["generation"] for one in generations]
    quartiles = np.array([np.percentile(np.minimum(one["perplexities"], HOPELESS), (25, 50, 75)) for one in generations])
    axes.fill_between(
        steps, quartiles[:, 0], quartiles[:, 2], color=SERIES[0], alpha=0.18, linewidth=0, label="middle half of the population"
    )
    axes.plot(steps, quartiles[:, 1], "--", color=SERIES[0], linewidth=1.2, label="median")
    axes.plot(
        steps, [one["best_perplexity"] for one in generations], "o-", color=SERIES[1], markersize=3.5, linewidth=2, label="best so far"
    )
    _log_y(axes)
    axes.set(xlabel="generation", ylabel="needle perplexity (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")
    return _svg(figure, "progress", "needle perplexity by generation")


@themed
def critical_indices(generations: Sequence[Json], low: int, high: int) -> str:
    """How often each critical index occurs in the population, by generation."""
    figure, axes = _blank("indices")
    found = [index for one in generations for index in one["critical_indices"]]
    rows = np.arange(min([low, *found]), max([high, *found]) + 1)
    share = np.array([[np.mean(np.array(one["critical_indices"]) == row) for one in generations] for row in rows])
    columns = np.arange(len(generations) + 1) - 0.5
    mesh = axes.pcolormesh(columns, np.append(rows, rows[-1] + 1) - 0.5, share, cmap="cividis", edgecolors=CARD, linewidth=0.7, vmin=0)
    axes.grid(False)
    axes.set(xlabel="generation", ylabel="critical index rcd")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, label="share of the population")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    return _svg(figure, "indices", "critical index in the population by generation")


@themed
def attention_factors(generations: Sequence[Json]) -> str:
    """Every scored candidate: attention factor against needle perplexity, coloured by critical index."""
    figure, axes = _blank("attention")
    points = sorted(
        {point for one in generations for point in zip(one["attention_factors"], one["perplexities"], one["critical_indices"], strict=True)}
    )
    x, y, index = np.array(points).T
    dots = axes.scatter(x, np.minimum(y, HOPELESS), c=index, s=15, cmap="viridis", linewidths=0.4, edgecolors=MUTED)
    _log_y(axes)
    axes.set(xlabel="attention factor of the long window", ylabel="needle perplexity (log scale)")
    bar = figure.colorbar(dots, ax=axes, pad=0.02, label="critical index rcd")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, "attention", "needle perplexity by attention factor")


@themed
def documents(journal: Sequence[Json]) -> str:
    """How hard each needle document is: the middle half and the median of its loss over all candidates."""
    figure, axes = _blank("documents")
    losses: dict[int, list[float]] = {}
    for entry in journal:
        losses.setdefault(entry["document"], []).append(entry["nll"])
    numbers = sorted(losses)
    low, middle, high = np.array([np.percentile(losses[number], (25, 50, 75)) for number in numbers]).T
    axes.vlines(numbers, low, high, color=SERIES[0], alpha=0.35, linewidth=9)
    axes.plot(numbers, middle, "D", color=SERIES[0], markersize=4.5, label="median candidate")
    axes.plot(
        numbers, [min(losses[number]) for number in numbers], "_", color=SERIES[1], markersize=14, markeredgewidth=2, label="best candidate"
    )
    _log_y(axes)
    axes.set(xlabel="needle document", ylabel="loss of the answer (nats, log scale)", xlim=(numbers[0] - 0.6, numbers[-1] + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _svg(figure, "documents", "answer loss by needle document")


@themed
def loss_by_window(metrics: Sequence[Json], name: str, size: tuple[float, float] = HALF) -> str:
    """Loss of short and long segments: every step faint, the running mean strong."""
    figure, axes = _blank(name, size)
    for key, label, color in (("loss_short", "short window", 0), ("loss_long", "long window", 1)):
        steps, values = _series(metrics, key)
        if len(values):
            axes.plot(steps, values, color=SERIES[color], alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, len(values) // 25), color=SERIES[color], linewidth=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend(loc="upper right")
    return _svg(figure, name, "training loss by window")


@themed
def metric(metrics: Sequence[Json], key: str, label: str, smoothed: bool) -> str:
    """One figure of metrics.jsonl over the steps."""
    figure, axes = _blank(key)
    steps, values = _series(metrics, key)
    axes.plot(steps, values, color=SERIES[0], alpha=0.3 if smoothed else 1.0, linewidth=0.8 if smoothed else 2)
    if smoothed:
        axes.plot(steps, smooth(values, len(values) // 25), color=SERIES[0], linewidth=2)
    axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, 1.1 * float(np.percentile(values, 99.5)) or 1.0))
    if key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    elif key == "tokens_per_s":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _svg(figure, key, f"{label} by step")


def has(metrics: Sequence[Json], key: str) -> bool:
    """Whether there is anything to draw."""
    return any(line.get(key) is not None for line in metrics)


def _series(metrics: Sequence[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _log_y(axes: Axes) -> None:
    """Log scale, bounded so that hopeless candidates do not squeeze the rest; plain numbers at the ticks, however narrow the range."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    high = min(high, max(low, 1.0) * 1e4)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 4 * low else LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _percent(value: float, _: object) -> str:
    return f"{value:.0%}"


def _blank(name: str, size: tuple[float, float] = HALF) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(label=name)


def _svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as themed markup; ``salt`` keeps the ids of one page apart."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
