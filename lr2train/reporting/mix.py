"""Pictures of a corpus's segment table: document lengths, target and planned mix, documents per segment.

Choice: drawn from the corpus's ``plan.json`` alone, which holds all counts. Cost: pictures are as coarse as its
histograms, four bins an octave.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lr2train.io import read_json
from lr2train.reporting.canvas import N_SERIES, Chart, Look, chart, side_by_side
from lr2train.reporting.numbers import amount, context_length

PICTURES = ("lengths", "mix", "segments")
_OTHERS = "others"
Json = dict[str, Any]


def ensure_mix_pictures(folder: Path) -> list[Path]:
    """Draw ``folder/plan.json`` into ``folder/pictures``, unless all pictures are newer than the file.

    Args:
        folder: of a corpus.

    Returns:
        lengths.png, mix.png, segments.png.
    """
    paths = [folder / "pictures" / f"{name}.png" for name in PICTURES]
    planned = (folder / "plan.json").stat().st_mtime
    if all(path.exists() and path.stat().st_mtime >= planned for path in paths):
        return paths
    report = read_json(folder / "plan.json")
    rows = [
        [{**row, "name": row[what]} for row in report[f"by_{what}"] if row["target_tokens"]]
        for what in ("source", "bucket", "window")
    ]
    if [row["name"] for row in rows[1]] == [row["name"] for row in rows[2]]:
        del rows[2]  # the buckets are the windows
    drawn: list[tuple[str, list[Chart]]] = [
        (
            "Tokens by document length: held by the sources, and planned",
            [lengths(report, "tokens"), lengths(report, "planned_tokens")],
        ),
        (
            "Mix: target and planned",
            [marginals(row) for row in rows if row] or [lengths(report, "planned_tokens")],
        ),
        (
            "Documents per segment",
            [documents_per_segment(report["windows"][window], window) for window in ("short", "long")],
        ),
    ]
    return [side_by_side(charts, path, title) for path, (title, charts) in zip(paths, drawn, strict=True)]


@chart((5.6, 3.4))
def lengths(figure: FigureBase, look: Look, report: Json, key: str) -> str:
    """Tokens by document length, sources stacked; dotted lines are borders of buckets."""
    axes, histograms = figure.add_subplot(), report["histograms"]["lengths"]
    stacked = _grouped({name: np.array(one[key], float) for name, one in histograms["sources"].items()})
    edges = 2.0 ** (np.arange(len(next(iter(stacked.values()))) + 1) / histograms["per_octave"])
    base = np.zeros(len(edges) - 1)
    for color, (name, tokens) in zip(look.series, stacked.items(), strict=False):
        axes.stairs(base + tokens, edges, baseline=base, fill=True, color=color, label=name)
        base = base + tokens
    _cut_to(axes, edges, np.sum([one["tokens"] for one in histograms["sources"].values()], axis=0))
    low, high = axes.get_xlim()
    for border in sorted(
        {one[end] for one in report["by_bucket"] for end in ("above_tokens", "to_tokens")} - {None, 0}
    ):
        if low < border < high:
            axes.axvline(border, color=look.ink, linestyle=":", linewidth=1.0)
    axes.set(
        xlabel="document length (tokens, log scale)", ylabel="tokens held" if key == "tokens" else "tokens planned"
    )
    axes.yaxis.set_major_formatter(FuncFormatter(_amount))
    axes.legend(loc="upper left")
    return f"{key.replace('_', ' ')} by document length and source"


def _grouped(by_source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The largest sources, one for each colour; the others are summed."""
    if len(by_source) <= N_SERIES:
        return by_source
    largest = sorted(by_source, key=lambda name: -by_source[name].sum())[: N_SERIES - 1]
    rest = np.sum([tokens for name, tokens in by_source.items() if name not in largest], axis=0)
    return {**{name: by_source[name] for name in by_source if name in largest}, _OTHERS: rest}


def _cut_to(axes: Axes, edges: np.ndarray, there: np.ndarray) -> None:
    """Log scale over the lengths that occur; ``there`` holds tokens by bin."""
    axes.set_xscale("log", base=2)
    used = np.flatnonzero(there)
    if len(used):
        axes.set_xlim(float(edges[used[0]]), float(edges[used[-1] + 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(_window))


@chart((4.2, 3.4))
def marginals(figure: FigureBase, look: Look, rows: Sequence[Json]) -> str:
    """Target and planned tokens as bars, with the relative error."""
    axes, places = figure.add_subplot(), np.arange(len(rows))[::-1]
    for key, offset, color, label in (
        ("target_tokens", 0.2, look.muted, "target"),
        ("planned_tokens", -0.2, look.series[0], "planned"),
    ):
        axes.barh(places + offset, [row[key] for row in rows], 0.38, color=color, label=label)
    for place, row in zip(places, rows, strict=True):
        axes.text(
            row["planned_tokens"], place - 0.2, f" {row['error']:+.2%}", va="center", fontsize=7.5, color=look.ink
        )
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set(
        xlabel="tokens",
        ylim=(min(len(rows) - 4, 0) - 0.7, len(rows) - 0.3),
        xlim=(0, 1.25 * max(max(row["target_tokens"], row["planned_tokens"]) for row in rows)),
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_amount))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    return "target and planned tokens"


@chart((4.8, 3.0))
def documents_per_segment(figure: FigureBase, look: Look, plan: Json, window: str) -> str:
    """Histogram of documents, or parts of documents, in a segment."""
    axes, each = figure.add_subplot(), plan["documents_per_segment"]
    if each["edges"]:
        edges = np.array(each["edges"]) - 0.5  # each whole number lies in the middle of its bar
        axes.stairs(each["segments"], edges, fill=True, color=look.series[0 if window == "short" else 1])
        axes.set_xlim(edges[0], edges[-1])
    axes.set(xlabel=f"documents or parts of documents in a {window} segment", ylabel="segments")
    axes.set_title(
        f"{plan['segments']:,} segments, {plan['padding_share']:.3%} padding",
        fontsize=8.5,
        color=look.muted,
        loc="left",
    )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return f"documents in a {window} segment"


def _amount(value: float, _: object) -> str:
    return amount(value)


def _window(value: float, _: object) -> str:
    return context_length(int(value))
