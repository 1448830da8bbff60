"""Candidates of a search, read from generations.jsonl: each candidate once, and the winner.

A line of generations.jsonl holds parallel lists over the population, best first. Under racing, a further list
``documents`` says on how many documents each candidate was scored. The largest number that occurs is all documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

HOPELESS = 1e6  # worse perplexities are not told apart
Json = dict[str, Any]
Point = tuple[float, float, int, bool]  # attention factor, perplexity, critical index, complete


@dataclass(frozen=True)
class Candidates:
    """Candidates in the order of their generations.

    Attributes:
        generation, attention_factor, critical_index: arrays [candidates].
        perplexity: array [candidates], at most ``HOPELESS``.
        complete: bool array [candidates]; True where every document was scored.
    """

    generation: np.ndarray
    attention_factor: np.ndarray
    perplexity: np.ndarray
    critical_index: np.ndarray
    complete: np.ndarray

    def __len__(self) -> int:
        return len(self.perplexity)

    def columns(self) -> dict[str, np.ndarray]:
        """The candidates as columns of a CSV file."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def bounded(perplexity: float | None) -> float:
    """At most ``HOPELESS``; nan, infinity and None (not finite when written) become ``HOPELESS``."""
    return perplexity if perplexity is not None and perplexity < HOPELESS else HOPELESS


def candidates(generations: Sequence[Json]) -> Candidates:
    """Every candidate once, although parents stay in the population."""
    rows, before = [], []
    for line, points in zip(generations, _points(generations), strict=True):
        # a multiset difference: two equal children are two candidates
        rows += [(line["generation"], *point) for point in (Counter(points) - _parents(before, points)).elements()]
        before = points
    generation, factor, perplexity, index, complete = (np.array(column) for column in zip(*rows, strict=True))
    return Candidates(generation, factor, perplexity, index, complete.astype(bool))


def winner(generations: Sequence[Json], search: Json | None = None) -> tuple[float, float, int]:
    """Attention factor, perplexity and critical index of the best candidate so far.

    Args:
        generations: lines of generations.jsonl; the last one is read.
        search: search.json of a finished search. It names the winner, which a final on further documents may have
            chosen. The returned perplexity is the last generation's, as perplexities on other documents do not compare.
    """
    # complete candidates first: a dropped one may look better on its few documents
    last = sorted(_points(generations)[-1], key=lambda point: (not point[3], point[1]))
    if search is not None:
        chosen = (search["attention_factor"], search["critical_index"])
        last = [point for point in last if (point[0], point[2]) == chosen] or last
    factor, perplexity, index, _ = last[0]
    return factor, perplexity, index


def _parents(before: Sequence[Point], now: Sequence[Point]) -> Counter[Point]:
    """The best complete candidates of the generation before that this generation still holds.

    The file names no candidates. Two candidates that broke the model look the same when they share critical index and
    attention factor. So the longest unbroken row of the best is taken, and not every candidate that seems to recur.
    """
    left, parents = Counter(now), Counter()
    for point in sorted((point for point in before if point[3]), key=lambda point: point[1]):
        if left[point] == 0:
            break
        left[point] -= 1
        parents[point] += 1
    return parents


def _points(generations: Sequence[Json]) -> list[list[Point]]:
    """The candidates of each generation, in the order of the file."""
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
