"""The paper's claims as pairs of rows, and the verdict that our figures give on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.reproduce import figures, paper
from tools.reproduce.figures import Estimate
from tools.reproduce.results import LONG, MIDDLE, SHORT, Cell, row_for
from tools.reproduce.rows import ONE_TABLE, ROWS, SHARED

REPRODUCED, OPPOSITE, UNDECIDED, MISSING = "reproduced", "the opposite", "undecided", "not run"
BESIDE_THE_PAPER = {
    REPRODUCED: "better",
    OPPOSITE: "worse",
    UNDECIDED: "undecided",
    MISSING: MISSING,
}
FULL, EMPTY = 95.0, 5.0  # scores between which a difference can show


@dataclass(frozen=True)
class Claim:
    """Row ``a`` is better than row ``b``.

    Attributes:
        table: of the paper; "" for a question that the paper does not answer.
        window: LONG (score at the target window), MIDDLE (mean over the lengths between the windows) or SHORT (score in
            the original window).
        shared: under the shared attention factor.
    """

    table: str
    a: str
    b: str
    window: str = LONG
    shared: bool = False

    @property
    def rows(self) -> tuple[str, str]:
        """Keys of the two rows."""
        return row_for(self.a, self.shared), row_for(self.b, self.shared)

    @property
    def words(self) -> str:
        """The claim, as tables name it."""
        one, two = (ROWS[key].label for key in (self.a, self.b))
        return f"{one} > {two}" + {SHORT: ", short window", MIDDLE: ", between the windows", LONG: ""}[self.window]

    def printed(self, model: int) -> float | None:
        """The paper's difference, in points of RULER (at 128k, or between the windows) or of the share kept.

        None: not in the paper.
        """
        if not self.table:
            return None
        found = [self._of_paper(key, model) for key in (self.a, self.b)]
        return None if None in found else found[0] - found[1]  # type: ignore[operator]

    def _of_paper(self, key: str, model: int) -> float | None:
        # The paper's baselines have no mixed windows; ours have both forms.
        key = key.removesuffix(ONE_TABLE) if key not in paper.RULER else key
        if self.window != SHORT:
            return paper.longest(key, model) if self.window == LONG else paper.between(key, model)
        return paper.kept(key, model, three=self.table != "4")


def _claims() -> list[Claim]:
    found = []
    for shared in (False, True):
        found += [Claim("2", "longrope2", other, shared=shared) for other in ("ntk", "yarn", "longrope")]
        found += [Claim("2", "longrope2", other, MIDDLE, shared) for other in ("ntk", "yarn", "longrope")]
        found += [Claim("", "longrope2", "pi", shared=shared)]
        found += [Claim("5", f"{name}_rcd", name, shared=shared) for name in ("ntk", "yarn")]
        found += [Claim("5", "longrope2", f"{name}_rcd", shared=shared) for name in ("ntk", "yarn")]
        found += [Claim("6", "longrope2", "text", shared=shared), Claim("10", "longrope2", "all_dims", shared=shared)]
    baselines = [f"{name}{ONE_TABLE}" for name in ("ntk", "yarn", "longrope")]
    found += [Claim("2", "longrope2", other) for other in baselines]
    found += [Claim("4", "longrope2", other, SHORT) for other in baselines]
    found += [Claim("7", "longrope2", f"longrope2{ONE_TABLE}", window) for window in (LONG, SHORT)]
    found += [Claim("", "yarn_head", other, window) for other in ("longrope2", "yarn") for window in (LONG, MIDDLE)]
    found += [Claim("", "longrope2", other, window) for other in ("document", "one_factor") for window in (LONG, SHORT)]
    return [*found, *(Claim("", "distill", "longrope2", window) for window in (SHORT, LONG))]


CLAIMS = _claims()
PARTS = (  # what is added, row with it, row without it
    ("attention factor of the search, in YaRN", f"yarn{SHARED}", "yarn"),
    ("attention factor of the search, in NTK", f"ntk{SHARED}", "ntk"),
    ("found critical index, in YaRN", f"yarn_rcd{SHARED}", f"yarn{SHARED}"),
    ("found critical index, in NTK", f"ntk_rcd{SHARED}", f"ntk{SHARED}"),
    ("searched tail above s, on NTK-rcd", "longrope2", f"ntk_rcd{SHARED}"),
    ("needles as the search's objective, at one attention factor", "longrope2", f"text{SHARED}"),
    ("NTK's rule below the critical index, at one attention factor", "longrope2", f"all_dims{SHARED}"),
    ("YaRN in the place of NTK's rule below the critical index", "yarn_head", "longrope2"),
    ("mixed windows", "longrope2", f"longrope2{ONE_TABLE}"),
)


@dataclass(frozen=True)
class Verdict:
    """A claim against our figures.

    Attributes:
        each: difference in each cell that has both rows, by its name.
        pooled: their mean.
        word: REPRODUCED, OPPOSITE, UNDECIDED or MISSING; of a question without a table of the paper, whether a > b.
        saturated: both rows lie above FULL or below EMPTY in every cell, so the bed cannot tell them apart.
        alike: both rows score the same on every document, as where a search has found the theoretical index.
    """

    claim: Claim
    each: dict[str, Estimate]
    pooled: Estimate
    word: str
    saturated: bool
    alike: bool


def judge(claim: Claim, cells: Sequence[Cell]) -> Verdict:
    """The verdict over all cells in which both rows have run."""
    a, b = claim.rows
    each, full = {}, []
    for cell in cells:
        one = cell.difference(a, b, cell.window(claim.window))
        if math.isfinite(one.mean):
            each[cell.name] = one
            scores = [cell.score(key, cell.window(claim.window)).mean for key in (a, b)]
            full.append(min(scores) > FULL or max(scores) < EMPTY)
    pooled = figures.pooled(list(each.values()))
    word = {">": REPRODUCED, "<": OPPOSITE, "~": UNDECIDED}[pooled.sign] if each else MISSING
    alike = bool(each) and all(one.mean == one.se == 0.0 for one in each.values())
    return Verdict(claim, each, pooled, word, bool(full) and all(full), alike)


def sentence(verdict: Verdict) -> str:
    """One sentence: the claim, our difference, the paper's, the verdict."""
    claim, pooled = verdict.claim, verdict.pooled
    where = {SHORT: "in the original window", MIDDLE: "between the windows", LONG: "at the target window"}[claim.window]
    shared = ", all under one attention factor" if claim.shared else ""
    one, two = (ROWS[key].label for key in (claim.a, claim.b))
    if verdict.word == MISSING:
        return f"{one} against {two} {where}{shared}: not run."
    printed = [(paper.MODELS[model], claim.printed(model)) for model in (0, 1)]
    said = ", ".join(f"{value:+.1f} on {name}" for name, value in printed if value is not None)
    words = f"{one} against {two} {where}{shared}: {pooled.mean:+.1f} ± {pooled.se:.1f} points"
    words += f" (paper: {said})" if said else " (not in the paper)"
    return (
        f"{words}: {BESIDE_THE_PAPER[verdict.word]}"
        + (", as both rows answer alike" if verdict.alike else "")
        + (", but both rows are at an end of the scale" if verdict.saturated and not verdict.alike else "")
        + "."
    )
