"""Cells of the rcd map, and two hypotheses of the paper tested over them with a paired bootstrap.

The hypotheses: rcd < tcd beats tcd; a tail scale above 1 beats scale 1. The best of many cells looks better than it is,
so each hypothesis is tested in two ways. The first way takes all pairs of cells that differ in nothing else. The second
way takes best against best: the best cells are chosen on the answers of a resample and compared on the answers that
the resample left out.

Choice: answers are resampled, not documents: on a large model a map has few long documents with many questions. Cost:
answers of one document share its text, so an interval is somewhat too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lr2train import run
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

FIXED_METHODS = ("none", "yarn", "ntk", "pi")  # measured beside the map, at the same attention factor
RESAMPLES = 10_000
SURE = 0.975  # share of resamples at which a hypothesis holds; at 1 - SURE and less the opposite holds
Json = dict[str, Any]


@dataclass(frozen=True)
class MapCell:
    """One set of factors; a method of ``FIXED_METHODS`` has neither critical index nor scale."""

    method: str
    attention_factor: float
    critical_index: int | None = None
    scale: float | None = None  # of the tail, in multiples of s = L / L0

    def factors(self, spectrum: Spectrum, target_tokens: int) -> Factors:
        """The factors of this cell for one model and target window."""
        if self.scale is None:
            return replace(METHODS[self.method](spectrum, target_tokens), attention_factor=self.attention_factor)
        assert self.critical_index is not None
        return METHODS[self.method](
            spectrum,
            target_tokens,
            critical_index=self.critical_index,
            tail=self.scale * target_tokens / spectrum.window_tokens,
            attention_factor=self.attention_factor,
        )


@dataclass(frozen=True)
class ResampledLosses:
    """Mean loss of an answer token, for each cell and each resample of the answers.

    Attributes:
        resampled: float64 [resamples, cells], on the answers of the resample.
        left_out: float64 [resamples, cells], on the answers left out; nan where the resample left out none.
        column: cell -> its column.
    """

    resampled: np.ndarray
    left_out: np.ndarray
    column: dict[MapCell, int]


def resample(
    lines: dict[MapCell, Json], answer_tokens: Sequence[int], seed: int, n_resamples: int = RESAMPLES
) -> ResampledLosses:
    """Draw all answers with replacement. Every cell sees the same draws, so differences are paired."""
    tokens = np.array(answer_tokens, dtype=float)
    nll = np.array([line["nll"] for line in lines.values()]).T  # [answers, cells]
    rng = run.stream(seed, "map_rcd", "bootstrap")
    counts = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=n_resamples).astype(float)
    unused = (counts == 0).astype(float)
    with np.errstate(invalid="ignore"):
        return ResampledLosses(
            counts @ nll / (counts @ tokens)[:, None],
            unused @ nll / (unused @ tokens)[:, None],
            {cell: column for column, cell in enumerate(lines)},
        )


def compare(
    losses: ResampledLosses, better: Sequence[MapCell], worse: Sequence[MapCell], lines: dict[MapCell, Json]
) -> Json | None:
    """Compare two groups of cells; None where a group is empty.

    Returns:
        pairs, pairs_won: pairs of cells that differ in the tested property alone, and those with the smaller loss.
        difference, low, high: mean loss of ``worse`` minus ``better`` over all pairs (nats per answer token), with its
            95 % interval.
        sure: share of resamples with a positive difference.
        best_sure: share of resamples in which the best of ``better`` beats the best of ``worse`` on the answers left
            out; a tie counts half.
    """
    if not better or not worse:
        return None
    pairs = [(a, b) for a in better for b in worse if _match(a, b)]
    a, b = ([losses.column[pair[side]] for pair in pairs] for side in (0, 1))
    differences = (losses.resampled[:, b] - losses.resampled[:, a]).mean(axis=1)
    low, high = np.percentile(differences, (2.5, 97.5))
    won = [_loss(lines[two]) > _loss(lines[one]) for one, two in pairs]
    best = [min(group, key=lambda cell: _loss(lines[cell])) for group in (better, worse)]
    return {
        "pairs": len(pairs),
        "pairs_won": sum(won),
        "difference": float(np.mean([_loss(lines[two]) - _loss(lines[one]) for one, two in pairs])),
        "low": float(low),
        "high": float(high),
        "sure": float(np.mean(differences > 0)),
        "best_better": asdict(best[0]) | {"perplexity": lines[best[0]]["perplexity"]},
        "best_worse": asdict(best[1]) | {"perplexity": lines[best[1]]["perplexity"]},
        "best_sure": _best_against_best(losses, better, worse),
    }


def by_value(losses: ResampledLosses, lines: dict[MapCell, Json], key: str, reference: float) -> dict[str, Json]:
    """Every critical index against tcd, or every scale against 1: {value: {difference, low, high, sure}}."""
    values = sorted({getattr(cell, key) for cell in lines} - {reference})
    found = {}
    for value in values:
        groups = [[cell for cell in lines if getattr(cell, key) == one] for one in (value, reference)]
        if one := compare(losses, groups[0], groups[1], lines):
            found[f"{value:g}"] = {name: one[name] for name in ("difference", "low", "high", "sure")}
    return found


def _match(a: MapCell, b: MapCell) -> bool:
    """Whether two cells differ either in the critical index or in the scale, and in nothing else."""
    return a.attention_factor == b.attention_factor and (a.scale == b.scale) != (a.critical_index == b.critical_index)


def _loss(line: Json) -> float:
    return math.log(line["perplexity"])


def _best_against_best(losses: ResampledLosses, better: Sequence[MapCell], worse: Sequence[MapCell]) -> float | None:
    rows = np.flatnonzero(np.isfinite(losses.left_out).all(axis=1))
    if not len(rows):
        return None
    chosen = []
    for group in (better, worse):
        columns = np.array([losses.column[cell] for cell in group])
        best = columns[losses.resampled[np.ix_(rows, columns)].argmin(axis=1)]
        chosen.append(losses.left_out[rows, best])
    return float(np.mean((chosen[0] < chosen[1]) + 0.5 * (chosen[0] == chosen[1])))


def verdicts(
    lines: dict[MapCell, Json], answer_tokens: Sequence[int], critical_index: int, seed: int
) -> dict[str, Json]:
    """Both hypotheses and every single critical index and scale, for each attention factor and for all together."""
    grid = {cell: line for cell, line in lines.items() if cell.scale is not None}
    if not grid:
        return {}
    losses = resample(grid, answer_tokens, seed)
    factors = sorted({cell.attention_factor for cell in grid})
    groups = {f"{factor:g}": [cell for cell in grid if cell.attention_factor == factor] for factor in factors}
    if len(factors) > 1:
        groups["all"] = list(grid)
    found = {}
    for name, cells in groups.items():
        here = {cell: grid[cell] for cell in cells}
        below, at = ([cell for cell in cells if _sign(cell.critical_index, critical_index) == sign] for sign in (-1, 0))
        above_1, at_1 = ([cell for cell in cells if _sign(cell.scale, 1) == sign] for sign in (1, 0))
        found[name] = {
            "rcd < tcd beats tcd": compare(losses, below, at, here),
            "scale > 1 beats scale 1": compare(losses, above_1, at_1, here),
            "rcd against tcd": by_value(losses, here, "critical_index", critical_index),
            "scale against 1": by_value(losses, here, "scale", 1.0),
        }
    return found


def _sign(value: float | None, reference: float) -> int:
    assert value is not None
    return (value > reference) - (value < reference)


def in_words(verdict: Json) -> str:
    """The verdicts of one attention factor as lines of text."""
    lines = [_hypothesis(name, verdict[name]) for name in ("rcd < tcd beats tcd", "scale > 1 beats scale 1")]
    for name in ("rcd against tcd", "scale against 1"):
        each = (
            f"{value} {one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
            for value, one in verdict[name].items()
        )
        lines.append(f"{name}, mean loss lower by (nats, 95 %): " + ", ".join(each))
    return "\n".join(f"  {line}" for line in lines)


def _hypothesis(name: str, found: Json | None) -> str:
    if found is None:
        return f"{name}: no cells to compare"
    interval = f"95 % in [{found['low']:+.4f}, {found['high']:+.4f}]"
    words = f"{name}: {_decided(found['sure'])} over all pairs ({found['pairs_won']} of {found['pairs']} won, "
    words += f"mean loss lower by {found['difference']:+.4f} nats, {interval}, {found['sure']:.1%} of resamples)"
    one, two = found["best_better"], found["best_worse"]
    words += f"; best {one['perplexity']:.4f} ({_place(one)}) against {two['perplexity']:.4f} ({_place(two)})"
    if found["best_sure"] is not None:
        words += f", {_decided(found['best_sure'])} on unseen answers ({found['best_sure']:.1%} of resamples)"
    return words


def _decided(share: float) -> str:
    return "holds" if share >= SURE else "the opposite holds" if share <= 1 - SURE else "undecided"


def _place(cell: Json) -> str:
    return f"rcd {cell['critical_index']}, {cell['scale']:g} s, attention factor {cell['attention_factor']:g}"


def table(lines: dict[MapCell, Json], factor: float, spectrum: Spectrum) -> str:
    """One attention factor as text: rcd down, scale across, then the fixed methods; perplexity and answers found."""
    cells = {cell: line for cell, line in lines.items() if cell.attention_factor == factor}
    indices = sorted({cell.critical_index for cell in cells if cell.critical_index is not None})
    scales = sorted({cell.scale for cell in cells if cell.scale is not None})
    names = {spectrum.critical_index: "tcd", spectrum.lowest_critical_index: "d10"}
    rows = [f"attention factor {factor:g}", "  rcd     " + "".join(f"{f'{scale:g} s':>16}" for scale in scales)]
    for index in indices:
        row = [cells.get(MapCell("longrope2", factor, index, scale)) for scale in scales]
        rows.append(f"  {index:>3} {names.get(index, ''):<4}" + "".join(f"{_shown(one):>16}" for one in row))
    beside = [f"{method} {_shown(cells.get(MapCell(method, factor)))}" for method in FIXED_METHODS]
    return "\n".join([*rows, "  " + ", ".join(beside)])


def _shown(line: Json | None) -> str:
    if line is None:
        return "-"
    value = line["perplexity"]
    number = f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 1000 else f"{value:.1e}"
    return f"{number} ({sum(line['found']) / len(line['found']):.0%})"
