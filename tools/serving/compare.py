"""Answers of a runtime beside lr2train's: one line a row, and whether what is promised is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tools.serving.cases import Row, Setup
from tools.serving.reference import Answer, Reference

FAILED = ("WRONG", "REFUSED")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        mean, largest: absolute difference of the log-probabilities of the last prompt tokens; None: not told.
        of_new: largest absolute difference of the log-probabilities of the new tokens that are equal.
        equal: new tokens before the first other one.
        new: new tokens that were asked for.
        verdict: "exact" | "WRONG" | "REFUSED" where something is promised; else "not promised", with what came out.
        reason: of a refusal, or of a tie.
    """

    runtime: str
    folder: str
    how: str
    row: str
    mean: float | None = None
    largest: float | None = None
    of_new: float | None = None
    equal: int | None = None
    new: int | None = None
    verdict: str = ""
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Something promised is not kept."""
        return self.verdict in FAILED

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def line_of(
    runtime: str,
    setup: Setup,
    row: Row,
    given: Mapping[str, Any],
    request: Mapping[str, Any],
    wanted: Answer,
    reference: Reference,
    tolerance: float,
) -> Line:
    """Compare one row of a runtime's answer.

    Args:
        given: contents of answer.json.
        request: the row's own part of request.json.
        wanted: lr2train's answer for the row's case.
        reference: decides whether another token is a tie.
        tolerance: largest allowed difference of log-probabilities.
    """
    promised = row.case in setup.exact
    names = (runtime, setup.folder.name, setup.how, row.name)
    if row.name not in given["rows"]:
        reason = given["refused"].get(row.name, "no answer")
        return Line(*names, verdict="REFUSED" if promised else "refused, not promised", reason=reason)
    found = given["rows"][row.name]
    n_new = request["new_tokens"]
    of_prompt = _differences(found["logprobs"], wanted.logprobs)
    equal = _equal(found["tokens"], wanted.tokens[:n_new])
    of_new = _differences(found["token_logprobs"][:equal], wanted.token_logprobs[:equal])
    close = max([0.0, *of_prompt, *of_new]) <= tolerance
    complete = len(found["tokens"]) == n_new and (not found["logprobs"] or len(of_prompt) == len(wanted.logprobs))
    tied = _tied(found["tokens"], wanted.tokens[:n_new], equal, request["prompt"], reference, tolerance)
    same = close and complete and (equal == n_new or tied)
    return Line(
        *names,
        mean=sum(of_prompt) / len(of_prompt) if of_prompt else None,
        largest=max(of_prompt, default=None),
        of_new=max(of_new, default=None),
        equal=equal,
        new=n_new,
        verdict=("exact" if same else "WRONG") if promised else f"{'same' if same else 'other'}, not promised",
        reason="tie at the first other token" if tied else "",
    )


def _differences(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Absolute differences, aligned at the end; a difference that is no number counts as infinite."""
    n = min(len(found), len(wanted))
    differences = [abs(a - b) for a, b in zip(found[len(found) - n :], wanted[len(wanted) - n :], strict=True)]
    return [one if one == one else float("inf") for one in differences]


def _equal(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Tokens before the first other one."""
    pairs = zip(found, wanted, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))


def _tied(
    found: Sequence[int], wanted: Sequence[int], equal: int, prompt: list[int], reference: Reference, tolerance: float
) -> bool:
    """Whether the first other token is as likely as ours, to within the tolerance: rounding may choose either."""
    if equal >= min(len(found), len(wanted)):
        return False
    before = [*prompt, *wanted[:equal]]
    ours, theirs = (reference.token_logprob(before, tokens[equal]) for tokens in (wanted, found))
    return ours - theirs <= tolerance


def table(lines: Iterable[Line]) -> str:
    """The lines as a table in text."""
    head = ("runtime", "folder", "row", "mean", "max", "new: max", "equal", "verdict")
    rows = [head, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(line: Line) -> tuple[str, ...]:
    folder = f"{line.folder}/{f' ({line.how})' if line.how else ''}"
    figures = ["-" if one is None else f"{one:.1e}" for one in (line.mean, line.largest, line.of_new)]
    equal = "-" if line.equal is None else f"{line.equal} of {line.new}"
    verdict = f"{line.verdict}: {line.reason}" if line.reason else line.verdict
    return (line.runtime, folder, line.row, *figures, equal, verdict)
