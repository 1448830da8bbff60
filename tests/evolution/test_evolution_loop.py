"""Evolution on a synthetic fitness whose optimum is known."""

import pytest

from lr2train.config import SearchConfig
from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, evolve
from lr2train.rope import Spectrum

SCALE, N_DIMS = 8.0, 32
BEST = Candidate(11, tuple(SCALE * (1.2 + 0.7 * i / N_DIMS) for i in range(11, N_DIMS)), 1.2)


class Bowl:
    """1 at the optimum, growing away from it on every side; remembers what it was asked."""

    def __init__(self):
        self.asked: list[Candidate] = []

    def __call__(self, candidates):
        self.asked += candidates
        return [self.value(candidate) for candidate in candidates]

    @staticmethod
    def value(candidate: Candidate) -> float:
        wanted = [1.2 + 0.7 * i / N_DIMS for i in range(candidate.critical_index, N_DIMS)]
        tail = sum((value / SCALE - w) ** 2 for value, w in zip(candidate.tail, wanted, strict=True)) / len(wanted)
        return 1 + tail + 0.01 * abs(candidate.critical_index - 11) + 4 * (candidate.attention_factor - 1.2) ** 2


def run(seed: int = 0, fitness=None, **knobs) -> list[Generation]:
    values = {"population": 24, "top_k": 6, "generations": 15, **knobs}
    return list(evolve(Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**values), 1.0), fitness or Bowl(), seed))


def test_it_depends_on_the_seed_alone():
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
        assert all(Bowl.value(member.candidate) == member.perplexity for member in one.population), "a score belongs to its candidate"


def test_parents_survive_and_the_rest_is_new():
    for before, after in zip(generations := run(), generations[1:], strict=False):
        assert set(before.population[:6]) <= set(after.population)
        assert not set(before.population[6:]) & set(after.population)


def test_nothing_is_evaluated_twice():
    bowl = Bowl()
    last = run(fitness=bowl)[-1]
    assert len({candidate.key for candidate in bowl.asked}) == len(bowl.asked) == last.evaluated == 24 + 15 * 18


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_neighbourhood_of_the_optimum(seed):
    generations = run(seed, generations=30)
    best = generations[-1].best
    assert Bowl.value(BEST) == 1.0
    assert best.perplexity - 1 < 0.15 * (generations[0].best.perplexity - 1)
    assert abs(best.candidate.critical_index - BEST.critical_index) <= 1
    assert abs(best.candidate.attention_factor - BEST.attention_factor) <= 0.03
    wanted = [SCALE * (1.2 + 0.7 * i / N_DIMS) for i in range(best.candidate.critical_index, N_DIMS)]
    assert max(abs(value - w) for value, w in zip(best.candidate.tail, wanted, strict=True)) < 0.25 * SCALE


def test_ties_are_broken_by_the_candidate_and_not_by_the_order_of_evaluation():
    first = run(generations=1, fitness=lambda candidates: [1.0] * len(candidates))[0]
    keys = [member.candidate.key for member in first.population]
    assert keys == sorted(keys)


def test_a_space_that_is_used_up_ends_quietly():
    """Eleven attention factors and nothing else to search."""
    knobs = {"critical_index": 12, "tail_low": 1.0, "tail_high": 1.0, "attention_factor_low": 1.0, "attention_factor_high": 1.05}
    bowl = Bowl()
    generations = run(generations=6, mutation_probability=1.0, fitness=bowl, **knobs)
    assert generations[-1].evaluated == len(bowl.asked) == 11
    assert generations[-1].best.candidate.attention_factor == 1.05
