"""Evolution as a generator of generations.

Choice: every generation's random stream depends on the seed and its number alone, and every evaluation is in a journal. A killed search is
started again from generation 0 and finds its finished evaluations there: it takes the same way to the same winner, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lr2train.evolution.genome import Candidate, Space
from lr2train.run import stream

Fitness = Callable[[Sequence[Candidate]], list[float]]


@dataclass(frozen=True)
class Scored:
    """A candidate and its needle perplexity (lower is better)."""

    candidate: Candidate
    perplexity: float


@dataclass(frozen=True)
class Generation:
    """What one generation left."""

    index: int  # 0 is the initial population
    population: tuple[Scored, ...]  # best first
    evaluated: int  # candidates evaluated so far

    @property
    def best(self) -> Scored:
        """The best candidate so far."""
        return self.population[0]


def evolve(space: Space, fitness: Fitness, seed: int) -> Iterator[Generation]:
    """Yield generation 0 (Algorithm 1), then one generation of Algorithm 2 after another, ``generations`` of them.

    Args:
        space: bounds and knobs.
        fitness: perplexities of candidates, in order; pure.
        seed: of every random choice.
    """
    knobs = space.knobs
    seen: set[str] = set()

    def score(candidates: list[Candidate]) -> list[Scored]:
        seen.update(candidate.key for candidate in candidates)
        return [Scored(candidate, perplexity) for candidate, perplexity in zip(candidates, fitness(candidates), strict=True)]

    population = _ranked(score(space.initial(stream(seed, "search", 0))))
    yield Generation(0, population, len(seen))
    for index in range(1, knobs.generations + 1):
        parents = population[: knobs.top_k]
        candidates = [parent.candidate for parent in parents]
        children = space.fill([], candidates, knobs.population - len(parents), stream(seed, "search", index), frozenset(seen))
        population = _ranked([*parents, *score(children)])
        yield Generation(index, population, len(seen))


def _ranked(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Best first; ties by key, so that the order never depends on who was evaluated where."""
    return tuple(sorted(scored, key=lambda one: (one.perplexity, one.candidate.key)))
