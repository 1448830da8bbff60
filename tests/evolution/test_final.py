"""The final: how many documents finalists meet, and whether the chance that is told comes true."""

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lr2train.config import SearchConfig
from lr2train.evolution.documents import SearchDocument
from lr2train.evolution.final import (
    PRIOR,
    CandidateScorer,
    Confidence,
    Scored,
    chance,
    further_documents,
    settled,
    student_t,
)
from lr2train.evolution.fitness import Fitness
from lr2train.evolution.genome import Candidate, Space


def candidates(n: int) -> list[Candidate]:
    return [Candidate(9, (float(number),), 1.0) for number in range(n)]


class Table:
    """Losses [candidate, document], and which pairs were looked up."""

    def __init__(self, values: np.ndarray):
        self.values, self.asked = values, set()

    def __call__(self, candidate: Candidate, document: int) -> float:
        pair = int(candidate.tail[0]), document
        self.asked.add(pair)
        return float(self.values[pair])


@given(st.floats(-30, 30), st.integers(1, 200))
def test_students_t_is_that_of_scipy(t, degrees):
    assert student_t(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


def simulated(ratio: float, n_documents: int, draws: int, settle: float, tail: float = 5.0, seed: int = 0):
    """(claimed chance, whether it came true, documents met by the loser) of finals between two candidates.

    True differences have ``ratio`` times the prior's standard deviation. Documents' differences have heavy tails, as
    those of needles have.
    """
    rng, out = np.random.default_rng(seed), []
    for _ in range(draws):
        true = rng.normal(0, ratio / math.sqrt(PRIOR))
        noise = rng.standard_t(tail, n_documents) * math.sqrt((tail - 2) / tail)
        values = np.stack([np.zeros(n_documents), true + noise])  # candidate 1 is worse where ``true`` is above 0
        pair, table = candidates(2), Table(np.abs(values.min()) + values)
        met = settled(table, pair, range(n_documents), settle)
        differences = (table.values[1] - table.values[0])[: min(met)]
        sign = 1.0 if differences.mean() > 0 else -1.0
        out.append((chance(sign * differences), sign * true > 0, min(met)))
    claimed, right, documents = map(np.array, zip(*out, strict=True))
    return claimed, right, documents


@pytest.mark.parametrize("settle", [0.95, 1.0])
def test_chances_come_true_also_where_the_final_ends_as_soon_as_it_is_settled(settle):
    claimed, right, _ = simulated(1.0, 24, 2500, settle)
    for low, high in ((0.5, 0.65), (0.65, 0.8), (0.8, 0.95), (0.95, 1.01)):
        inside = (claimed >= low) & (claimed < high)
        error = 3 * math.sqrt(0.25 / inside.sum())
        assert right[inside].mean() == pytest.approx(claimed[inside].mean(), abs=error), (low, inside.sum())


def test_a_clear_difference_is_settled_early_and_claims_nothing_too_much():
    claimed, right, documents = simulated(4.0, 24, 600, 0.95)
    sure = claimed >= 0.95
    assert right[sure].mean() > 0.95
    assert np.mean(documents) < 14, "documents are spared"


@pytest.mark.parametrize("settle", [0.8, 0.95])
def test_a_rival_leaves_at_the_first_document_at_which_it_is_settled(settle):
    rng = np.random.default_rng(1)
    values = rng.normal(2, 0.3, (4, 30)) + np.array([0.0, 0.05, 0.15, 0.6])[:, None]
    table, four = Table(values), candidates(4)
    met = settled(table, four, range(30), settle)
    assert {(row, column) for row, n in enumerate(met) for column in range(n)} == table.asked
    assert max(met) == met[int(np.argmin(values[:, : max(met)].sum(1)))] and min(met) >= 4
    loser = met.index(min(met))
    differences = values[loser] - values[met.index(max(met))]
    assert chance(differences[: met[loser]]) >= settle
    assert settled(Table(values), four, range(30), 1.0) == [30] * 4


@given(st.lists(st.floats(-1, 3), min_size=4, max_size=30), st.sampled_from([0.8, 0.95]))
def test_the_documents_that_are_missing_would_settle_it(values, settle):
    """If the documents at hand stood for all: copies of them until the number is reached."""
    differences = np.array(values)
    missing = further_documents(differences, settle)
    if chance(differences) >= settle:
        assert missing == 0
    elif missing is None:
        assert differences.mean() <= 0 or differences.std() == 0
    elif missing < 20_000:
        n = len(differences) + missing
        ratio = differences.mean() / differences.std()
        assert stats.norm.cdf(ratio * n / math.sqrt(n + PRIOR)) >= settle - 0.01
        before = n - 1
        assert missing == 1 or stats.norm.cdf(ratio * before / math.sqrt(before + PRIOR)) <= settle + 0.01


def test_equal_finalists_are_told_as_equal():
    assert chance(np.zeros(8)) == 0.5 and further_documents(np.zeros(8), 0.95) is None
    assert "equal on these documents" in str(Confidence(0.5, 8, 0.0, None, 0, True))
    # One document says nothing: the chance is a half, though the losses differ.
    assert str(Confidence(0.5, 1, 0.2, None, 0, True)) == "better than the runner-up with a chance of 50% (1 document)"
    assert str(Confidence(0.871, 12, 0.01, 30, 0, True)) == (
        "better than the runner-up with a chance of 87% (12 documents; about 30 more would settle it)"
    )
    assert str(Confidence(0.97, 6, 0.1, 0, 18, True)).endswith("(6 documents; 18 document-forwards spared)")
    assert "those they were chosen on" in str(Confidence(0.97, 6, 0.1, 0, 0, False))


def test_the_winner_is_the_leader_by_documents_where_these_differ_in_scored_tokens():
    """The second candidate has the lower loss a token, and the higher one on two of three documents."""
    documents = [SearchDocument(np.zeros(9, dtype=np.int64), ((0, n),)) for n in (1, 1, 8)]
    nats = {0: [1.0, 1.0, 8.0], 1: [1.9, 1.9, 4.0]}  # of a document, summed over its scored tokens

    class Known:
        """Losses that are all known."""

        def __init__(self) -> None:
            self.documents = documents

        def settle(self, decide):
            return decide(lambda candidate, document: np.array([nats[int(candidate.tail[0])][document]]))

        def loss(self, candidate, which) -> float:
            total = sum(nats[int(candidate.tail[0])][one] for one in which)
            return total / sum(documents[one].n_scored_tokens for one in which)

    space = SimpleNamespace(settings=SearchConfig(documents=3, algorithm="evolution"))
    scorer = CandidateScorer(cast("Space", space), cast("Fitness", Known()))
    ranked, confidence = scorer.final([Scored(one, 0.0, 3) for one in candidates(2)])
    assert [int(one.candidate.tail[0]) for one in ranked] == [0, 1]
    assert ranked[0].loss > ranked[1].loss
    assert confidence is not None and confidence.nats == pytest.approx((0.9 + 0.9 - 0.5) / 3)
    assert confidence.chance > 0.5
