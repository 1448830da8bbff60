"""Drawings of factors and of training, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator

from lr2train.reporting.axes import legend, mark_indices, tick_labels
from lr2train.reporting.canvas import N_SERIES, Drawn, Look, chart, stacked
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS

Json = dict[str, Any]
FIXED_METHODS = (  # legend, method, line style, number of the series colour
    ("PI", "pi", "--", 5),
    ("NTK", "ntk", "-.", 1),
    ("YaRN", "yarn", "--", 2),
    ("LongRoPE v1, start", "longrope", ":", 3),
)
MOST_POINTS = 1500  # of a curve of all steps in a picture; the CSV has all


@dataclass(frozen=True)
class Curve:
    """Factors with the look of their curve."""

    factors: Factors
    style: dict[str, Any]


def _curves(look: Look, of_run: Mapping[str, Factors]) -> dict[str, Curve]:
    """The fixed methods for the first run's window, then each run's factors."""
    first = next(iter(of_run.values()))
    curves = {
        label: Curve(
            METHODS[method](first.spectrum, first.target_window_tokens),
            {"linestyle": line, "color": look.series[color], "linewidth": 1.3},
        )
        for label, method, line, color in FIXED_METHODS
    }
    for number, (name, factors) in enumerate(of_run.items()):
        style = {"marker": "o", "color": look.series[(0, 4, 1, 2, 3, 5)[number % N_SERIES]], "markersize": 3}
        curves[name] = Curve(factors, {**style, "linewidth": 2.0, "zorder": 5})
    return curves


def _numbers(curves: Mapping[str, Curve]) -> dict[str, list[Any]]:
    """The CSV of both drawings of factors."""
    parts = {}
    for name, curve in curves.items():
        periods = curve.factors.spectrum.period_tokens * np.array(curve.factors.rescale)
        parts[name] = {"index": range(len(periods)), "rescale_factor": curve.factors.rescale, "period_tokens": periods}
    return stacked(parts, "method")


def _marks(factors: Factors, critical_index: int | None) -> dict[str, int | None]:
    spectrum = factors.spectrum
    return {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index}


@chart()
def factor_curves(figure: FigureBase, look: Look, of_run: Mapping[str, Factors], critical_index: int | None) -> Drawn:
    """lambda_i over the cosine index, beside methods without a search (paper, Figures 2b and 4).

    Out of distribution: from tcd on, lambda_i below s leaves angles that pretraining has not seen.
    """
    axes, first, curves = figure.add_subplot(), next(iter(of_run.values())), _curves(look, of_run)
    for name, curve in curves.items():
        axes.plot(curve.factors.rescale, label=name, **curve.style)
    axes.set_yscale("log", base=2)
    low, border, last = axes.get_ylim()[0], first.spectrum.critical_index, first.spectrum.n_dims - 1
    axes.fill_between([border, last], low, first.scale, color=look.muted, alpha=0.18, label="out of distribution")
    axes.set_ylim(bottom=low)
    axes.axhline(first.scale, color=look.muted, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(f"s = {first.scale:g}", (0, first.scale), (0, 3), textcoords="offset points", color=look.muted)
    mark_indices(axes, look, _marks(first, critical_index))
    axes.set(xlabel="cosine index i  (fast → slow rotation)", ylabel="rescale factor λᵢ (log scale)")
    axes.yaxis.set_major_formatter(tick_labels("{:g}".format))
    legend(figure, axes)
    ends = "; ".join(f"{name} {curve.factors.rescale[-1]:.4g}" for name, curve in curves.items())
    return f"Rescale factors by cosine index. At the last index: {ends}.", _numbers(curves)


@chart()
def periods(figure: FigureBase, look: Look, of_run: Mapping[str, Factors], critical_index: int | None) -> Drawn:
    """Rescaled periods lambda_i T_i beside L0 and L, at the indices around the critical index."""
    axes, first = figure.add_subplot(), next(iter(of_run.values()))
    spectrum, curves = first.spectrum, _curves(look, of_run)
    start = max(spectrum.lowest_critical_index - 2, 0)
    shown = np.arange(start, min(2 * spectrum.critical_index - start, spectrum.n_dims - 1) + 1)
    axes.plot(shown, spectrum.own_period_tokens[shown], color=look.muted, linewidth=1.3, label="original RoPE")
    for name, curve in curves.items():
        own = curve.factors.spectrum.period_tokens * np.array(curve.factors.rescale)
        there = shown[shown < len(own)]
        axes.plot(there, own[there], label=name, **curve.style)
    axes.set_yscale("log", base=2)
    # labels stand where no curve is: L at the left, L0 at the right
    for name, tokens, at, side in (
        ("L0", spectrum.window_tokens, shown[-1], "right"),
        ("L", first.target_window_tokens, shown[0], "left"),
    ):
        axes.axhline(tokens, color=look.ink, linewidth=0.9)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": side, "va": "top", "color": look.ink}
        axes.annotate(f"{name} = {tokens:,}", (at, tokens), (0, -3), **place)
    mark_indices(axes, look, _marks(first, critical_index))
    axes.set(xlabel="cosine index i", ylabel="period λᵢTᵢ, tokens (log scale)")
    axes.yaxis.set_major_locator(LogLocator(base=4))
    axes.yaxis.set_major_formatter(tick_labels("{:,.0f}".format))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes)
    words = f"L0 = {spectrum.window_tokens:,} and L = {first.target_window_tokens:,} tokens"
    return f"Rotation periods by cosine index, beside {words}.", _numbers(curves)


@chart()
def cosines(figure: FigureBase, look: Look, factors: Factors, critical_index: int | None) -> Drawn:
    """What pretraining has seen of a rotation: cos(theta_i t) over the original window (paper, Figure 3)."""
    spectrum = factors.spectrum
    fit = spectrum.window_tokens / spectrum.own_period_tokens
    marks = {**_marks(factors, critical_index), "last": spectrum.n_dims - 1}
    names = {index: name for name, index in reversed(marks.items()) if index is not None}
    places = np.linspace(0, spectrum.window_tokens, 800)
    panels = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    for axes, (index, name) in zip(panels, sorted(names.items()), strict=True):
        axes.plot(places, np.cos(spectrum.own_inv_freq[index] * places), color=look.series[0 if fit[index] >= 1 else 1])
        axes.set(ylim=(-1.2, 1.2), yticks=(-1, 1))
        title = f"{name} {index}: {fit[index]:.2g} periods of {spectrum.own_period_tokens[index]:,.0f} tokens"
        axes.set_title(title, fontsize=9, loc="left", color=look.ink, pad=2)
    panels[-1].set(xlabel="position t in the original window, tokens", xlim=(0, spectrum.window_tokens))
    panels[-1].xaxis.set_major_formatter(tick_labels("{:,.0f}".format))
    words = ", ".join(f"{fit[index]:.2g} at index {index}" for index in sorted(names))
    columns = {"index": range(len(fit)), "period_tokens": spectrum.own_period_tokens, "periods_in_window": fit}
    return f"Periods that fit into the original window: {words}.", columns


@chart()
def loss_by_window(
    figure: FigureBase, look: Look, of_run: Mapping[str, tuple[Sequence[Json], Sequence[Json]]]
) -> Drawn:
    """Loss of short and long segments: every step (faint), the moving average (strong), held-out documents (points).

    Args:
        of_run: (lines of every step, lines with held-out loss). Of several runs the moving average alone is drawn: a
            colour for each run, the short window dashed.
    """
    axes, alone = figure.add_subplot(), len(of_run) == 1
    for number, (name, (metrics, held_out)) in enumerate(of_run.items()):
        for window, line in (("long", "-"), ("short", "--")):
            color = look.series[("short", "long").index(window) if alone else number % N_SERIES]
            label = f"{window} window" if alone else f"{name}, {window}"
            steps, values = _series(metrics, f"loss_{window}")
            _smoothed(axes, steps, values, alone, color=color, label=label, linestyle="-" if alone else line)
            steps, values = _series(held_out, f"heldout_loss_{window}")
            if len(values) and alone:
                style = {"color": color, "markersize": 3.5, "linewidth": 1.2}
                axes.plot(steps, values, "o--", label=f"{label}, held out", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    legend(figure, axes)
    keys = ("loss_short", "loss_long", "heldout_loss_short", "heldout_loss_long")
    lines = {name: _merged(metrics, held_out) for name, (metrics, held_out) in of_run.items()}
    ends = "; ".join(f"{name}: {_ends(every, keys[:2])}" for name, every in lines.items())
    return f"Loss by window. {ends}.", _columns(lines, keys)


@chart()
def metric(figure: FigureBase, look: Look, of_run: Mapping[str, Sequence[Json]], key: str, label: str) -> Drawn:
    """One figure of metrics.jsonl over the steps, with its moving average."""
    axes, alone, top = figure.add_subplot(), len(of_run) == 1, 0.0
    for number, (name, metrics) in enumerate(of_run.items()):
        steps, values = _series(metrics, key)
        _smoothed(axes, steps, values, alone, color=look.series[number % N_SERIES], label=name)
        top = max(top, float(np.percentile(values, 99.5)) if len(values) else 0.0)
    axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, 1.1 * top or 1.0))
    shown: Callable[[float], str] = "{:.1e}".format if key == "lr" else "{:,g}".format
    axes.yaxis.set_major_formatter(tick_labels(lambda value: shown(value) if value else "0"))
    if not alone:
        legend(figure, axes)
    ends = "; ".join(f"{name}: {_ends(lines, (key,))}" for name, lines in of_run.items())
    return f"{label.capitalize()} by step. {ends}.", _columns(of_run, (key,))


def _smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, raw: bool, **style: Any) -> None:
    """The moving average over 4 % of the run and, faint, every value."""
    if not len(values):
        return
    every = -(-len(values) // MOST_POINTS)
    if raw:
        axes.plot(steps[::every], values[::every], color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(steps[::every], smooth(values, len(values) // 25)[::every], linewidth=2, **style)


def _merged(metrics: Sequence[Json], held_out: Sequence[Json]) -> list[Json]:
    """Every step once; step 0 has a held-out loss alone."""
    by_step = {line["step"]: line for line in [*held_out, *metrics]}
    return [by_step[step] for step in sorted(by_step)]


def _columns(lines: Mapping[str, Sequence[Json]], keys: Sequence[str]) -> dict[str, list[Any]]:
    parts = {name: {key: [line.get(key) for line in every] for key in ("step", *keys)} for name, every in lines.items()}
    return stacked(parts, "run")


def _ends(lines: Sequence[Json], keys: Sequence[str]) -> str:
    """The first and the last value of each key, in words."""
    found = [(key, _series(lines, key)[1]) for key in keys]
    return ", ".join(f"{key} {values[0]:.4g} to {values[-1]:.4g}" for key, values in found if len(values))


def smooth(values: Sequence[float] | np.ndarray, steps: int) -> np.ndarray:
    """Centred moving average over ``steps`` values, fewer at the ends; no lag, unlike an exponential mean."""
    window = np.ones(min(max(steps | 1, 1), 2 * len(values) - 1))
    half = slice(len(window) // 2, len(window) // 2 + len(values))
    return np.convolve(values, window)[half] / np.convolve(np.ones(len(values)), window)[half]


def _series(lines: Sequence[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)
