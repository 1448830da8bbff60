"""The paper's algorithm and CMA-ES, on a synthetic fitness whose optimum is known."""

import math

import pytest

from lr2train.config import SearchConfig
from lr2train.evolution.cma import evolve_cmaes
from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, evolve
from lr2train.evolution.race import Scored
from lr2train.rope import Spectrum

SCALE, N_DIMS = 8.0, 32
BEST = Candidate(11, tuple(SCALE * (1.2 + 0.7 * i / N_DIMS) for i in range(11, N_DIMS)), 1.2)


class Bowl:
    """A perplexity of 1 at the optimum, larger everywhere else; keeps the candidates that it was called with."""

    def __init__(self):
        self.asked: list[Candidate] = []

    def __call__(self, candidates, kept):
        assert not {one.key for one in candidates} & {one.key for one in kept}, "a kept candidate is not scored again"
        self.asked += candidates
        return [Scored(candidate, math.log(self.value(candidate)), 1) for candidate in candidates]

    @staticmethod
    def value(candidate: Candidate) -> float:
        wanted = [1.2 + 0.7 * i / N_DIMS for i in range(candidate.critical_index, N_DIMS)]
        tail = sum((value / SCALE - w) ** 2 for value, w in zip(candidate.tail, wanted, strict=True)) / len(wanted)
        return 1 + tail + 0.01 * abs(candidate.critical_index - 11) + 4 * (candidate.attention_factor - 1.2) ** 2


class Racing(Bowl):
    """Drops every candidate that is not among the six best so far."""

    def __call__(self, candidates, kept):
        scored = super().__call__(candidates, kept)
        losses = sorted([*(one.loss for one in scored), *(math.log(self.value(one)) for one in kept)])
        return [Scored(one.candidate, one.loss, 1, dropped=one.loss > losses[5]) for one in scored]


def space(**settings) -> Space:
    values = {"population": 24, "top_k": 6, "generations": 15, **settings}
    return Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**values))


def run(seed: int = 0, scorer=None, algorithm=evolve, **settings) -> list[Generation]:
    return list(algorithm(space(**settings), scorer or Bowl(), seed))


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
    first = run(generations=1, scorer=lambda candidates, kept: [Scored(one, 0.0, 1) for one in candidates])[0]
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


def test_dropping_candidates_that_cannot_be_parents_changes_no_generation():
    plain, racing = run(), run(scorer=Racing())
    assert [one.population[:6] for one in racing] == [one.population[:6] for one in plain]
    assert all(len(one.population) + len(one.dropped) == 24 for one in racing)
    assert sum(len(one.dropped) for one in racing) > 100


@pytest.mark.parametrize("seed", range(3))
def test_cmaes_ends_near_the_optimum(seed):
    """The optimum's tail is straight, a form that CMA-ES can draw; so the bound is narrower."""
    generations = run(seed, algorithm=evolve_cmaes, generations=25)
    best = generations[-1].best
    assert best.perplexity - 1 < 0.05 * (generations[0].best.perplexity - 1)
    assert abs(best.candidate.critical_index - BEST.critical_index) <= 1
    assert run(seed, algorithm=evolve_cmaes, generations=3) == generations[:4], "the seed alone decides"
    assert [one.index for one in generations] == list(range(26))
    scores = [one.best.loss for one in generations]
    assert scores == sorted(scores, reverse=True)


def test_cmaes_learns_from_dropped_candidates_too():
    best = run(algorithm=evolve_cmaes, scorer=Racing(), generations=25)[-1].best
    assert best.perplexity < 1.01


def test_cmaes_candidates_stay_inside_the_space():
    one = space()
    for generation in run(algorithm=evolve_cmaes, generations=4):
        for scored in (*generation.population, *generation.dropped):
            tail = scored.candidate.tail
            assert scored.candidate.critical_index in one.critical_indices
            assert len(tail) == N_DIMS - scored.candidate.critical_index
            assert one.bounds[0] <= tail[0]
            assert list(tail) == sorted(tail)
            assert tail[-1] <= one.bounds[1]
