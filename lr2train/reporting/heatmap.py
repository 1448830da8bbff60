"""Needle heat maps as SVG: document length across, needle depth down, accuracy as colour and number.

Choice: SVG by hand and not matplotlib, for the tooltip that each cell carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps

from lr2train.reporting.numbers import context_length
from lr2train.reporting.page import text

CELL_W, CELL_H, LEFT, TOP = 46, 26, 52, 4  # SVG units
_SCALE = colormaps["cividis"]


def heatmap(cells: Sequence[dict[str, Any]]) -> str:
    """The SVG of one row of ``evaluate.json``, from its cells."""
    lengths = sorted({cell["length_tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width, height = LEFT + CELL_W * len(lengths) + 2, TOP + CELL_H * len(depths) + 34
    squares = "".join(
        _cell(cell, LEFT + CELL_W * lengths.index(cell["length_tokens"]), TOP + CELL_H * depths.index(cell["depth"]))
        for cell in cells
    )
    labels = "".join(
        _label(LEFT + CELL_W * (i + 0.5), TOP + CELL_H * len(depths) + 14, "middle", context_length(length))
        for i, length in enumerate(lengths)
    )
    labels += "".join(
        _label(LEFT - 6, TOP + CELL_H * (i + 0.5) + 3.5, "end", f"{depth:.0%}") for i, depth in enumerate(depths)
    )
    labels += _label(LEFT + CELL_W * len(lengths) / 2, height - 4, "middle", "document length, tokens")
    middle = TOP + CELL_H * len(depths) / 2
    labels += f'<g transform="rotate(-90 12 {middle})">{_label(12, middle, "middle", "depth")}</g>'
    return (
        f'<svg role="img" aria-label="needle accuracy by length and depth" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width * 1.5:.0f}px">{squares}{labels}</svg>'
    )


def color_of(share: float) -> tuple[str, str]:
    """Background and text colour for an accuracy 0 … 1."""
    red, green, blue, _ = _SCALE(min(max(share, 0.0), 1.0))
    return f"rgb({red * 255:.0f},{green * 255:.0f},{blue * 255:.0f})", text_color(red, green, blue)


def text_color(red: float, green: float, blue: float) -> str:
    """Black or white, whichever is readable on a background; parts 0 … 1."""
    return "#111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#fff"


def gradient() -> str:
    """The colour scale as CSS."""
    return f"linear-gradient(90deg,{','.join(color_of(i / 8)[0] for i in range(9))})"


def _cell(cell: dict[str, Any], x: float, y: float) -> str:
    fill, ink = color_of(cell["accuracy"])
    tip = (
        f"{cell['length_tokens']:,} tokens, depth {cell['depth']:.0%}: {cell['accuracy']:.0%} of {cell['documents']} "
        "documents, "
        f"answer perplexity {cell['perplexity']:.3g}"
    )
    return (
        f'<g><title>{text(tip)}</title><rect x="{x + 0.75}" y="{y + 0.75}" width="{CELL_W - 1.5}" '
        f'height="{CELL_H - 1.5}" rx="3" '
        f'fill="{fill}"/>'
        f'<text x="{x + CELL_W / 2}" y="{y + CELL_H / 2 + 3.5}" text-anchor="middle" font-size="10.5" '
        f'fill="{ink}">{100 * cell["accuracy"]:.0f}</text></g>'
    )


def _label(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="10" fill="var(--muted)">{text(words)}</text>'
