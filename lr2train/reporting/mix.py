"""Drawings of a corpus: document lengths, target and planned mix, documents per segment, attention of a segment.

Choice: the first three are drawn from the corpus's ``plan.json`` alone, which holds all counts. Cost: they are as
coarse as its histograms, four bins an octave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from lr2train.data.plan import segment_table
from lr2train.reporting.axes import legend, tick_labels
from lr2train.reporting.canvas import N_SERIES, Chart, Drawn, Look, chart, stacked
from lr2train.reporting.numbers import amount, context_length

OTHERS = "others"
Json = dict[str, Any]
Spans = Sequence[tuple[int, int]]


def corpus_charts(folder: Path, plan: Json | None, long_attention: str = "segment") -> dict[str, Chart]:
    """Name -> drawing; those of ``plan.json``, and where the segment tables lie beside, that of the first segments."""
    made = {}
    if plan:
        made = {"lengths": lengths(plan), "mix": marginals(plan), "segments": documents_per_segment(plan["windows"])}
    spans = {window: next(iter(segments(folder, window, 1)), []) for window in ("short", "long")}
    return {**made, "windows": windows(spans, long_attention == "document")} if any(spans.values()) else made


def segments(folder: Path, window: str, most: int) -> list[Spans]:
    """[start, stop) of each document in the first ``most`` segments of a window; empty without a segment table."""
    path = segment_table.file_of(folder, window)
    if not path.is_file():
        return []
    table = segment_table.read(path, 0)
    every = (table.spans_of(number) for number in range(min(most, table.n_segments)))
    offset, stop = table.offset, table.offset + table.stop - table.start
    return [[(int(offset[i]), int(stop[i])) for i in rows] for rows in every]


@chart((4.8, 2.8))
def windows(figure: FigureBase, look: Look, spans: Mapping[str, Spans], masked: bool) -> Drawn:
    """Which tokens attend to which in the first segment of each window (paper, Figure 5).

    A short segment has the original RoPE and a document mask. A long one has the rescaled RoPE and full attention, or
    with ``masked`` (``data.long_attention`` is document) the document mask too.
    """
    words = {"short": "short: original RoPE", "long": "long: rescaled RoPE"}
    for number, (axes, (window, of)) in enumerate(zip(figure.subplots(1, 2), spans.items(), strict=True)):
        end = max((stop for _, stop in of), default=1)
        for start, stop in of if masked or window == "short" else [(0, end)]:
            axes.fill([start, start, stop], [start, stop, stop], color=look.series[number], alpha=0.85)
        for start, _ in of[1:]:
            axes.axhline(start, color=look.line, linewidth=0.6)
        axes.set(xlim=(0, end), ylim=(end, 0), aspect="equal", xlabel="attends to token", xticks=(0, end))
        axes.set(yticks=(0, end), ylabel="token" if not number else "")
        axes.grid(False)
        axes.set_title(words[window], fontsize=9, loc="left", color=look.ink)
    columns = {window: {"start": [a for a, _ in of], "stop": [b for _, b in of]} for window, of in spans.items()}
    counts = " and ".join(f"{len(of)} documents in the {window} segment" for window, of in spans.items())
    return f"Attention within a segment: {counts}.", stacked(columns, "window")


@chart((4.8, 4.6))
def lengths(figure: FigureBase, look: Look, plan: Json) -> Drawn:
    """Tokens by document length, sources stacked: held above, planned below; dotted lines are borders of buckets."""
    histograms = plan["histograms"]["lengths"]
    sources = {
        name: np.array([one["tokens"], one["planned_tokens"]], float) for name, one in histograms["sources"].items()
    }
    shown, panels = grouped(sources), figure.subplots(2, 1, sharex=True)
    held = np.sum([one[0] for one in shown.values()], axis=0)
    edges = 2.0 ** (np.arange(len(held) + 1) / histograms["per_octave"])
    used = np.flatnonzero(held) if held.any() else np.arange(len(held))
    low, high = edges[used[0]], edges[used[-1] + 1]
    borders = {one[end] for one in plan["by_bucket"] for end in ("above_tokens", "to_tokens")} - {None, 0}
    for number, (axes, label) in enumerate(zip(panels, ("tokens held", "tokens planned"), strict=True)):
        base = np.zeros(len(held))
        for color, (name, tokens) in zip(look.series, shown.items(), strict=False):
            axes.stairs(base + tokens[number], edges, baseline=base, fill=True, color=color, label=name)
            base = base + tokens[number]
        for border in borders:
            if low < border < high:
                axes.axvline(border, color=look.ink, linestyle=":", linewidth=1.0)
        axes.set(ylabel=label)
        axes.yaxis.set_major_formatter(tick_labels(amount))
    axes = panels[-1]
    axes.set_xscale("log", base=2)
    axes.set(xlim=(low, high), xlabel="document length (tokens, log scale)")
    axes.xaxis.set_major_formatter(tick_labels(lambda value: context_length(int(value))))
    legend(figure, panels[0])
    bins = {"from_tokens": edges[:-1], "to_tokens": edges[1:]}
    parts = {name: {**bins, "tokens": one[0], "planned_tokens": one[1]} for name, one in sources.items()}
    return f"Tokens by document length, held and planned, of {len(parts)} sources.", stacked(parts, "source")


def grouped(by_source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The largest sources, one for each colour; the others are summed. Arrays of equal shape."""
    if len(by_source) <= N_SERIES:
        return dict(by_source)
    largest = sorted(by_source, key=lambda name: -by_source[name].sum())[: N_SERIES - 1]
    rest = np.sum([tokens for name, tokens in by_source.items() if name not in largest], axis=0)
    return {**{name: by_source[name] for name in by_source if name in largest}, OTHERS: rest}


