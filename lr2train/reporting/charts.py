"""Drawings of factors and of training; ``canvas`` renders them as SVG or PNG.

Choice: a drawing depends on data alone, and takes colours from a ``Look``, which ``canvas`` passes. Each function
returns a description for screen readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from lr2train.reporting.axes import legend_above, legend_inside, mark_indices, plain
from lr2train.reporting.canvas import WIDE, Look, chart
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS

Json = dict[str, Any]
FIXED_METHODS = (  # legend, method, line style, number of the series colour
    ("PI", "pi", "--", 5),
    ("NTK", "ntk", "-.", 1),
    ("YaRN", "yarn", "--", 2),
    ("LongRoPE v1, start", "longrope", ":", 3),
)


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
    mark_indices(
        axes, look, {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index}
    )
    axes.set(xlabel="cosine index i  (fast rotation → slow rotation)", ylabel="rescale factor λᵢ  (log scale)")
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    legend_inside(axes, look)
    return "rescale factors by cosine index"


@chart()
def periods(figure: FigureBase, look: Look, factors: Factors, critical_index: int | None) -> str:
    """Rescaled periods lambda_i T_i beside L0 and L, at the indices around the critical index."""
    axes, spectrum = figure.add_subplot(), factors.spectrum
    first = max(spectrum.lowest_critical_index - 2, 0)
    shown = np.arange(first, min(2 * spectrum.critical_index - first, spectrum.n_dims - 1) + 1)
    unscaled = spectrum.period_tokens
    axes.plot(shown, spectrum.own_period_tokens[shown], color=look.muted, linewidth=1.3, label="original RoPE")
    for label, method, line, color in FIXED_METHODS[:3]:
        rescale = np.array(METHODS[method](spectrum, factors.target_window_tokens).rescale)
        axes.plot(shown, (unscaled * rescale)[shown], line, color=look.series[color], linewidth=1.3, label=label)
    axes.plot(
        shown,
        (unscaled * factors.rescale)[shown],
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
    mark_indices(
        axes, look, {"d10": spectrum.lowest_critical_index, "rcd": critical_index, "tcd": spectrum.critical_index}
    )
    axes.set(xlabel="cosine index i", ylabel="period λᵢTᵢ, tokens  (log scale)")
    axes.yaxis.set_major_locator(LogLocator(base=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_inside(axes, look)
    return "rotation periods by cosine index beside both windows"


@chart()
def loss_by_window(
    figure: FigureBase, look: Look, metrics: Sequence[Json], held_out: Sequence[Json], whose: str
) -> str:
    """Loss of short and long segments: every step (faint), the running mean (strong), and held-out documents
    (points).
    """
    axes = figure.add_subplot()
    for key, label, color in (("loss_short", "short window", 0), ("loss_long", "long window", 1)):
        steps, values = _series(metrics, key)
        if len(values):
            axes.plot(steps, values, color=look.series[color], alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, len(values) // 25), color=look.series[color], linewidth=2, label=label)
        steps, values = _series(held_out, f"heldout_{key}")
        if len(values):
            named = f"{label}, held out"
            axes.plot(steps, values, "o--", color=look.series[color], markersize=3.5, linewidth=1.2, label=named)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    if held_out:
        legend_above(figure, axes)  # four entries would cover the curves
    else:
        axes.legend(loc="upper right")
    return f"{'training and held-out' if held_out else 'training'} loss of {whose} by window"


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
