"""Gradient descent on factors, on a synthetic loss whose optimum is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import SearchConfig
from lr2train.evolution.descent import descend, non_decreasing
from lr2train.evolution.final import Scored
from lr2train.evolution.fitness import Slope
from lr2train.evolution.genome import ALL, Space
from lr2train.rope import Spectrum

BEST, BEST_FACTOR = 12.0, 1.3
INDEX = 11  # the loss is lowest with this critical index


class Valley:
    """Loss and slopes of ``mean squared distance of log factors from a known tail``, as a scorer hands them out."""

    def __init__(self, space: Space):
        self.space, self.forwards, self.asked = space, 0, []

    @property
    def fitness(self):
        return self

    def slope(self, candidate) -> Slope:
        factors = self.space.factors(candidate)
        logs = np.log(factors.rescale) - math.log(BEST)
        logs[:INDEX] = 0.0
        off = factors.attention_factor - BEST_FACTOR
        loss = float(logs @ logs) + 4 * off**2 + 0.2 * abs(candidate.critical_index - INDEX)
        return Slope(loss, 2 * logs, 8 * off)

    def slopes(self, pairs) -> list[Slope]:
        self.forwards += 3 * len(pairs)
        self.asked.append([document for _, document in pairs])
        return [self.slope(candidate) for candidate, _ in pairs]

    def on(self, candidates, documents) -> list[Scored]:
        self.forwards += len(candidates) * len(documents)
        self.asked.append(list(documents))
        return [Scored(one, self.slope(one).loss, len(documents)) for one in candidates]


def run(**settings):
    values = {"population": 12, "top_k": 2, "generations": 24, "documents": 27, **settings}
    space = Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**values))
    valley = Valley(space)
    return list(descend(space, valley, 0)), valley  # type: ignore[arg-type]


def test_it_ends_in_the_valley():
    generations, valley = run()
    best = generations[-1].best.candidate
    assert best.critical_index == INDEX
    assert best.tail == pytest.approx([BEST] * len(best.tail), rel=0.02)
    assert best.attention_factor == pytest.approx(BEST_FACTOR, abs=0.02)
    assert valley.slope(best).loss < 0.01 * generations[0].best.loss


def test_where_every_factor_is_free_it_descends_from_the_curves_of_longrope():
    generations, _ = run(space="longrope", tail_high=1.5, generations=40, step_size=0.1)
    assert len(generations[0].population) == 3
    best = generations[-1].best.candidate
    assert best.critical_index == ALL and len(best.tail) == 32
    assert best.tail[INDEX:] == pytest.approx([BEST] * (32 - INDEX), rel=0.05)


def test_every_candidate_is_in_the_space_and_the_same_seed_finds_the_same():
    generations, valley = run()
    low, high = valley.space.bounds
    for generation in generations:
        for one in generation.population:
            tail = one.candidate.tail
            assert list(tail) == sorted(tail)
            assert low <= tail[0] and tail[-1] <= high
    assert run()[0] == generations


def test_the_cost_is_the_announced_cost_and_each_document_is_met_once_by_a_track():
    """Nine critical indices are compared on three documents; then two tracks take 24 further documents in turn."""
    generations, valley = run()
    assert [len(one.population) for one in generations] == [9] + [2] * 24
    assert valley.forwards == SearchConfig(population=9, top_k=2, generations=24).most_forwards == 9 * 3 + 2 * 3 * 24
    assert sorted(valley.asked[0] + [one for asked in valley.asked[1:] for one in asked[:1]]) == list(range(27))
    assert [one.candidate.critical_index for one in run(population=3)[0][0].population] == [8, 12, 16]
    assert len(run(step_documents=3)[1].asked[-1]) == 6


def test_a_fixed_attention_factor_and_a_fixed_critical_index_stay():
    generations, _ = run(search_attention_factor=False, attention_factor=1.1, critical_index=13, top_k=1)
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
