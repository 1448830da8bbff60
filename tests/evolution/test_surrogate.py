"""Surrogate-assisted evolution: the Gaussian process against its formula, the search against the plain one where the
optimum is known.
"""

import functools
import math

import numpy as np
import pytest

from lr2train.evolution.loop import evolve
from lr2train.evolution.race import CandidateScorer
from lr2train.evolution.surrogate import _DOCUMENT, _OWN, GaussianProcess, Observations, evolve_surrogate
from lr2train.run import stream
from tests.evolution.test_loop import Bowl, space


class Landscape:
    """Stands for ``Fitness``: the bowl's value times the document's difficulty, disturbed for each pair of document and
    candidate.
    """

    def __init__(self, n_documents: int, noise: float = 0.3):
        self.documents, self._noise = range(n_documents), noise
        self._difficulty = np.exp(stream(0, "hardness").normal(0, 0.7, n_documents))
        self.asked: set[tuple[str, int]] = set()

    def settle(self, decide):
        return decide(self.look_up)

    def look_up(self, candidate, document):
        self.asked.add((candidate.key, document))
        disturbed = math.exp(stream(document, candidate.key).normal(0, self._noise))
        return np.array([(Bowl.value(candidate) - 0.97) * self._difficulty[document] * disturbed])

    def loss(self, candidate, documents):
        return float(np.mean([self.look_up(candidate, document)[0] for document in documents]))


def test_the_process_is_the_conditional_of_a_normal_distribution():
    """Means and deviations from the whole joint covariance, entry by entry, solved in one piece."""
    rng = np.random.default_rng(0)
    features, candidate, document = (
        rng.normal(0, 0.1, (6, 4)),
        np.array([0, 1, 2, 2, 3, 4, 4, 5]),
        np.array([0, 1, 0, 1, 2, 2, 0, 1]),
    )
    values = rng.normal(-3, 1, 8)
    process = GaussianProcess(features, candidate, document, values, {str(row): row for row in range(6)})
    asked, names = np.vstack([features[2], rng.normal(0, 0.1, 4)]), ["2", "new"]
    means, deviations = process.predict(asked, names)

    hyper, variance = process._hyper, float(values.var())
    scale = np.array([hyper.length] * 3 + [hyper.attention_length])

    def covariance(a, b, same_candidate, same_document, same_evaluation):
        smooth = (1 - hyper.noise_share) * math.exp(-0.5 * (((a - b) / scale) ** 2).sum())
        return variance * (
            smooth + _OWN * same_candidate + 1 + _DOCUMENT * same_document + hyper.noise_share * same_evaluation
        )

    n = len(values)
    joint = np.array([
        [covariance(features[candidate[i]], features[candidate[j]], candidate[i] == candidate[j],
        document[i] == document[j], i == j) for j in range(n)]
        for i in range(n)
    ])  # fmt: skip
    for row, name in enumerate(names):
        cross = np.array(
            [covariance(asked[row], features[candidate[i]], name == str(candidate[i]), False, False) for i in range(n)]
        )
        alone = covariance(asked[row], asked[row], True, False, False)
        assert means[row] == pytest.approx(
            values.mean() + cross @ np.linalg.solve(joint, values - values.mean()), rel=1e-9
        )
        assert deviations[row] == pytest.approx(math.sqrt(alone - cross @ np.linalg.solve(joint, cross)), rel=1e-6)


def test_the_difficulty_of_a_document_is_not_counted_against_a_candidate():
    """The better candidate met only a hard document, the worse one only an easy document: the raw losses would
    mislead.
    """
    one = space(documents=8)
    landscape = Landscape(8, noise=0.0)
    easy, hard = int(landscape._difficulty.argmin()), int(landscape._difficulty.argmax())
    observations, drawn = Observations(one, landscape), one.initial(stream(0, "members"))
    better, worse = sorted(drawn, key=Bowl.value)[:: len(drawn) - 1]
    observations.observe(
        [(other, document) for other in drawn if other not in (better, worse) for document in (easy, hard)]
    )
    observations.observe([(better, hard), (worse, easy)])
    assert landscape.loss(better, [hard]) > landscape.loss(worse, [easy])
    assert [
        scored.candidate for scored in sorted(observations.estimates([worse, better]), key=lambda scored: scored.loss)
    ] == [
        better,
        worse,
    ]


