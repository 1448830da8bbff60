"""The scale of a perplexity axis or colour bar.

Choice: where the best perplexity is near 1, the scale is the logarithm of the loss, ln ln p. There 1.004 and 1.03
differ as much as 1.4 and 12, and a good search ends among such numbers. Elsewhere the scale is ln p. Cost: the unusual
axis needs a label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

NEAR_ONE = 1.2  # a best perplexity below it: the scale is that of the loss
CEILING = 1e4  # times the best; worse perplexities are drawn at the end of the scale
_LEAST = 1e-7  # least perplexity minus 1: a loss of 0 has no logarithm
_STEPS = 8  # ticks at most


@dataclass(frozen=True)
class PerplexityScale:
    """A scale from the best perplexity to the worst, which is at most ``CEILING`` times the best.

    Attributes:
        low, high: ends of the scale, room included.
        best, worst: ends of the perplexities; a worse one is drawn at ``worst``.
        of_loss: True for ln ln p, False for ln p.
        beyond: whether perplexities worse than ``worst`` exist.
    """

    low: float
    high: float
    best: float
    worst: float
    of_loss: bool
    beyond: bool

    @classmethod
    def over(cls, perplexities: np.ndarray, room: float = 0.0) -> PerplexityScale:
        """Fit a scale to finite perplexities of at least 1; ``room`` widens both ends by this share of the range."""
        best, highest = max(float(np.min(perplexities)), 1.0 + _LEAST), float(np.max(perplexities))
        worst = max(best, min(highest, best * CEILING))
        bare = cls(best, worst, best, worst, best < NEAR_ONE, highest > worst)
        low, high = bare.forward(np.array([best, worst]))
        around = room * (high - low) if high > low else 0.1
        low, high = bare.inverse(np.array([low - around, high + around]))
        return replace(bare, low=max(float(low), 1.0 + _LEAST), high=float(high))

    def label(self, of: str) -> str:
        """The axis label; ``of`` is needle or text."""
        return f"{of} perplexity ({'log of loss' if self.of_loss else 'log scale'})"

    def forward(self, perplexity: np.ndarray) -> np.ndarray:
        """Perplexity -> place on the scale."""
        logarithm = np.log(np.maximum(perplexity, 1.0 + _LEAST))
        return np.log(logarithm) if self.of_loss else logarithm

    def inverse(self, place: np.ndarray) -> np.ndarray:
        """Place on the scale -> perplexity."""
        return np.exp(np.exp(np.minimum(place, 6.0))) if self.of_loss else np.exp(place)

    def clip(self, perplexity: np.ndarray | list[float]) -> np.ndarray:
        """Perplexities worse than ``worst`` become ``worst``."""
        return np.clip(perplexity, self.best, self.worst)

    def ticks(self) -> list[float]:
        """Round numbers on the scale: decades of the loss (or of the perplexity) first, then numbers between them."""
        decades = [1 + 10.0**power for power in range(-6, 0)] if self.of_loss else [1.0]
        decades += (
            [2.0, *(10.0**power for power in range(1, 7))] if self.of_loss else [10.0**power for power in range(1, 7)]
        )
        between = (
            [1 + digit * 10.0**power for power in range(-6, 0) for digit in (2, 5, 3, 4, 7)] if self.of_loss else []
        )
        between += [digit * 10.0**power for power in range(6) for digit in (2, 5, 3, 1.5, 4, 7, 1.2, 1.1)]
        first, last = self.forward(np.array([self.low, self.high]))
        kept = [self.worst] if self.beyond else []
        for tick in decades + between:
            places = self.forward(np.array([tick, *kept]))
            if self.low <= tick <= self.high and (np.abs(places[1:] - places[0]) >= (last - first) / _STEPS).all():
                kept.append(tick)
        if len(kept) < 2:  # a range between two round numbers
            kept = self.inverse(np.linspace(first, last, 5)[1:-1]).tolist()
        return sorted(kept)

    def on_y(self, axes: Axes, of: str) -> None:
        """Set the y axis of ``axes`` to this scale."""
        axes.set_yscale("function", functions=(self.forward, self.inverse))
        axes.set_ylim(self.low, self.high)
        axes.yaxis.set_major_locator(FixedLocator(self.ticks()))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(self.name))
        axes.set_ylabel(self.label(of))

    def name(self, tick: float, _: object = None) -> str:
        """The label of a tick."""
        digits = 2 + math.ceil(math.log10(self.high / (self.high - self.low)))  # enough to tell ticks apart
        return "beyond" if self.beyond and tick == self.worst else f"{tick:.{max(7, digits)}g}"
