"""Drawings of a search: progress, critical indices, attention factors, documents.

Candidates that racing dropped were scored on fewer documents; they are drawn fainter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator

from lr2train.reporting.axes import legend_above, log_y, mark_indices, percent, whole_numbers
from lr2train.reporting.canvas import Look, chart
from lr2train.reporting.population import Candidates, bounded, candidates, last_parents, winner
from lr2train.reporting.scales import PerplexityScale
from lr2train.rope.spectrum import Spectrum

Json = dict[str, Any]


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
    whole_numbers(axes.xaxis, steps)
    legend_above(figure, axes)
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
    # [critical indices, generations]
    share = np.array([[np.mean(np.array(line["critical_indices"]) == row) for line in generations] for row in rows])
    columns = np.arange(len(generations) + 1) - 0.5
    mesh = axes.pcolormesh(columns, np.append(rows, rows[-1] + 1) - 0.5, share, cmap="cividis", vmin=0)
    if len(generations) <= 20:  # in longer searches, lines between cells would hide the cells
        mesh.set(edgecolor=look.card, linewidth=0.7)
    axes.grid(False)
    axes.set(xlabel="generation", ylabel="critical index rcd")
    whole_numbers(axes.xaxis, range(len(generations)))
    whole_numbers(axes.yaxis, rows)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, label="share of the population")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(percent))
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
    axes.bar(
        rows + 0.2, shares(best, len(best)), 0.38, color=look.series[1], label=f"best {len(best)} at the end", zorder=2
    )
    axes.set(xlabel="critical index rcd", ylabel="share", xlim=(rows[0] - 0.7, rows[-1] + 0.7))
    axes.grid(False, axis="x")
    whole_numbers(axes.xaxis, rows)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    ends = {"d10": spectrum.lowest_critical_index, "tcd": spectrum.critical_index} if spectrum else {}
    mark_indices(axes, look, {"winner": chosen, **ends}, strong="winner")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return "critical indices of all candidates and of the best at the end"


def _rows(found: Sequence[int] | np.ndarray, spectrum: Spectrum | None) -> np.ndarray:
    """Every critical index that occurs or may occur, gaps included."""
    ends = (spectrum.lowest_critical_index, spectrum.critical_index) if spectrum else ()
    return np.arange(min([*ends, *found]), max([*ends, *found]) + 1)


@chart()
def attention_factors(
    figure: FigureBase, look: Look, generations: Sequence[Json], search: Json | None = None, of: str = "needle"
) -> str:
    """Every candidate: attention factor against perplexity, coloured by critical index; a ring marks the winner."""
    axes, every = figure.add_subplot(), candidates(generations)
    scale = PerplexityScale.over(every.perplexity, room=0.05)
    scale.on_y(axes, of)
    low, high = every.critical_index.min(), every.critical_index.max()
    norm = BoundaryNorm(np.arange(low, high + 2) - 0.5, 256)
    color_map = colormaps["viridis"]
    for mask, marker, _, _ in _kinds(every):
        strong = marker == "o"
        order = np.flatnonzero(mask)[
            np.argsort(-every.perplexity[mask], kind="stable")
        ]  # the best are drawn last, on top
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
    axes.scatter(
        [x], scale.clip([y]), s=90, facecolors="none", edgecolors=look.ink, linewidths=1.4, label=name, zorder=4
    )
    axes.set(xlabel="attention factor of the long window")
    legend_above(figure, axes)
    if high:
        _index_bar(figure, axes, norm, int(low), int(high))
    return f"{of} perplexity by attention factor"


def _index_bar(figure: FigureBase, axes: Axes, norm: BoundaryNorm, low: int, high: int) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.02, label="critical index rcd")
    whole_numbers(bar.ax.yaxis, range(low, high + 1))
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
    log_y(axes)
    axes.set(
        xlabel="document",
        ylabel="summed loss of the answers (nats, log scale)",
        xlim=(numbers[0] - 0.6, numbers[-1] + 0.6),
    )
    whole_numbers(axes.xaxis, numbers)
    legend_above(figure, axes)
    return "loss by document"
