"""Racing against scoring every candidate on every document, on random losses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.evolution.genome import Candidate
from lr2train.evolution.race import race, without_racing


def candidates(n: int, first: int = 0) -> list[Candidate]:
    return [Candidate(9, (float(number),), 1.0) for number in range(first, first + n)]


class Table:
    """Losses [candidate, document, answer], and which pairs were looked up."""

    def __init__(self, values: np.ndarray):
        self.values, self.asked = values, set()

    def __call__(self, candidate: Candidate, document: int) -> np.ndarray:
        self.asked.add((int(candidate.tail[0]), document))
        return self.values[int(candidate.tail[0]), document]

    def best(self, among: list[Candidate], keep: int) -> list[Candidate]:
        return sorted(among, key=lambda one: (math.fsum(self.values[int(one.tail[0])].sum(-1)), one.key))[:keep]


@st.composite
def tables(draw) -> tuple[Table, list[Candidate], list[Candidate], int]:
    """Losses with ties, zeros and heavy tails; candidates, some kept, and how many places there are."""
    n_kept, n_new = draw(st.integers(0, 5)), draw(st.integers(1, 12))
    shape = n_kept + n_new, draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = np.exp(rng.normal(0, draw(st.sampled_from([0.1, 1.0, 3.0])), shape) + rng.normal(0, 1, (shape[0], 1, 1)))
    if draw(st.booleans()):
        values = np.round(values)
    return Table(values), candidates(n_kept), candidates(n_new, n_kept), draw(st.integers(1, 6))


@settings(max_examples=300)
@given(tables(), st.randoms())
def test_dropping_only_certain_losers_keeps_the_same_best_candidates(drawn, random):
    table, kept, new, keep = drawn
    order = list(range(table.values.shape[1]))
    random.shuffle(order)
    seen = race(table, new, kept, keep, order, math.inf, 2)
    complete = [one for one, documents in zip(new, seen, strict=True) if len(documents) == len(order)]
    assert table.best([*kept, *complete], keep) == table.best([*kept, *new], keep)


@settings(max_examples=200)
@given(tables(), st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]), st.integers(2, 8))
def test_every_place_is_filled_and_no_candidate_meets_a_document_after_it_was_dropped(drawn, z, min_answers):
    table, kept, new, keep = drawn
    order = list(range(table.values.shape[1]))[::-1]
    seen = race(table, new, kept, keep, order, z, min_answers)
    assert all(documents == order[: len(documents)] and documents for documents in seen)
    assert len(kept) + sum(len(documents) == len(order) for documents in seen) >= min(keep, len(kept) + len(new))
    asked = {(int(one.tail[0]), document) for one, documents in zip(new, seen, strict=True) for document in documents}
    assert asked == {pair for pair in table.asked if pair[0] >= len(kept)}, (
        "no loss is looked up after a candidate was dropped"
    )


def test_a_certain_loser_is_dropped_at_once_and_a_likely_loser_after_enough_answers():
    kept, new = candidates(1), candidates(3, 1)
    values = np.ones((4, 5, 2))
    values[1] = 6.0  # more on one document than the kept one on all
    values[2] = [1.1, 1.2]  # a little worse, always
    values[3] = [0.9, 1.0]  # better
    seen = race(Table(values), new, kept, 1, range(5), 1.0, 4)
    assert [len(documents) for documents in seen] == [1, 2, 5]
    assert [len(documents) for documents in race(Table(values), new, kept, 1, range(5), math.inf, 4)] == [1, 5, 5]


def test_a_likely_loser_is_dropped_exactly_where_mean_exceeds_z_standard_errors():
    """mean > z s / sqrt(n), written out over pairs of answers."""
    rng = np.random.default_rng(5)
    kept, new = candidates(1), candidates(40, 1)
    values = np.exp(rng.normal(0, 0.4, (41, 2, 8)))
    seen = race(Table(values), new, kept, 1, [0, 1], 1.5, 8)
    # the rival is the best after the first document, kept or new
    first = values[:, 0].sum(-1)
    rival = values[int(np.argmin(first)), 0]
    limit = values[0].sum()
    for number, documents in enumerate(seen, 1):
        d = values[number, 0] - rival
        worse = d.mean() > 1.5 * math.sqrt(sum((x - d.mean()) ** 2 for x in d) / 7 / 8)
        assert (len(documents) == 1) == (bool(worse) or first[number] > limit)


def test_racing_halves_the_cost_and_keeps_nine_in_ten_of_the_best():
    """Forty candidates of known quality, eight places, eight documents of eight answers; over twenty draws."""
    rng, found, asked = np.random.default_rng(0), [], []
    for _ in range(20):
        quality = np.linspace(0.0, 1.5, 40)
        values = np.exp(quality[:, None, None] + rng.normal(0, 1.0, (1, 8, 8)) + rng.normal(0, 0.3, (40, 8, 8)))
        table, new = Table(values), candidates(40)
        seen = race(table, new, [], 8, range(8), 1.0, 5)
        complete = [one for one, documents in zip(new, seen, strict=True) if len(documents) == 8]
        found.append(len(set(table.best(new, 8)) & set(table.best(complete, 8))) / 8)
        asked.append(len(table.asked) / 320)
    assert np.mean(asked) < 0.5
    assert np.mean(found) > 0.9


def test_without_racing_every_candidate_meets_every_document():
    table = Table(np.ones((3, 4, 1)))
    assert without_racing(table, candidates(3), [2, 0, 1, 3]) == [[2, 0, 1, 3]] * 3
    assert len(table.asked) == 12


def test_equal_losses_drop_no_candidate_whatever_their_order():
    table = Table(np.ones((6, 3, 4)))
    assert race(table, candidates(6)[::-1], [], 2, range(3), 1.0, 2) == [[0, 1, 2]] * 6


@pytest.mark.parametrize("z", [0.0, 1.0])
def test_a_broken_candidate_is_dropped(z):
    values = np.ones((3, 4, 4))
    values[0] = 1e3
    assert [len(documents) for documents in race(Table(values), candidates(3), [], 2, range(4), z, 2)] == [1, 4, 4]