def searched(seed: int, landscape: Landscape, evolution=evolve_surrogate, make_scorer=Observations, **settings):
    """(generations, final) of a search; the default has 6 generations."""
    one = space(**{"documents": 10, "final_documents": 4, "generations": 6, "seed": seed, **settings})
    scorer = make_scorer(one, landscape)
    generations = list(evolution(one, scorer, seed))
    return generations, scorer.final([scored.candidate for scored in generations[-1].population[: one.settings.top_k]])


@functools.cache
def surrogate_search(seed: int):
    """(generations, final, landscape) of the default search; computed once for all tests."""
    landscape = Landscape(14)
    return *searched(seed, landscape), landscape


def test_it_ends_as_well_as_the_plain_search_with_a_quarter_of_the_evaluations():
    """Over 4 seeds; compared by the candidates' true values, which no search sees."""
    plain, pooled = [Landscape(14) for _ in range(4)], [surrogate_search(seed)[2] for seed in range(4)]
    found = [surrogate_search(seed)[1][0].candidate for seed in range(4)]
    wanted = [searched(seed, plain[seed], evolve, CandidateScorer, racing=False)[1][0].candidate for seed in range(4)]
    assert sum(len(one.asked) for one in pooled) <= 0.25 * sum(len(one.asked) for one in plain)
    assert np.mean([Bowl.value(one) for one in found]) <= np.mean([Bowl.value(one) for one in wanted])


def test_the_result_depends_on_the_seed_alone():
    short = searched(1, Landscape(14), generations=3)
    assert searched(1, Landscape(14), generations=3) == short
    assert surrogate_search(1)[0][:4] == short[0], "later generations change no earlier one"
    assert surrogate_search(2)[0][0] != short[0][0]


def test_the_budget_is_kept():
    generations, _, landscape = surrogate_search(1)
    children = 24 + 6 * 18
    assert [one.evaluated for one in generations] == [24 + 18 * index for index in range(7)]
    assert len(landscape.asked) == pytest.approx(2.25 * children + 2 * 4, abs=9), "a rounding a generation"
    assert all(len(one.population) == 24 for one in generations[1:])


def test_every_child_is_evaluated_and_lies_in_the_space():
    one, (generations, _, _) = space(), surrogate_search(0)
    for scored in (scored for generation in generations for scored in generation.population):
        assert 1 <= scored.documents <= 10
        assert list(scored.candidate.tail) == sorted(scored.candidate.tail)
        assert one.bounds[0] <= scored.candidate.tail[0] <= scored.candidate.tail[-1] <= one.bounds[1]


def test_a_space_with_fewer_candidates_than_the_population_is_searched_whole():
    """Eleven attention factors and nothing else to search; then a single candidate."""
    settings = {
        "critical_index": 12, "tail_low": 1.0, "tail_high": 1.0, "attention_factor_high": 1.05,
        "mutation_probability": 1.0,
        "population": 12, "top_k": 3, "generations": 3,
    }  # fmt: skip
    generations, _ = searched(0, landscape := Landscape(14), **settings)
    assert generations[-1].evaluated == len({key for key, _ in landscape.asked}) == 11
    alone, final = searched(0, Landscape(14), search_attention_factor=False, **settings)
    assert [one.evaluated for one in alone] == [1] * 4
    assert len(final) == 1


def test_losses_of_zero_and_of_a_million_nats_are_ranked():
    one = space(documents=2)
    observations, (first, second, *_) = Observations(one, Landscape(2)), one.initial(stream(0, "members"))
    observations._fitness.look_up = lambda candidate, document: np.array([0.0 if candidate == first else 1e6])
    observations.observe([(first, 0), (second, 0), (first, 1)])
    good, bad = observations.estimates([first, second])
    assert 0 <= good.loss < bad.loss < math.inf
