"""The paper's algorithm, on a synthetic fitness whose optimum is known."""

import math

import numpy as np
import pytest

from lr2train.config import SearchConfig
from lr2train.evolution.final import Scored
from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, evolve
from lr2train.rope import Spectrum

SCALE, N_DIMS = 8.0, 32
BEST = Candidate(11, tuple(SCALE * (1.2 + 0.7 * i / N_DIMS) for i in range(11, N_DIMS)), 1.2)


class Bowl:
    """A perplexity of 1 at the optimum, larger everywhere else; keeps the candidates that it was called with."""

    def __init__(self):
        self.asked: list[Candidate] = []

    def __call__(self, candidates):
        self.asked += candidates
        return [Scored(candidate, math.log(self.value(candidate)), 1) for candidate in candidates]

    @staticmethod
    def value(candidate: Candidate) -> float:
        wanted = [1.2 + 0.7 * i / N_DIMS for i in range(candidate.critical_index, N_DIMS)]
        tail = sum((value / SCALE - w) ** 2 for value, w in zip(candidate.tail, wanted, strict=True)) / len(wanted)
        return 1 + tail + 0.01 * abs(candidate.critical_index - 11) + 4 * (candidate.attention_factor - 1.2) ** 2


def space(**settings) -> Space:
    values = {"algorithm": "evolution", "population": 24, "top_k": 6, "generations": 15, **settings}
    return Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**values))


def run(seed: int = 0, scorer=None, **settings) -> list[Generation]:
    return list(evolve(space(**settings), scorer or Bowl(), seed))


def test_the_result_depends_on_the_seed_alone():
    assert run(3) == run(3)
    assert run(3)[0] != run(4)[0]


def test_the_best_never_gets_worse_and_populations_are_ordered():
    generations = run()
    assert [one.index for one in generations] == list(range(16))
    best = [one.best.perplexity for one in generations]
    assert best == sorted(best, reverse=True)
    for one in generations:
        scores = [member.perplexity for member in one.population]
        assert scores == sorted(scores)
        assert len(one.population) == 24
        assert all(Bowl.value(member.candidate) == pytest.approx(member.perplexity) for member in one.population), (
            "a score belongs to its candidate"
        )


def test_parents_survive_and_all_other_members_are_new():
    for before, after in zip(generations := run(), generations[1:], strict=False):
        assert set(before.population[:6]) <= set(after.population)
        assert not set(before.population[6:]) & set(after.population)


def test_nothing_is_evaluated_twice():
    bowl = Bowl()
    last = run(scorer=bowl)[-1]
    assert len({candidate.key for candidate in bowl.asked}) == len(bowl.asked) == last.evaluated == 24 + 15 * 18


@pytest.mark.parametrize("seed", range(3))
def test_the_search_ends_near_the_optimum(seed):
    generations = run(seed, generations=30)
    best = generations[-1].best
    assert Bowl.value(BEST) == 1.0
    assert best.perplexity - 1 < 0.15 * (generations[0].best.perplexity - 1)
    assert abs(best.candidate.critical_index - BEST.critical_index) <= 1
    assert abs(best.candidate.attention_factor - BEST.attention_factor) <= 0.03
    wanted = [SCALE * (1.2 + 0.7 * i / N_DIMS) for i in range(best.candidate.critical_index, N_DIMS)]
    assert max(abs(value - w) for value, w in zip(best.candidate.tail, wanted, strict=True)) < 0.25 * SCALE


def test_ties_are_broken_by_the_candidates_key():
    first = run(generations=1, scorer=lambda candidates: [Scored(one, 0.0, 1) for one in candidates])[0]
    keys = [member.candidate.key for member in first.population]
    assert keys == sorted(keys)


def test_a_space_with_fewer_candidates_than_the_population_is_searched_whole():
    """Eleven attention factors and nothing else to search."""
    settings = {
        "critical_index": 12,
        "tail_low": 1.0,
        "tail_high": 1.0,
        "attention_factor_low": 1.0,
        "attention_factor_high": 1.05,
    }
    bowl = Bowl()
    generations = run(generations=6, mutation_probability=1.0, scorer=bowl, **settings)
    assert generations[-1].evaluated == len(bowl.asked) == 11
    assert generations[-1].best.candidate.attention_factor == 1.05


def test_the_authors_generations_have_as_many_crossovers_as_mutations_and_twice_the_first_candidates():
    settings = {"operators": "authors", "critical_index": 11, "search_attention_factor": False, "top_k": 12}
    bowl = Bowl()
    generations = run(scorer=bowl, generations=8, **settings)
    assert len(generations[0].population) == 48 and generations[-1].evaluated == 48 + 8 * 12
    assert all(one.critical_index == 11 and np.all(np.diff(one.tail) > 0.009) for one in bowl.asked)
    firsts, parents = bowl.asked[48:60], [one.candidate for one in generations[0].population[:12]]
    values = {round(value, 2) for parent in parents for value in parent.tail}
    crossed = [np.mean([round(value, 2) in values for value in one.tail]) for one in firsts]
    assert np.mean(crossed[1::2]) > np.mean(crossed[::2]), "every second child has its values from two parents"
    best = [one.best.perplexity for one in generations]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
