"""Drawings of the report page and of a search's pictures; ``canvas`` renders them as SVG or PNG.

Choice: a drawing depends on data alone, and takes colours from a ``Look``, which ``canvas`` passes. Candidates that
racing dropped were scored on fewer documents; they are drawn fainter. Each function returns a description for screen
readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lr2train.reporting.canvas import WIDE, Look, chart
from lr2train.reporting.population import Candidates, bounded, candidates, last_parents, winner
from lr2train.reporting.scales import CEILING, PerplexityScale
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

FIXED_METHODS = (
    ("PI", "pi", "--", 5),
    ("NTK", "ntk", "-.", 1),
    ("YaRN", "yarn", "--", 2),
    ("LongRoPE v1, start", "longrope", ":", 3),
)
Json = dict[str, Any]


@chart(WIDE)
def factor_curves(figure: FigureBase, look: Look, factors: Factors, critical_index: int | None) -> str:
    """lambda_i over the cosine index, beside methods without a search (paper, Figures 2b and 4)."""
    axes, spectrum = figure.add_subplot(), factors.spectrum
    for label, method, line, color in FIXED_METHODS:
        rescale = METHODS[method](spectrum, factors.target_window_tokens).rescale
        axes.plot(rescale, line, color=look.series[color], linewidth=1.3, label=label)
    axes.plot(
        factors.rescale,
        "o-",
        color=look.series[0],
        markersize=3.2,
        linewidth=2.2,
        label=f"this run ({factors.method})",
        zorder=5,
    )
    if critical_index is not None:
        axes.axhspan(factors.scale, 2 * factors.scale, color=look.series[0], alpha=0.07, linewidth=0)
        axes.text(0, factors.scale * 1.06, f"s … 2s  (s = {factors.scale:g})", color=look.muted, fontsize=8)
    axes.set_yscale("log", base=2)
    _mark_indices(axes, look, {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index})
    axes.set(xlabel="cosine index i  (fast rotation → slow rotation)", ylabel="rescale factor λᵢ  (log scale)")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    _legend_inside(axes, look)
    return "rescale factors by cosine index"


@chart()
def periods(figure: FigureBase, look: Look, factors: Factors, critical_index: int | None) -> str:
    """Rescaled periods lambda_i T_i beside L0 and L, at the indices around the critical index."""
    axes, spectrum = figure.add_subplot(), factors.spectrum
    first = max(spectrum.lowest_critical_index - 2, 0)
    shown = np.arange(first, min(2 * spectrum.critical_index - first, spectrum.n_dims - 1) + 1)
    own = spectrum.period_tokens
    axes.plot(shown, own[shown], color=look.muted, linewidth=1.3, label="original RoPE")
    for label, method, line, color in FIXED_METHODS[:3]:
        rescale = np.array(METHODS[method](spectrum, factors.target_window_tokens).rescale)
        axes.plot(shown, (own * rescale)[shown], line, color=look.series[color], linewidth=1.3, label=label)
    axes.plot(
        shown,
        (own * factors.rescale)[shown],
        "o-",
        color=look.series[0],
        markersize=3,
        linewidth=2,
        label="this run",
        zorder=5,
    )
    axes.set_yscale("log", base=2)
    # labels stand where no curve is: L at the left, L0 at the right
    for name, tokens, at, side in (
        ("L0", spectrum.window_tokens, shown[-1], "right"),
        ("L", factors.target_window_tokens, shown[0], "left"),
    ):
        axes.axhline(tokens, color=look.ink, linewidth=0.9)
        axes.annotate(
            f"{name} = {tokens:,}",
            (at, tokens),
            (0, -3),
            textcoords="offset points",
            fontsize=8,
            color=look.ink,
            ha=side,
            va="top",
        )
    _mark_indices(axes, look, {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index})
    axes.set(xlabel="cosine index i", ylabel="period λᵢTᵢ, tokens  (log scale)")
    axes.yaxis.set_major_locator(LogLocator(base=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_inside(axes, look)
    return "rotation periods by cosine index beside both windows"


def _legend_inside(axes: Axes, look: Look) -> None:
    """At the upper left, where rising curves leave room; the legend covers the grid behind it."""
    legend = axes.legend(loc="upper left", frameon=True, facecolor=look.card, edgecolor=look.card, framealpha=1.0)
    legend.set_zorder(4)


def _legend_above(figure: FigureBase, axes: Axes) -> None:
    """In rows of three above the axes. A legend of the figure does not shrink the axes; a wide one of the axes does."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.5)


