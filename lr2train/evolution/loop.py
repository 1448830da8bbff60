"""The evolutionary search as a generator of generations (paper, Algorithms 1 and 2).

Choice: a generation's random stream depends on the seed and on the generation's number alone, and every evaluation is
in a journal. A killed search starts again from generation 0 and finds its finished evaluations there. So it ends with
the same winner, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lr2train.evolution.final import Scored
from lr2train.evolution.genome import Candidate, Space
from lr2train.run import stream

ScoreCandidates = Callable[[Sequence[Candidate]], list[Scored]]
"""Candidates -> the candidates in their order, each scored on every document."""


@dataclass(frozen=True)
class Generation:
    """The result of one generation.

    Attributes:
        index: 0 is the initial population.
        population: parents and children, or starts, or tracks, best first.
        evaluated: number of distinct candidates so far.
    """

    index: int
    population: tuple[Scored, ...]
    evaluated: int

    @property
    def best(self) -> Scored:
        """The best candidate so far."""
        return self.population[0]


def evolve(space: Space, score: ScoreCandidates, seed: int) -> Iterator[Generation]:
    """Yield generation 0 (Algorithm 1), then ``search.generations`` generations of Algorithm 2.

    Args:
        space: bounds and settings.
        score: pure.
        seed: of every random choice.
    """
    settings = space.settings
    seen: set[str] = set()
    parents: tuple[Scored, ...] = ()
    for index in range(settings.generations + 1):
        kept = [parent.candidate for parent in parents]
        rng = stream(seed, "search", index)
        children = (
            space.fill([], kept, settings.population - len(kept), rng, frozenset(seen)) if kept else space.initial(rng)
        )
        seen.update(child.key for child in children)
        parents = ranked([*parents, *score(children)])
        yield Generation(index, parents, len(seen))
        parents = parents[: settings.top_k]


def ranked(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Lowest loss first; ties by key, so the order does not depend on the ranks that evaluated."""
    return tuple(sorted(scored, key=lambda one: (one.loss, one.candidate.key)))
