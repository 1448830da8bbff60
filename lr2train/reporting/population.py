"""What a search's generations say about its candidates: each of them once, the winner, the parents at the end.

A line of generations.jsonl holds parallel lists over the population, best first. Where the search drops hopeless candidates early, a list
``documents`` says on how many documents each was scored; the most that occur are all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HOPELESS = 1e6  # perplexities beyond are all the same
Json = dict[str, Any]
Point = tuple[float, float, int, bool]  # attention factor, perplexity, critical index, complete


@dataclass(frozen=True)
class Candidates:
    """Candidates in the order of their generations.

    Attributes:
        generation, attention_factor, perplexity, critical_index, complete: arrays [candidates]; perplexity is at most ``HOPELESS``,
            complete says that every document was scored.
    """

    generation: np.ndarray
    attention_factor: np.ndarray
    perplexity: np.ndarray
    critical_index: np.ndarray
    complete: np.ndarray

    def __len__(self) -> int:
        return len(self.perplexity)


def bounded(perplexity: float | None) -> float:
    """At most ``HOPELESS``; nan and infinity are as bad."""
    return perplexity if perplexity is not None and perplexity < HOPELESS else HOPELESS  # None: it was not finite


def candidates(generations: Sequence[Json]) -> Candidates:
    """Every candidate once: parents stay in the population."""
    rows, before = [], []
    for line, points in zip(generations, _points(generations), strict=True):
        rows += [(line["generation"], *point) for point in (Counter(points) - _parents(before, points)).elements()]
        before = points
    generation, factor, perplexity, index, complete = (np.array(column) for column in zip(*rows, strict=True))
    return Candidates(generation, factor, perplexity, index, complete.astype(bool))


def winner(generations: Sequence[Json], search: Json | None = None) -> tuple[float, float, int]:
    """Attention factor, perplexity and critical index of the best candidate so far.

    Args:
        generations: of which the last is looked at.
        search: the finished search, whose winner may have been chosen among the best on further documents; its perplexity on those is not
            comparable, so that of the last generation is returned.
    """
    last = sorted(_points(generations)[-1], key=lambda point: (not point[3], point[1]))
    if search is not None:
        chosen = (search["attention_factor"], search["critical_index"])
        last = [point for point in last if (point[0], point[2]) == chosen] or last
    factor, perplexity, index, _ = last[0]
    return factor, perplexity, index


def last_parents(generations: Sequence[Json], top_k: int) -> list[int]:
    """Critical indices of the best ``top_k`` complete candidates at the end."""
    complete = [point for point in _points(generations)[-1] if point[3]]
    return [index for _, _, index, _ in sorted(complete, key=lambda point: point[1])[:top_k]]


def _parents(before: Sequence[Point], now: Sequence[Point]) -> Counter[Point]:
    """The best complete candidates of the generation before, as many as this one still has.

    Files know no names of candidates. Two that broke the model and share critical index and attention factor look the same, so it is the
    longest row of the best that is looked for, and not everyone who seems to be there again.
    """
    left, parents = Counter(now), Counter()
    for point in sorted((point for point in before if point[3]), key=lambda point: point[1]):
        if left[point] == 0:
            break
        left[point] -= 1
        parents[point] += 1
    return parents


def _points(generations: Sequence[Json]) -> list[list[Point]]:
    """Of every generation, in the order of its lists."""
    most = max((documents for line in generations for documents in line.get("documents") or ()), default=0)
    return [
        list(
            zip(
                line["attention_factors"],
                map(bounded, line["perplexities"]),
                line["critical_indices"],
                (documents >= most for documents in line.get("documents") or [most] * len(line["perplexities"])),
                strict=True,
            )
        )
        for line in generations
    ]
