"""Gradient descent on factors, on a synthetic loss whose optimum is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import SearchConfig
from lr2train.evolution.descent import descend, non_decreasing
from lr2train.evolution.fitness import Slope
from lr2train.evolution.genome import Space
from lr2train.rope import Spectrum

BEST, BEST_FACTOR = 12.0, 1.3
INDEX = 11  # the loss is lowest with this critical index


class Valley:
    """Loss and slopes of ``mean squared distance of log factors from a known tail``, as ``Fitness`` hands them out."""

    def __init__(self, space: Space):
        self.space, self.calls = space, 0

    def loss(self, candidate) -> float:
        return self.slope(candidate).loss

    def slope(self, candidate) -> Slope:
        factors = self.space.factors(candidate)
        logs = np.log(factors.rescale) - math.log(BEST)
        logs[:INDEX] = 0.0
        off = factors.attention_factor - BEST_FACTOR
        loss = float(logs @ logs) + 4 * off**2 + 0.2 * abs(candidate.critical_index - INDEX)
        return Slope(loss, 2 * logs, 8 * off)

    def slopes(self, pairs) -> list[Slope]:
        self.calls += len(pairs)
        return [self.slope(candidate) for candidate, _ in pairs]


class Scorer:
    def __init__(self, space: Space):
        self.fitness = Valley(space)


def run(**settings):
    values = {"algorithm": "gradient", "population": 12, "top_k": 2, "generations": 24, "documents": 5, **settings}
    space = Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**values))
    scorer = Scorer(space)
    return list(descend(space, scorer, 0)), scorer.fitness, space  # type: ignore[arg-type]


def test_it_ends_in_the_valley():
    generations, valley, _ = run()
    best = generations[-1].best.candidate
    assert best.critical_index == INDEX
    assert best.tail == pytest.approx([BEST] * len(best.tail), rel=0.02)
    assert best.attention_factor == pytest.approx(BEST_FACTOR, abs=0.02)
    assert valley.loss(best) < 0.01 * valley.loss(generations[0].best.candidate)


def test_every_candidate_is_in_the_space_and_the_same_seed_finds_the_same():
    generations, _, space = run()
    low, high = space.bounds
    for generation in generations:
        for one in (*generation.population, *generation.dropped):
            tail = one.candidate.tail
            assert list(tail) == sorted(tail)
            assert low <= tail[0] and tail[-1] <= high
    assert run()[0] == generations


def test_the_cost_is_the_announced_cost():
    """One track for each of the 9 critical indices, fewer each round, two from the middle on."""
    generations, valley, _ = run()
    sizes = [len(one.population) + len(one.dropped) for one in generations]
    assert sizes[0] == 9 and sizes[-1] == 2 and sizes == sorted(sizes, reverse=True)
    assert valley.calls == sum(sizes)
    settings = SearchConfig(algorithm="gradient", population=9, top_k=2, generations=24, documents=5)
    assert settings.most_forwards == 3 * sum(sizes)
    assert len(run(population=4)[0][0].population) + len(run(population=4)[0][0].dropped) == 4


def test_a_fixed_attention_factor_and_a_fixed_critical_index_stay():
    generations, _, _ = run(search_attention_factor=False, attention_factor=1.1, critical_index=13, top_k=1)
    found = {(one.best.candidate.critical_index, one.best.candidate.attention_factor) for one in generations}
    assert found == {(13, 1.1)}


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=8))
def test_the_projection_is_the_nearest_non_decreasing_point(values):
    """Against a slow search: minima over all ways to divide the numbers into blocks of equal value."""
    given_values = np.array(values)
    found = non_decreasing(given_values)
    assert np.all(np.diff(found) >= 0)
    n, best = len(values), math.inf
    for borders in range(2 ** (n - 1)):
        blocks = np.split(given_values, [i + 1 for i in range(n - 1) if borders >> i & 1])
        means = [block.mean() for block in blocks]
        if all(a <= b for a, b in pairwise(means)):
            best = min(best, sum(((block - mean) ** 2).sum() for block, mean in zip(blocks, means, strict=True)))
    assert ((found - given_values) ** 2).sum() <= best + 1e-9
