"""Drawing of a rehearsal: the memory of a rank over a step, by kind, and the line of code that holds its peak.

Choice: the axis counts allocations and releases, because a rehearsal has no clock. So a phase is as wide as its work is
fragmented, not as it is long.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import FigureBase

from lr2train.io import read_json
from lr2train.reporting.axes import legend
from lr2train.reporting.canvas import Chart, Drawn, Look, chart

Json = dict[str, Any]
FILE, NAME = "rehearsal.json", "memory"


def rehearsal_chart(folder: Path) -> dict[str, Chart]:
    """The drawing by its name, where a run folder holds a rehearsal."""
    path = folder / FILE
    return {NAME: timeline(read_json(path)["memory"])} if path.is_file() else {}


@chart((4.8, 3.9))
def timeline(figure: FigureBase, look: Look, memory: Json) -> Drawn:
    """Memory by kind, stacked, with phases, the peak and its line; the runtime of CUDA is not in it.

    Args:
        figure: to draw into.
        look: its colours.
        memory: the section of ``rehearsal.json``.
    """
    moments, axes = memory["timeline"], figure.add_subplot()
    kinds = [kind for kind in memory["kinds"] if any(one[kind] for one in moments)]
    places = range(len(moments))
    totals = [sum(one[kind] for kind in kinds) for one in moments]
    axes.stackplot(
        places, [[one[kind] for one in moments] for kind in kinds], labels=kinds, colors=look.series, linewidth=0
    )
    top = max(totals)
    axes.set(xlim=(0, max(1, len(moments) - 1)), ylim=(0, 1.42 * top), xlabel="allocations and releases, in order")
    axes.set(ylabel="GiB", xticks=())
    axes.grid(False, axis="x")
    for phase, group in groupby(places, lambda number: _phase(moments[number])):
        first, *_ = within = list(group)
        axes.axvline(first, color=look.line, linewidth=0.6)
        axes.annotate(
            phase, (within[len(within) // 2], 1.40 * top), rotation=90, ha="center", va="top", fontsize=7,
            color=look.muted,
        )  # fmt: skip
    at = memory["at"]
    where = f"{memory['peak_gib']:.2f} GiB in {_phase(at)}: {at['line'].rpartition('/')[2]}"
    axes.plot([totals.index(top)], [top], marker="v", color=look.ink, markersize=5)
    axes.set_title(f"peak {where}", fontsize=9, loc="left", color=look.ink)
    legend(figure, axes)
    columns = {key: [one[key] for one in moments] for key in ("at", "phase", "micro_batch")}
    columns |= {f"{kind}_gib".replace(" ", "_"): [one[kind] for one in moments] for kind in memory["kinds"]}
    return f"Memory of a rank over a step; its peak is {where}.", columns


def _phase(moment: Json) -> str:
    return f"{moment['phase']} {moment['micro_batch']}".strip()
