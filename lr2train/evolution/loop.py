"""The search as a generator of generations.

Choice: every generation's random stream depends on the seed and its number alone, and every evaluation is in a journal. A killed search is
started again from generation 0 and finds its finished evaluations there: it takes the same way to the same winner, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.race import Scored
from lr2train.run import stream

ScoreCandidates = Callable[[Sequence[Candidate], Sequence[Candidate]], list[Scored]]
"""(candidates, those kept so far) -> the candidates in their order, scored."""


@dataclass(frozen=True)
class Generation:
    """What one generation left.

    Attributes:
        index: 0 is the initial population.
        population: parents and children that were scored on all documents, best first.
        dropped: children that left the race, by their loss so far.
        evaluated: candidates met so far.
    """

    index: int
    population: tuple[Scored, ...]
    dropped: tuple[Scored, ...]
    evaluated: int

    @property
    def best(self) -> Scored:
        """The best candidate so far."""
        return self.population[0]


def evolve(space: Space, scorer: ScoreCandidates, seed: int) -> Iterator[Generation]:
    """Yield generation 0 (Algorithm 1), then one generation of Algorithm 2 after another, ``generations`` of them.

    Args:
        space: bounds and settings.
        scorer: scores candidates; pure. At least ``top_k`` of all that it meets it scores on everything.
        seed: of every random choice.
    """
    settings = space.settings
    seen: set[str] = set()
    parents: tuple[Scored, ...] = ()
    for index in range(settings.generations + 1):
        kept = [parent.candidate for parent in parents]
        rng = stream(seed, "search", index)
        children = space.fill([], kept, settings.population - len(kept), rng, frozenset(seen)) if kept else space.initial(rng)
        seen.update(child.key for child in children)
        generation = _generation(index, parents, scorer(children, kept), len(seen))
        parents = generation.population[: settings.top_k]
        yield generation


def _generation(index: int, parents: Sequence[Scored], children: Sequence[Scored], evaluated: int) -> Generation:
    complete = ranked([*parents, *(child for child in children if not child.dropped)])
    return Generation(index, complete, ranked([child for child in children if child.dropped]), evaluated)


def ranked(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Best first; ties by key, so that the order never depends on who was evaluated where."""
    return tuple(sorted(scored, key=lambda one: (one.loss, one.candidate.key)))
