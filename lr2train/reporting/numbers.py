"""Numbers as words: counts, windows, perplexities, durations."""

from __future__ import annotations

import math


def count(number: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def amount(value: float, digits: int = 6) -> str:
    """1.5M for 1500000, with at most ``digits`` significant digits."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{letter}"
    return f"{value:g}"


def context_length(tokens: int) -> str:
    """A context length: 512, 4k, 128k."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 256 == 0 else str(tokens)


def perplexity(value: float | None) -> str:
    """A perplexity or a loss, with four decimals near 1, where good searches end.

    None and infinite values read "not finite".
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    if 1 <= value < 1.1:
        return f"{value:.4f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """59 s, 12.5 min, 1.5 h."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def percent(share: float | None) -> str:
    """95% for 0.95; a dash where nothing was measured."""
    return "–" if share is None else f"{share:.0%}"