def _mark_indices(axes: Axes, look: Look, marks: dict[str, int | None], strong: str = "rcd") -> None:
    """Vertical lines with names above the axes. Equal indices share a name; close names take two rows."""
    at: dict[int, list[str]] = {}
    for name, index in marks.items():
        if index is not None:
            at.setdefault(index, []).append(name)
    left, right = axes.get_xlim()
    row, last = 0, -math.inf
    for index, names in sorted(at.items()):
        heavy = strong in names
        color = look.ink if heavy else look.muted
        axes.axvline(index, color=color, linewidth=1.2 if heavy else 0.8, linestyle="-" if heavy else (0, (2, 2)), zorder=1.5)
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


@chart()
def search_progress(figure: FigureBase, look: Look, generations: Sequence[Json], of: str = "needle") -> str:
    """Perplexity by generation: new candidates, best so far, median and quartiles of the population.

    Quartiles include dropped candidates, at the perplexity they had then. Without them, dropping more candidates would
    improve the quartiles. ``of``: needle or text.
    """
    axes, new = figure.add_subplot(), candidates(generations)
    steps = [line["generation"] for line in generations]
    quartiles = np.array([np.percentile([*map(bounded, line["perplexities"])], (25, 50, 75)) for line in generations])
    best = [bounded(line["best_perplexity"]) for line in generations]
    scale = PerplexityScale.over(np.array([*new.perplexity, *best]), room=0.04)
    scale.on_y(axes, of)
    axes.fill_between(
        steps,
        scale.clip(quartiles[:, 0]),
        scale.clip(quartiles[:, 2]),
        color=look.series[0],
        alpha=0.18,
        linewidth=0,
        label="quartiles",
    )
    for mask, marker, alpha, label in _kinds(new):
        axes.scatter(
            new.generation[mask],
            scale.clip(new.perplexity[mask]),
            marker=marker,
            s=9,
            color=look.series[0],
            alpha=alpha,
            linewidths=0.7,
            label=label,
        )
    axes.plot(steps, scale.clip(quartiles[:, 1]), "--", color=look.series[0], linewidth=1.2, label="median")
    axes.plot(steps, scale.clip(best), "o-", color=look.series[1], markersize=3.5, linewidth=2, label="best so far")
    axes.set(xlabel="generation")
    _whole_numbers(axes.xaxis, steps)
    _legend_above(figure, axes)
    return f"{of} perplexity by generation"


def _kinds(of: Candidates) -> list[tuple[np.ndarray, str, float, str]]:
    """(mask, marker, opacity, label) of complete and of dropped candidates; a kind without candidates is left out."""
    kinds = [(of.complete, "o", 0.4, "new candidate"), (~of.complete, "x", 0.3, "new, dropped early")]
    return [kind for kind in kinds if kind[0].any()]


@chart()
def critical_indices(figure: FigureBase, look: Look, generations: Sequence[Json], spectrum: Spectrum | None) -> str:
    """Share of each critical index in the population, by generation."""
    axes = figure.add_subplot()
    rows = _rows([index for line in generations for index in line["critical_indices"]], spectrum)
    share = np.array([[np.mean(np.array(line["critical_indices"]) == row) for line in generations] for row in rows])
    columns = np.arange(len(generations) + 1) - 0.5
    mesh = axes.pcolormesh(columns, np.append(rows, rows[-1] + 1) - 0.5, share, cmap="cividis", vmin=0)
    if len(generations) <= 20:
        mesh.set(edgecolor=look.card, linewidth=0.7)
    axes.grid(False)
    axes.set(xlabel="generation", ylabel="critical index rcd")
    _whole_numbers(axes.xaxis, range(len(generations)))
    _whole_numbers(axes.yaxis, rows)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, label="share of the population")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    return "critical index in the population by generation"


