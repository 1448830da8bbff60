"""Needle heat maps as a PNG file, a panel for each model: length across, depth down, accuracy as colour (paper,
Figure 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase

from lr2train.reporting.canvas import Chart, Look, side_by_side
from lr2train.reporting.heatmap import text_color
from lr2train.reporting.numbers import context_length

PANEL = (3.4, 2.6)  # inches
MOST_NUMBERS = 200  # cells of a panel; beyond, colours alone are readable


def write_needle_map(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of ``evaluate.json`` side by side; a failure leaves the former picture."""
    panels = [Chart(lambda figure, look, row=row: _draw(figure, look, row), PANEL) for row in rows]
    return side_by_side(panels, path, "Needle in a haystack: documents answered exactly, percent")


def _draw(figure: FigureBase, look: Look, row: dict[str, Any]) -> str:
    lengths = sorted({cell["length_tokens"] for cell in row["cells"]})
    depths = sorted({cell["depth"] for cell in row["cells"]})
    shares = np.full((len(depths), len(lengths)), np.nan)
    for cell in row["cells"]:
        shares[depths.index(cell["depth"]), lengths.index(cell["length_tokens"])] = cell["accuracy"]
    axes: Any = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), [context_length(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("document length, tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{row['label']} (mean {np.nanmean(shares):.0%})", fontsize=8.5, color=look.ink)
    if shares.size <= MOST_NUMBERS:
        for (down, across), share in np.ndenumerate(shares):
            if not np.isnan(share):
                red, green, blue, _ = image.cmap(image.norm(share))
                axes.text(
                    across, down, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                    color=text_color(red, green, blue),
                )  # fmt: skip
    return f"needle accuracy of {row['label']} by length and depth"
