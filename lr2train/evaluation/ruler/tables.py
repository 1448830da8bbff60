"""RULER's tables from scores: pure functions of ``{(task, length): score}``, scores 0 … 100."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lr2train.evaluation.ruler.spec import NAMES

Scores = Mapping[tuple[str, int], float]
"""(task, length in tokens) -> mean score over the samples."""

LLAMA2_7B_AT_4K = 85.6
"""RULER's threshold: the average of Llama-2-7b-chat over the 13 tasks at 4096 tokens, in RULER's table of results."""


@dataclass(frozen=True)
class Table:
    """A table whose empty cells are None.

    Attributes:
        head: one title for each column.
        rows: the first cell of each names the row.
        note: what the reader must know, such as tasks that are missing; empty if nothing.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str = ""


def lengths_of(scores: Scores) -> list[int]:
    """All lengths, rising."""
    return sorted({length for _, length in scores})


def average(scores: Scores, length: int) -> float:
    """Mean over the tasks that have a score at a length. Raises ValueError where none has."""
    found = [scores[name, length] for name in NAMES if (name, length) in scores]
    if not found:
        raise ValueError(f"no RULER score at {length} tokens")
    return sum(found) / len(found)


def missing(scores: Scores, length: int) -> tuple[str, ...]:
    """Tasks without a score at a length, in RULER's order."""
    return tuple(name for name in NAMES if (name, length) not in scores)


def effective_length(scores: Scores, threshold: float = LLAMA2_7B_AT_4K) -> int | None:
    """The greatest length whose average over all 13 tasks is at least the threshold; None where there is none."""
    whole = [length for length in lengths_of(scores) if not missing(scores, length)]
    return max((length for length in whole if average(scores, length) >= threshold), default=None)


def by_length(rows: Mapping[str, Scores]) -> Table:
    """Averages: a row for each model or method, a column for each length, then the effective length.

    The form of LongRoPE2's Table 2.
    """
    lengths = sorted({length for scores in rows.values() for length in lengths_of(scores)})
    made = tuple(
        (
            label,
            *(average(scores, length) if length in lengths_of(scores) else None for length in lengths),
            effective_length(scores),
        )
        for label, scores in rows.items()
    )
    return Table(("", *map(str, lengths), "effective length"), made, _note(rows))


def by_task(scores: Scores) -> Table:
    """Scores: a row for each length, a column for each of the 13 tasks, then their average.

    The form of LongRoPE2's Tables 8 and 9.
    """
    made = tuple(
        (length, *(scores.get((name, length)) for name in NAMES), average(scores, length))
        for length in lengths_of(scores)
    )
    return Table(("length", *NAMES, "average"), made, _note({"": scores}))


def _note(rows: Mapping[str, Scores]) -> str:
    """Which averages are over fewer than 13 tasks; rows and lengths that miss the same tasks are named together."""
    where: dict[tuple[str, ...], list[str]] = {}
    for label, scores in rows.items():
        for length in lengths_of(scores):
            if absent := missing(scores, length):
                where.setdefault(absent, []).append(f"{label} at {length}".strip())
    return " ".join(
        f"Averages over {len(NAMES) - len(absent)} of {len(NAMES)} tasks, without {', '.join(absent)}: "
        f"{', '.join(places)}."
        for absent, places in where.items()
    )
