"""The method in one drawing, from the files of a run: documents, tagged segments, two RoPE tables, one model.

Choice: lengths, segments and factors are those of a real corpus and search, so the drawing cannot promise what the code
does not do. Cost: a corpus with thousands of documents a segment shows a grey band instead of documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import FancyBboxPatch

from lr2train.config import UserError
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import Corpus
from lr2train.reporting.canvas import Chart, Drawn, Look, chart, stacked
from lr2train.reporting.inputs import ReportInputs
from lr2train.reporting.mix import Spans, segments
from lr2train.reporting.needle_map import needle_map
from lr2train.reporting.numbers import context_length
from lr2train.rope.factors import Factors

SHOWN = 3  # segments of a window
GAP = 0.006  # between documents, in segments
WIDTHS = (1.0, 0.3, 1.3, 0.3, 1.3, 0.3, 0.9)


def overview(run: ReportInputs) -> dict[str, Chart]:
    """Name -> drawing: ``pipeline``, and ``needles`` of the model before and after training.

    Raises:
        UserError: the run was not evaluated, or its corpus or factors are gone.
    """
    rows = {row["label"]: row for row in (run.evaluation or {}).get("rows", ())}
    before, after = (
        rows.get("none untrained"),
        next((row for label, row in reversed(rows.items()) if "untrained" not in label), None),
    )
    if before is None or after is None:
        remedy = f"run `lr2train evaluate run={run.folder.name}` first"
        raise UserError(f"{run.folder} has no needle map before and after training; {remedy}")
    if run.corpus_folder is None or run.factors is None:
        raise UserError(f"the corpus or the factors of {run.folder} are gone; give their run folders as well")
    shown = {window: segments(run.corpus_folder, window, SHOWN) for window in WINDOWS}
    windows = run.evaluation["original_window_tokens"], run.evaluation["target_window_tokens"]  # type: ignore[index]
    labels = f"before: window {context_length(windows[0])}", f"after: LongRoPE2 to {context_length(windows[1])}"
    maps = [{**row, "label": label} for row, label in zip((before, after), labels, strict=True)]
    lengths = Corpus.open(run.corpus_folder).documents().lengths
    return {
        "pipeline": pipeline(_few(lengths, windows[0]), shown, run.factors, windows[0]),
        "needles": needle_map(maps),
    }


def _few(lengths: np.ndarray, border: int) -> dict[str, list[int]]:
    """Lengths of typical documents of each window: deciles of the short ones, quartiles of the long ones."""
    of = {
        "short": (lengths[lengths <= border], (0.1, 0.3, 0.5, 0.7, 0.9)),
        "long": (lengths[lengths > border], (0.25, 0.5, 0.75)),
    }
    return {
        window: [int(tokens) for tokens in np.quantile(every, at)] for window, (every, at) in of.items() if len(every)
    }


@chart((9.2, 2.3))
def pipeline(
    figure: FigureBase,
    look: Look,
    lengths: Mapping[str, Sequence[int]],
    shown: Mapping[str, Sequence[Spans]],
    factors: Factors,
    original_window_tokens: int,
) -> Drawn:
    """From documents to one model with two RoPE tables; short in the first series colour, long in the second."""
    stages = figure.subplots(1, len(WIDTHS), width_ratios=WIDTHS)
    for axes in stages:
        axes.set_axis_off()
    _documents(stages[0], look, lengths, original_window_tokens)
    _segments(stages[2], look, shown)
    _tables(stages[4], look, factors)
    _model(stages[6], look)
    for axes, verb in zip(stages[1::2], ("prepare", "search", "train"), strict=True):
        arrow = {"arrowstyle": "-|>", "color": look.muted, "linewidth": 1.2}
        axes.annotate("", (1.2, 0.5), (-0.2, 0.5), arrowprops=arrow, annotation_clip=False)
        axes.text(0.5, 0.56, verb, ha="center", color=look.muted)
    words = "Documents become segments, each tagged short or long. The tag chooses one of two RoPE tables of one model."
    return words, stacked({window: {"tokens": every} for window, every in lengths.items()}, "window")


def _documents(axes: Axes, look: Look, lengths: Mapping[str, Sequence[int]], border: int) -> None:
    picked = [
        (window, tokens) for window in ("long", "short") for tokens in sorted(lengths.get(window, ()), reverse=True)
    ]
    for place, (window, tokens) in enumerate(picked):
        axes.barh(-place, tokens, 0.7, color=look.series[window == "long"])
    axes.set_title("documents", loc="left", fontsize=10, color=look.ink)
    _below(axes, 0, f"short: up to {context_length(border)} tokens", look.series[0])
    _below(axes, 1, "long: more", look.series[1])


def _segments(axes: Axes, look: Look, shown: Mapping[str, Sequence[Spans]]) -> None:
    end = max(stop for every in shown.values() for spans in every for _, stop in spans)
    rows = [(window, spans) for window, every in shown.items() for spans in every]
    for place, (window, spans) in enumerate(rows):
        for start, stop in spans:
            width = max((stop - start) / end - GAP, GAP)
            axes.barh(-place, width, 0.7, left=start / end, color=look.series[window == "long"])
    axes.set_title("tagged segments", loc="left", fontsize=10, color=look.ink)
    _below(axes, 0, f"{context_length(end)} tokens each", look.muted)


def _tables(axes: Axes, look: Look, factors: Factors) -> None:
    index = np.arange(len(factors.rescale))
    axes.set_axis_on()
    axes.plot(index, np.ones(len(index)), color=look.series[0])
    axes.plot(index, factors.rescale, color=look.series[1])
    axes.set(yscale="log", xticks=(0, len(index) - 1), yticks=(), xlabel="cosine index", ylabel="rescale factor")
    axes.minorticks_off()
    axes.text(0.96, 0.1, "short: original", transform=axes.transAxes, ha="right", color=look.series[0])
    axes.text(0.96, 0.72, "long: rescaled", transform=axes.transAxes, ha="right", color=look.series[1])
    axes.set_title("two RoPE tables", loc="left", fontsize=10, color=look.ink)


def _model(axes: Axes, look: Look) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    box = FancyBboxPatch(
        (0.06, 0.3), 0.88, 0.4, "round,pad=0.05", facecolor="none", edgecolor=look.muted, linewidth=1.2
    )
    axes.add_patch(box)
    axes.text(0.5, 0.5, "one set of weights", ha="center", va="center", color=look.ink)
    axes.set_title("one model", loc="left", fontsize=10, color=look.ink)
    _below(axes, 0, "export: long, short, two", look.muted)


def _below(axes: Axes, line: int, text: str, color: str) -> None:
    """Write a line of text below a stage."""
    axes.text(0.0, -0.06 - 0.12 * line, text, transform=axes.transAxes, va="top", color=color)


def write(charts: Mapping[str, Chart], folder: Path) -> list[Path]:
    """Write each drawing as ``NAME-light.svg`` and ``NAME-dark.svg`` into ``folder``."""
    return [path for name, drawing in charts.items() for path in drawing.write_themes(folder / name)]
