"""The mix: marginals hold, no other table that meets them is nearer to the natural one, refusals give numbers.

Also: the ranges of buckets, and which documents are drawn for a cell.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lr2train.cli.composition import compose
from lr2train.config import BucketConfig, DataConfig, OverLong, SourceConfig, UserError, WeightsOf
from lr2train.data.plan import buckets, mix
from lr2train.data.plan.buckets import ENDLESS, Bucket, Cell

TABLE_1 = [
    BucketConfig(name="to_100k", to_tokens=100_000, weight=3),
    BucketConfig(name="to_200k", above_tokens=100_000, to_tokens=200_000, weight=4),
]


def data_of(weights: dict[str, float], **changes) -> DataConfig:
    given = {"short_tokens": 300, "long_tokens": 700, "buckets": TABLE_1, **changes}
    return DataConfig(sources=[SourceConfig(name=name, weight=weight) for name, weight in weights.items()], **given)


def entropy(table: np.ndarray, natural: np.ndarray) -> float:
    """Relative entropy of two tables; a cell that is 0 in both counts nothing."""
    there = table > 0
    return float((table[there] * np.log(table[there] / natural[there])).sum())


# ---- the fit ----


@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 10**6), st.sampled_from([1.05, 1.5, 4.0, 1e9]))
@settings(max_examples=80)
def test_the_fit_meets_both_marginals_and_no_nearer_table_does(n_rows, n_columns, seed, slack):
    rng = np.random.default_rng(seed)
    natural = rng.lognormal(0, 2, (n_rows, n_columns)) * (rng.random((n_rows, n_columns)) < 0.8)
    some = natural * rng.random(natural.shape)  # some table, so its own marginals can be met
    assume(some.sum() > 0)
    most = slack * (some / np.where(natural > 0, natural, 1)).max()
    rows, columns = some.sum(axis=1), some.sum(axis=0)
    table = mix.proportional_fit(natural, rows, columns, most)
    # 1e-3: with slack near 1 the rounds end before the fit has settled; elsewhere the error is 1e-10.
    np.testing.assert_allclose(table.sum(axis=0), columns, atol=1e-3 * rows.sum())
    np.testing.assert_allclose(table.sum(axis=1), rows, atol=1e-3 * rows.sum())
    assert (table <= most * natural * (1 + 1e-9)).all()
    assert ((natural > 0) | (table == 0)).all()
    # Optimality without its formula: tokens moved around any rectangle keep the marginals, and must not give a nearer
    # table.
    here, step = entropy(table, natural), 1e-4 * table.sum()
    for (a, b), (c, d) in itertools.product(
        itertools.permutations(range(n_rows), 2), itertools.combinations(range(n_columns), 2)
    ):
        moved = table.copy()
        moved[[a, b], [c, d]] += step
        moved[[a, b], [d, c]] -= step
        if (moved >= 0).all() and (moved <= most * natural).all():
            assert entropy(moved, natural) > here - 1e-3 * step


def test_without_a_bound_the_natural_odds_of_sources_and_buckets_stay():
    natural = np.array([[5.0, 2.0, 1.0], [1.0, 4.0, 2.0]])
    table = mix.proportional_fit(natural, np.array([6.0, 4.0]), np.array([2.0, 3.0, 5.0]), 1e9)
    odds = [one[0, :-1] * one[1, 1:] / (one[0, 1:] * one[1, :-1]) for one in (table, natural)]
    np.testing.assert_allclose(odds[0], odds[1], rtol=1e-8)


def test_the_bound_moves_tokens_to_cells_that_hold_more():
    natural = np.array([[100.0, 1.0], [100.0, 100.0]])
    table = mix.proportional_fit(natural, np.array([50.0, 50.0]), np.array([60.0, 40.0]), 1.2)
    np.testing.assert_allclose(table, [[48.8, 1.2], [11.2, 38.8]], rtol=1e-6)


# ---- targets ----


def test_the_papers_table_holds_by_source_and_by_length():
    data = compose("prepare", ["experiment=llama3_8b_128k", "name=x"]).data
    ranges = buckets.resolve(data, 8192)
    assert [(one.window, one.above_tokens, one.to_tokens) for one in ranges] == [
        ("short", 0, 8192),
        ("long", 8192, 100_000),
        ("long", 100_000, 200_000),
    ]
    billion = 10**9
    available = np.array([[4, 3, 1], [6, 1.5, 0.5], [0, 1.5, 0.8], [1.1, 0, 0]]) * billion
    table = mix.targets(data, ranges, available.astype(np.int64))
    np.testing.assert_allclose(table.sum(axis=0), [3 * billion, 3 * billion, 4 * billion], rtol=1e-9)
    np.testing.assert_allclose(table.sum(axis=1), [4.5 * billion, 2.5 * billion, 2 * billion, billion], rtol=1e-9)
    assert (table <= 4 * available).all()


def test_the_released_example_gives_its_number_of_segments_by_source_and_length():
    data = compose("prepare", ["experiment=llama3_8b_128k", "data=nnscaler_128k", "name=x"]).data
    ranges = buckets.resolve(data, 8192)
    names = [source.name for source in data.sources]
    segments = mix.targets(data, ranges, np.full((len(names), len(ranges)), 10**12)) / 131072
    by_name = {name: row.tolist() for name, row in zip(names, segments, strict=True)}
    assert by_name == {
        "arxiv": [0, 0, 0, 3000, 4000, 8000, 3000],
        "common_crawl": [0, 0, 0, 2000, 3000, 8000, 5000],
        "wikipedia": [0, 0, 0, 3000, 1000, 0, 0],
        "fineweb_edu": [8000, 8000, 16000, 0, 0, 0, 0],
    }
    assert segments.sum() == 72_000
    cut = ranges[2]
    assert (cut.to_tokens, cut.limit_tokens, cut.over_limit) == (9216, 8192, OverLong.truncate)


def test_weights_act_in_each_bucket_among_the_sources_that_have_documents():
    data = data_of({"a": 1, "b": 3})
    table = mix.targets(data, buckets.resolve(data, 8192), np.array([[900, 900, 900], [900, 900, 0]]))
    assert table.tolist() == [[75, 75, 400], [225, 225, 0]]


def test_a_share_of_less_than_one_token_of_an_empty_cell_is_0():
    ranges = [BucketConfig(name="s", window="short", sources={"a": 999.3, "b": 0.7})]
    data = data_of({"a": 1, "b": 1}, buckets=ranges, short_tokens=1000, long_tokens=0)
    assert mix.targets(data, buckets.resolve(data, 8192), np.array([[900, 0], [0, 0]]))[:, 0].tolist() == [999, 0]


def test_without_a_budget_each_document_comes_once():
    data = data_of({"a": 1, "b": 3}, short_tokens=0)
    table = mix.targets(data, buckets.resolve(data, 8192), np.array([[17, 900, 900], [9, 900, 900]]))
    assert table[:, 0].tolist() == [17, 9]
    assert table[:, 1:].sum() == 700


@pytest.mark.parametrize(
    ("available", "changes", "words"),
    [
        (
            [[90, 90, 90], [90, 90, 0]],
            {"max_repeats": 4},
            r"a .*400 tokens of bucket to_200k .*90, at most 4 times, .*40 are missing.*data\.max_repeats \(to 4\.5\)",
        ),
        (
            [[90, 900, 0], [90, 900, 0]],
            {},
            r"data\.long_tokens=700 .*100,001-200,000 tokens.*all 400 are missing",
        ),
        ([[90, 900, 900]] * 2, {"max_repeats": 0}, r"data\.max_repeats=0 is not above 0"),
        ([[90, 900, 900]] * 2, {"short_tokens": -5}, r"data\.short_tokens=-5 is below 0"),
        (
            [[90, 900, 900]] * 2,
            {"short_tokens": 0, "weights_of": WeightsOf.corpus},
            r"data\.weights_of=corpus .* contradicts data\.short_tokens=0",
        ),
        (
            [[99, 900, 90], [900, 900, 0]],
            {"weights_of": WeightsOf.corpus},
            r"to_200k \(100,001-200,000 tokens\) .*400 tokens, .*a 250 .*b 0 .*150 are missing",
        ),
    ],
)
def test_a_budget_that_cannot_be_filled_says_how_much_is_missing_and_where(available, changes, words):
    data = data_of({"a": 1, "b": 3}, **changes)
    with pytest.raises(UserError, match=words):
        mix.targets(data, buckets.resolve(data, 8192), np.array(available))


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_missing_tokens_of_a_mix_over_the_corpus_are_the_least_that_would_do(seed):
    """Compared with a search over all sets of sources and all sets of buckets (Hall's condition)."""
    rng = np.random.default_rng(seed)
    available = np.rint(rng.lognormal(3, 1.5, (3, 3))).astype(np.int64) * (rng.random((3, 3)) < 0.7)
    data = data_of(dict(zip("abc", rng.integers(1, 9, 3).tolist(), strict=True)), weights_of=WeightsOf.corpus)
    weights = np.array([source.weight for source in data.sources])
    rows, columns = 1000 * weights / weights.sum(), np.array([300.0, 300.0, 400.0])
    missing = 0.0
    for sources, ranges in itertools.product(itertools.product([False, True], repeat=3), repeat=2):
        a, b = np.array(sources), np.array(ranges)
        missing = max(missing, rows[a].sum() - columns[~b].sum() - 4 * available[np.ix_(a, b)].sum())
    if missing < 1:
        return
    with pytest.raises(UserError) as error:
        mix.targets(data, buckets.resolve(data, 8192), available)
    if "cannot be filled" not in str(error.value):  # the other refusal, of a bucket without any document
        said = int(re.findall(r"(\d+) are missing", str(error.value))[0])
        assert abs(said - missing) <= 3, "more than the rounding of three sources"


# ---- buckets ----


def test_a_window_without_a_bucket_gets_one_of_all_its_documents():
    ranges = buckets.resolve(data_of({"a": 1}, buckets=[]), 512)
    assert [(one.name, one.above_tokens, one.to_tokens) for one in ranges] == [
        ("short", 0, 512),
        ("long", 512, ENDLESS),
    ]
    masks = [one.holds(np.array([3, 512, 513, 10**6])).tolist() for one in ranges]
    assert masks == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ([BucketConfig(name="x", window="both")], r"data\.buckets\.x\.window=both is not one of short, long"),
        ([BucketConfig(name="x"), BucketConfig(name="x")], r"data\.buckets .*\bx 2 times"),
        ([BucketConfig(name="x", to_tokens=512)], r"data\.buckets\.x holds lengths above 512 and up to 512"),
        ([BucketConfig(name="x", weight=-1)], r"data\.buckets\.x\.weight=-1"),
        ([BucketConfig(name="x", sources={"z": 1.0})], r"data\.buckets\.x\.sources names z"),
        ([BucketConfig(name="x", to_tokens=900, sources={"a": 1.0}), BucketConfig(name="y", above_tokens=900)],
        r"buckets\.x .*buckets\.y .*give sources"),
        ([BucketConfig(name="x"), BucketConfig(name="y", above_tokens=900)],
        r"a of 901 tokens .*set data\.buckets\.x\.to_tokens to at most 900"),
    ],
)  # fmt: skip
def test_buckets_out_of_their_limits_are_refused(listed, words):
    with pytest.raises(UserError, match=words):
        buckets.resolve(data_of({"a": 1}, buckets=listed), 512)


