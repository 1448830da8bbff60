"""Drawings of a search: progress, critical indices, attention factors, documents.

Candidates that racing dropped were scored on fewer documents; they are drawn fainter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, NullLocator

from lr2train.reporting.axes import legend, loss_of, perplexity_axis, tick_labels, whole_numbers
from lr2train.reporting.canvas import N_SERIES, Drawn, Look, chart, stacked
from lr2train.reporting.population import Candidates, bounded, candidates, winner
from lr2train.rope.spectrum import Spectrum

Json = dict[str, Any]


@chart()
def search_progress(figure: FigureBase, look: Look, searches: Mapping[str, Sequence[Json]], of: str) -> Drawn:
    """Perplexity by generation: new candidates, best, median and quartiles; of several searches the best alone.

    Quartiles include dropped candidates, at the perplexity they had then. Without them, dropping more candidates would
    improve the quartiles. ``of``: needle or text.
    """
    axes, parts = figure.add_subplot(), {}
    for number, (name, generations) in enumerate(searches.items()):
        steps = [line["generation"] for line in generations]
        best = [bounded(line["best_perplexity"]) for line in generations]
        low, middle, high = np.transpose(
            [np.percentile([*map(bounded, line["perplexities"])], (25, 50, 75)) for line in generations]
        )
        color = look.series[(number + 1) % N_SERIES]
        if len(searches) == 1:
            new, blue = candidates(generations), look.series[0]
            axes.fill_between(steps, loss_of(low), loss_of(high), color=blue, alpha=0.18, label="quartiles")
            for mask, marker, alpha, label in _kinds(new):
                dots = {"marker": marker, "s": 9, "color": blue, "alpha": alpha, "linewidths": 0.7, "label": label}
                axes.scatter(new.generation[mask], loss_of(new.perplexity[mask]), **dots)
            axes.plot(steps, loss_of(middle), "--", color=blue, linewidth=1.2, label="median")
            name = "best"
        axes.plot(steps, loss_of(best), "o-", color=color, markersize=3.5, linewidth=2, label=name)
        parts[name] = {"generation": steps, "best": best, "quartile_25": low, "median": middle, "quartile_75": high}
    perplexity_axis(axes, of)
    axes.set(xlabel="generation")
    whole_numbers(axes.xaxis, range(max(len(generations) for generations in searches.values())))
    legend(figure, axes)
    ends = "; ".join(f"{name} {one['best'][0]:.4g} to {one['best'][-1]:.4g}" for name, one in parts.items())
    return f"{of.capitalize()} perplexity by generation: {ends}.", stacked(parts, "search")


def _kinds(of: Candidates) -> list[tuple[np.ndarray, str, float, str]]:
    """(mask, marker, opacity, label) of complete and of dropped candidates; a kind without candidates is left out."""
    kinds = [(of.complete, "o", 0.4, "new candidate"), (~of.complete, "x", 0.3, "dropped early")]
    return [kind for kind in kinds if kind[0].any()]


@chart()
def critical_indices(
    figure: FigureBase, look: Look, generations: Sequence[Json], search: Json | None, spectrum: Spectrum | None
) -> Drawn:
    """Share of each critical index in the population, by generation; lines are d10, tcd and the winner."""
    axes, chosen = figure.add_subplot(), winner(generations, search)[2]
    marks = {"winner": chosen}
    if spectrum:
        marks |= {"d10": spectrum.lowest_critical_index, "tcd": spectrum.critical_index}
    found = [*marks.values(), *(index for line in generations for index in line["critical_indices"])]
    rows = np.arange(min(found), max(found) + 1)
    # [critical indices, generations]
    share = np.array([[np.mean(np.array(line["critical_indices"]) == row) for line in generations] for row in rows])
    columns = np.arange(len(generations) + 1) - 0.5
    mesh = axes.pcolormesh(columns, np.append(rows, rows[-1] + 1) - 0.5, share, cmap="cividis", vmin=0)
    if len(generations) <= 20:  # in longer searches, lines between cells would hide the cells
        mesh.set(edgecolor=look.card, linewidth=0.7)
    axes.grid(False)
    axes.set(xlabel="generation", ylabel="critical index rcd")
    whole_numbers(axes.xaxis, range(len(generations)))
    names = {index: " = ".join(name for name in marks if marks[name] == index) for index in marks.values()}
    axes.set_yticks([*names], [f"{name} {index}" for index, name in names.items()])
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, label="share of the population")
    bar.ax.yaxis.set_major_formatter(tick_labels("{:.0%}".format))
    parts = {str(row): {"generation": range(len(generations)), "share": share[i]} for i, row in enumerate(rows)}
    words = f"The winner has {chosen}; the last generation holds it in {share[[*rows].index(chosen)][-1]:.0%}"
    return f"Critical indices in the population. {words}.", stacked(parts, "critical_index")


@chart()
def attention_factors(
    figure: FigureBase, look: Look, generations: Sequence[Json], search: Json | None, of: str
) -> Drawn:
    """Every candidate: attention factor against perplexity, coloured by critical index; a ring marks the winner."""
    axes, every = figure.add_subplot(), candidates(generations)
    low, high = int(every.critical_index.min()), int(every.critical_index.max())
    norm = BoundaryNorm(np.arange(low, high + 2) - 0.5, 256)
    for mask, marker, _, label in _kinds(every):
        strong = marker == "o"
        order = np.flatnonzero(mask)[np.argsort(-every.perplexity[mask], kind="stable")]  # the best on top
        colors = colormaps["viridis"](norm(every.critical_index[order])) if high else look.series[0]
        style = {"s": 17, "alpha": 0.95, "edgecolors": look.muted} if strong else {"s": 13, "alpha": 0.35}
        style["label"] = "candidate" if strong else label
        axes.scatter(
            every.attention_factor[order], loss_of(every.perplexity[order]), c=colors, marker=marker, linewidths=0.5,
            **style,
        )  # fmt: skip
    x, y, index = winner(generations, search)
    name = f"winner: {x:g}" + (f", rcd {index}" if high else "")
    ring = {"s": 90, "facecolors": "none", "edgecolors": look.ink, "linewidths": 1.4, "zorder": 4}
    axes.scatter([x], loss_of([y]), label=name, **ring)
    perplexity_axis(axes, of)
    axes.set(xlabel="attention factor of the long window")
    legend(figure, axes)
    if high:
        bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.02, label="critical index rcd")
        whole_numbers(bar.ax.yaxis, range(low, high + 1))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    return f"{of.capitalize()} perplexity of {len(every)} candidates by attention factor; {name}.", every.columns()


@chart()
def documents(figure: FigureBase, look: Look, journal: Sequence[Json]) -> Drawn:
    """Loss of each document over all candidates: quartiles, median and best."""
    axes, losses = figure.add_subplot(), {}
    for entry in journal:
        losses.setdefault(entry["document"], []).append(min(max(bounded(entry["nll"]), 1e-6), 1e4))
    numbers = sorted(losses)
    low, middle, high = np.array([np.percentile(losses[number], (25, 50, 75)) for number in numbers]).T
    best = [min(losses[number]) for number in numbers]
    axes.vlines(numbers, low, high, color=look.series[0], alpha=0.35, linewidth=min(9.0, 160 / len(numbers)))
    axes.plot(numbers, middle, "D", color=look.series[0], markersize=4.5, label="median candidate")
    axes.plot(numbers, best, "_", color=look.series[1], markersize=14, markeredgewidth=2, label="best candidate")
    axes.set(xlabel="document", ylabel="loss of the answers (nats, log scale)")
    axes.set(xlim=(numbers[0] - 0.6, numbers[-1] + 0.6), yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(high) < 100 * min(best) else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(tick_labels("{:g}".format))
    whole_numbers(axes.xaxis, numbers)
    legend(figure, axes)
    columns = {"document": numbers, "best": best, "quartile_25": low, "median": middle, "quartile_75": high}
    return f"Loss of {len(numbers)} documents over all candidates: quartiles, median and best.", columns