@chart()
def critical_index_histogram(
    figure: FigureBase,
    look: Look,
    generations: Sequence[Json],
    search: Json | None,
    top_k: int,
    spectrum: Spectrum | None,
) -> str:
    """Critical indices of all candidates, beside the ``top_k`` best of the last generation; a candidate counts once."""
    axes, every = figure.add_subplot(), candidates(generations)
    best, chosen = last_parents(generations, top_k), winner(generations, search)[2]
    rows = _rows(every.critical_index, spectrum)

    def shares(indices: Sequence[int] | np.ndarray, of: int) -> np.ndarray:
        return np.array([np.sum(np.asarray(indices) == row) / of for row in rows])

    n, whole = len(every.complete), every.critical_index[every.complete]
    kept, dropped = shares(whole, n), shares(every.critical_index[~every.complete], n)
    name = f"{len(whole):,} of {n:,} candidates" if dropped.any() else f"all {n:,} candidates"
    axes.bar(rows - 0.2, kept, 0.38, color=look.series[0], alpha=0.75, label=name, zorder=2)
    if dropped.any():
        axes.bar(
            rows - 0.2,
            dropped,
            0.38,
            kept,
            color=look.series[0],
            alpha=0.25,
            label=f"{n - len(whole):,} dropped early",
            zorder=2,
        )
    axes.bar(rows + 0.2, shares(best, len(best)), 0.38, color=look.series[1], label=f"best {len(best)} at the end", zorder=2)
    axes.set(xlabel="critical index rcd", ylabel="share", xlim=(rows[0] - 0.7, rows[-1] + 0.7))
    axes.grid(False, axis="x")
    _whole_numbers(axes.xaxis, rows)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    ends = {"d10": spectrum.lowest_critical_index, "tcd": spectrum.critical_index} if spectrum else {}
    _mark_indices(axes, look, {"winner": chosen, **ends}, strong="winner")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return "critical indices of all candidates and of the best at the end"


def _rows(found: Sequence[int] | np.ndarray, spectrum: Spectrum | None) -> np.ndarray:
    """Every critical index that occurs or may occur, gaps included."""
    ends = (spectrum.lowest_critical_index, spectrum.critical_index) if spectrum else ()
    return np.arange(min([*ends, *found]), max([*ends, *found]) + 1)


@chart()
def attention_factors(figure: FigureBase, look: Look, generations: Sequence[Json], search: Json | None = None, of: str = "needle") -> str:
    """Every candidate: attention factor against perplexity, coloured by critical index; a ring marks the winner."""
    axes, every = figure.add_subplot(), candidates(generations)
    scale = PerplexityScale.over(every.perplexity, room=0.05)
    scale.on_y(axes, of)
    low, high = every.critical_index.min(), every.critical_index.max()
    norm = BoundaryNorm(np.arange(low, high + 2) - 0.5, 256)
    color_map = colormaps["viridis"]
    for mask, marker, _, _ in _kinds(every):
        strong = marker == "o"
        order = np.flatnonzero(mask)[np.argsort(-every.perplexity[mask], kind="stable")]  # the best are drawn last, on top
        colors = color_map(norm(every.critical_index[order])) if high else look.series[0]
        axes.scatter(
            every.attention_factor[order],
            scale.clip(every.perplexity[order]),
            c=colors,
            marker=marker,
            s=17 if strong else 13,
            alpha=0.95 if strong else 0.35,
            label=None if every.complete.all() else "all documents" if strong else "dropped early",
            edgecolors=look.muted if strong else None,
            linewidths=0.4 if strong else 0.8,
        )
    x, y, index = winner(generations, search)
    name = f"winner: {x:g}" + (f", rcd {index}" if high else "")
    axes.scatter([x], scale.clip([y]), s=90, facecolors="none", edgecolors=look.ink, linewidths=1.4, label=name, zorder=4)
    axes.set(xlabel="attention factor of the long window")
    _legend_above(figure, axes)
    if high:
        _index_bar(figure, axes, norm, int(low), int(high))
    return f"{of} perplexity by attention factor"