@chart((4.8, 3.8))
def marginals(figure: FigureBase, look: Look, plan: Json) -> Drawn:
    """Target and planned tokens by source, bucket and window as bars, with the relative error."""
    axes, rows = figure.add_subplot(), []
    for what in ("source", "bucket", "window"):
        of_kind = [(what, row[what], row) for row in plan[f"by_{what}"] if row["target_tokens"]]
        if what != "window" or [name for _, name, _ in of_kind] != [name for kind, name, _ in rows if kind == "bucket"]:
            rows += of_kind  # else the buckets are the windows
    places = -np.arange(len(rows)) - 0.6 * np.array([("source", "bucket", "window").index(kind) for kind, _, _ in rows])
    target, planned = ([row[f"{key}_tokens"] for _, _, row in rows] for key in ("target", "planned"))
    axes.barh(places + 0.2, target, 0.38, color=look.muted, label="target")
    axes.barh(places - 0.2, planned, 0.38, color=look.series[0], label="planned")
    for place, (_, _, row) in zip(places, rows, strict=True):
        beside = {"textcoords": "offset points", "va": "center", "color": look.ink, "fontsize": 8}
        axes.annotate(f"{row['error']:+.2%}", (row["planned_tokens"], place - 0.2), (4, 0), **beside)
    axes.set_yticks(places, [f"{name}" for _, name, _ in rows])
    axes.set(xlabel="tokens", xlim=(0, 1.25 * max([1, *target, *planned])))
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(tick_labels(amount))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    legend(figure, axes)
    worst = max((abs(row["error"]) for _, _, row in rows), default=0.0)
    columns = {"kind": [kind for kind, _, _ in rows], "name": [name for _, name, _ in rows]}
    return f"Target and planned tokens; largest error {worst:.2%}.", {**columns, "target": target, "planned": planned}


@chart((4.8, 4.2))
def documents_per_segment(figure: FigureBase, look: Look, plans: Mapping[str, Json]) -> Drawn:
    """Histograms of documents, or parts of documents, in a segment of each window."""
    parts = {}
    for number, (axes, window) in enumerate(zip(figure.subplots(2, 1), ("short", "long"), strict=True)):
        plan, each = plans[window], plans[window]["documents_per_segment"]
        if each["edges"]:
            edges = np.array(each["edges"]) - 0.5  # each whole number lies in the middle of its bar
            axes.stairs(each["segments"], edges, fill=True, color=look.series[number])
            axes.set_xlim(edges[0], edges[-1])
        axes.set(xlabel=f"documents or parts of documents in a {window} segment", ylabel="segments")
        title = f"{plan['segments']:,} {window} segments, {plan['padding_share']:.3%} padding"
        axes.set_title(title, fontsize=9, loc="left", color=look.ink)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        parts[window] = {"at_least": each["edges"][:-1], "below": each["edges"][1:], "segments": each["segments"]}
    words = ", ".join(f"{plans[window]['segments']:,} {window} segments" for window in parts)
    return f"Documents per segment: {words}.", stacked(parts, "window")
