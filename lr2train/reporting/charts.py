"""Drawings of factors and of training, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator

from lr2train.reporting.axes import legend, mark_indices, tick_labels
from lr2train.reporting.canvas import N_SERIES, Drawn, Look, chart, stacked
from lr2train.reporting.inputs import HELD_OUT, Json
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS

FIXED_METHODS = (  # legend, method, line style, number of the series colour
    ("PI", "pi", "--", 5),
    ("NTK", "ntk", "-.", 1),
    ("YaRN", "yarn", "--", 2),
    ("LongRoPE v1, start", "longrope", ":", 3),
)
OF_RUNS = (0, 4, 1, 2, 3, 5)  # numbers of their series colours
MOST_POINTS = 1500  # of a curve of all steps in a picture; the CSV has all


def _marks(factors: Factors, critical_index: int | None) -> dict[str, int | None]:
    spectrum = factors.spectrum
    return {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index}


def _curves(axes: Axes, look: Look, of_run: Mapping[str, Factors], key: str, shown: slice = slice(None)) -> Drawn:
    """One column of the factors of each fixed method, for the first run's window, and of each run."""
    first, parts = next(iter(of_run.values())), {}
    for label, method, line, color in FIXED_METHODS:
        made = METHODS[method](first.spectrum, first.target_window_tokens)
        if all(made.rescale != run.rescale for run in of_run.values()):  # a run's own curve would cover it
            parts[label] = made, {"linestyle": line, "color": look.series[color], "linewidth": 1.3}
    for (name, made), color in zip(of_run.items(), cycle(OF_RUNS)):  # colours repeat
        style = {"marker": "o", "markersize": 3, "linewidth": 2.0, "zorder": 5}
        parts[name] = made, {**style, "color": look.series[color]}
    columns = {}
    for name, (made, style) in parts.items():
        rescale = np.array(made.rescale)
        columns[name] = {"index": np.arange(len(rescale)), "rescale_factor": rescale}
        columns[name]["period_tokens"] = made.spectrum.period_tokens * rescale
        axes.plot(columns[name]["index"][shown], columns[name][key][shown], label=name, **style)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("cosine index i  (fast → slow rotation)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends = "; ".join(f"{name} {column[key][-1]:.4g}" for name, column in columns.items())
    return f"at the last index: {ends}.", stacked(columns, "method")


@chart()
def factor_curves(figure: FigureBase, look: Look, of_run: Mapping[str, Factors], critical_index: int | None) -> Drawn:
    """lambda_i over the cosine index, beside methods without a search (paper, Figures 2b and 4).

    Out of distribution: from tcd on, lambda_i below s leaves angles that pretraining has not seen.
    """
    axes, first = figure.add_subplot(), next(iter(of_run.values()))
    words, columns = _curves(axes, look, of_run, "rescale_factor")
    low, border = axes.get_ylim()[0], [first.spectrum.critical_index, first.spectrum.n_dims - 1]
    axes.fill_between(border, low, first.scale, color=look.muted, alpha=0.18, label="out of distribution")
    axes.set_ylim(bottom=low)
    axes.annotate(f"s = {first.scale:g}", (0, first.scale), (0, 3), textcoords="offset points", color=look.muted)
    mark_indices(axes, look, _marks(first, critical_index))
    axes.set_ylabel("rescale factor λᵢ (log scale)")
    axes.yaxis.set_major_formatter(tick_labels("{:g}".format))
    legend(figure, axes)
    return f"Rescale factors by cosine index; {words}", columns


@chart()
def periods(figure: FigureBase, look: Look, of_run: Mapping[str, Factors], critical_index: int | None) -> Drawn:
    """Rescaled periods lambda_i T_i beside L0 and L, at the indices around the critical index."""
    axes, first = figure.add_subplot(), next(iter(of_run.values()))
    spectrum = first.spectrum
    start = max(spectrum.lowest_critical_index - 2, 0)
    shown = slice(start, 2 * spectrum.critical_index - start + 1)
    own = spectrum.own_period_tokens[shown]
    axes.plot(range(start, start + len(own)), own, color=look.muted, linewidth=1.3, label="original RoPE")
    words, columns = _curves(axes, look, of_run, "period_tokens", shown)
    # labels stand where no curve is: L at the left, L0 at the right
    ends = ("L0", spectrum.window_tokens, "right"), ("L", first.target_window_tokens, "left")
    for name, tokens, side in ends:
        axes.axhline(tokens, color=look.ink, linewidth=0.9)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": side, "va": "top", "color": look.ink}
        at = start + len(own) - 1 if side == "right" else start
        axes.annotate(f"{name} = {tokens:,}", (at, tokens), (0, -3), **place)
    mark_indices(axes, look, _marks(first, critical_index))
    axes.set_ylabel("period λᵢTᵢ, tokens (log scale)")
    axes.yaxis.set_major_locator(LogLocator(base=4))
    axes.yaxis.set_major_formatter(tick_labels("{:,.0f}".format))
    legend(figure, axes)
    return f"Rotation periods by cosine index, in tokens; {words}", columns


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
        of_run: (lines of every step, lines with held-out loss). Of several runs the moving averages and the held-out
            loss of needles are drawn: a colour for each run, the short window dashed, needles dotted.
    """
    axes, alone = figure.add_subplot(), len(of_run) == 1
    for number, (name, (metrics, held_out)) in enumerate(of_run.items()):
        for window, line in (("long", "-"), ("short", "--")):
            color = look.series[("short", "long").index(window) if alone else number % N_SERIES]
            label = f"{window} window" if alone else f"{name}, {window}"
            steps, values = _series(metrics, f"loss_{window}")
            _smoothed(axes, steps, values, alone, color=color, label=label, linestyle="-" if alone else line)
            if alone:
                _points(axes, held_out, f"heldout_loss_{window}", "o--", color=color, label=f"{label}, held out")
        style = {"color": look.series[2 if alone else number % N_SERIES]}
        style["label"] = "needles, held out" if alone else f"{name}, needles"
        _points(axes, held_out, "heldout_loss_needles", "o:", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    legend(figure, axes)
    keys = ("loss_short", "loss_long", *HELD_OUT)
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


def _points(axes: Axes, lines: Sequence[Json], key: str, line: str, **style: Any) -> None:
    """The measured values of a key, joined; nothing where none was measured."""
    steps, values = _series(lines, key)
    if len(values):
        axes.plot(steps, values, line, markersize=3.5, linewidth=1.2, **style)


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