def _index_bar(figure: FigureBase, axes: Axes, norm: BoundaryNorm, low: int, high: int) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.02, label="critical index rcd")
    _whole_numbers(bar.ax.yaxis, range(low, high + 1))
    bar.ax.yaxis.set_minor_locator(NullLocator())


@chart()
def documents(figure: FigureBase, look: Look, journal: Sequence[Json]) -> str:
    """Loss of each document over all candidates: quartiles, median and best."""
    axes = figure.add_subplot()
    losses: dict[int, list[float]] = {}
    for entry in journal:
        losses.setdefault(entry["document"], []).append(min(max(bounded(entry["nll"]), 1e-6), 1e4))
    numbers = sorted(losses)
    low, middle, high = np.array([np.percentile(losses[number], (25, 50, 75)) for number in numbers]).T
    axes.vlines(numbers, low, high, color=look.series[0], alpha=0.35, linewidth=min(9.0, 160 / len(numbers)))
    axes.plot(numbers, middle, "D", color=look.series[0], markersize=4.5, label="median candidate")
    axes.plot(
        numbers,
        [min(losses[number]) for number in numbers],
        "_",
        color=look.series[1],
        markersize=14,
        markeredgewidth=2,
        label="best candidate",
    )
    _log_y(axes)
    axes.set(
        xlabel="document",
        ylabel="summed loss of the answers (nats, log scale)",
        xlim=(numbers[0] - 0.6, numbers[-1] + 0.6),
    )
    _whole_numbers(axes.xaxis, numbers)
    _legend_above(figure, axes)
    return "loss by document"


@chart()
def loss_by_window(figure: FigureBase, look: Look, metrics: Sequence[Json], whose: str) -> str:
    """Loss of short and long segments: every step (faint) and the running mean (strong)."""
    axes = figure.add_subplot()
    for key, label, color in (("loss_short", "short window", 0), ("loss_long", "long window", 1)):
        steps, values = _series(metrics, key)
        if len(values):
            axes.plot(steps, values, color=look.series[color], alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, len(values) // 25), color=look.series[color], linewidth=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend(loc="upper right")
    return f"training loss of {whose} by window"


@chart()
def metric(figure: FigureBase, look: Look, metrics: Sequence[Json], key: str, label: str, smoothed: bool) -> str:
    """One figure of metrics.jsonl over the steps."""
    axes = figure.add_subplot()
    steps, values = _series(metrics, key)
    axes.plot(steps, values, color=look.series[0], alpha=0.3 if smoothed else 1.0, linewidth=0.8 if smoothed else 2)
    if smoothed:
        axes.plot(steps, smooth(values, len(values) // 25), color=look.series[0], linewidth=2)
    axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, 1.1 * float(np.percentile(values, 99.5)) or 1.0))
    if key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    elif key == "tokens_per_s":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return f"{label} by step"


def has(metrics: Sequence[Json], key: str) -> bool:
    """Whether any step recorded ``key``."""
    return any(line.get(key) is not None for line in metrics)


def smooth(values: Sequence[float] | np.ndarray, steps: int) -> np.ndarray:
    """Centred moving average over ``steps`` values, fewer at the ends; no lag, unlike an exponential mean."""
    ones, window = np.ones(len(values)), np.ones(min(max(steps | 1, 1), 2 * len(values) - 1))
    return _centred(np.asarray(values, dtype=float), window) / _centred(ones, window)


def _centred(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    half = len(window) // 2
    return np.convolve(values, window)[half : half + len(values)]


def _series(metrics: Sequence[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _whole_numbers(axis: Axis, values: Sequence[int] | np.ndarray) -> None:
    """Ticks at the values; at every second, fifth, tenth … where there are many values."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) <= 13 * step or step == 1000)
    axis.set_major_locator(FixedLocator([value for value in values if value % step == 0 or len(values) == 1]))


def _log_y(axes: Axes) -> None:
    """Log scale with plain numbers; the cut at ``CEILING`` keeps hopeless candidates from squeezing the rest."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    high = min(high, max(low, 1.0) * CEILING)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 4 * low else LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _percent(value: float, _: object) -> str:
    return f"{value:.0%}"