def bucket(over_limit: OverLong) -> Bucket:
    return Bucket("b", "long", 4, 90, 1.0, {}, 10, over_limit)


@pytest.mark.parametrize(
    ("over_limit", "tokens"), [(OverLong.split, 5 + 90 + 10), (OverLong.truncate, 5 + 10 + 10), (OverLong.drop, 15)]
)
def test_documents_over_the_limit_are_split_truncated_or_dropped_and_counted(over_limit, tokens):
    cell = buckets.cell_of(np.array([4, 5, 90, 91, 10], np.int32), None, bucket(over_limit))
    assert cell.tokens == tokens
    assert cell.dropped_tokens == (90 if over_limit is OverLong.drop else 0)
    assert cell.document.tolist() == ([1, 4] if over_limit is OverLong.drop else [1, 2, 4])


# ---- drawing ----


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(0, 3000), st.integers(0, 9))
@settings(max_examples=120)
def test_documents_are_drawn_up_to_the_target_and_none_twice_before_each_came_once(lengths, target, seed):
    cell = Cell(np.arange(len(lengths)), np.array(lengths, np.int32))
    rows = buckets.draw(cell, target, np.random.default_rng(seed))
    assert target <= cell.length[rows].sum() < target + max(lengths)
    times = np.bincount(rows, minlength=len(lengths))
    assert times.max() - times.min() <= 1
    if target % sum(lengths):
        before = cell.length[rows[:-1]].sum()
        others = [
            length for row, length in enumerate(lengths) if times[row] == target // sum(lengths) or row == rows[-1]
        ]
        assert cell.length[rows[-1]] == min(length for length in others if before + length >= target), (
            "another document would exceed the target less"
        )


def test_the_seed_decides_a_draw():
    cell = Cell(np.arange(500), np.full(500, 10, np.int32))
    first, again, other = (buckets.draw(cell, 1000, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 100
