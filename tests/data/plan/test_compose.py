"""Composing segments: each planned token is once an input and once a target, and the report counts these tokens.

Also: the mix meets its targets, documents that may not be planned are not, and only the seed decides draws and orders.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from batches import batch_of, labels_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lr2train.config import BucketConfig, DataConfig, OverLong, SourceConfig, UserError, WeightsOf
from lr2train.data.batch import IGNORE, LONG, SHORT
from lr2train.data.plan.compose import Mixture, check, compose_segments
from lr2train.data.plan.report import as_text, report_of
from lr2train.data.store import SourceStore, StoreWriter

L0, T, PADDING = 12, 48, 1
FIRST_ID = 10  # ids of document tokens are unique, so a token names its place in the corpus


def documents_of(lengths: list[list[int]]) -> list[list[list[int]]]:
    """[source][document] -> ids, no id twice in the corpus."""
    ends = iter(itertools.pairwise(np.cumsum([FIRST_ID, *itertools.chain(*lengths)]).tolist()))
    return [[list(range(*next(ends))) for _ in of_source] for of_source in lengths]


def stores_of(folder: Path, documents: list[list[list[int]]]) -> list[SourceStore]:
    for source, of_source in enumerate(documents):
        with StoreWriter(folder / str(source), 60_000, {"fingerprint": "f"}) as writer:
            for document in of_source:
                writer.add(document)
    return [SourceStore([folder / str(source)]) for source in range(len(documents))]


def data_of(lengths: list[list[int]], **changes) -> DataConfig:
    names = "abc"[: len(lengths)]
    return DataConfig(
        sources=[SourceConfig(name=name, weight=1.0 + number) for number, name in enumerate(names)],
        **{"segment_tokens": T, **changes},
    )


def composed(data: DataConfig, lengths: list[list[int]], seed: int = 0) -> Mixture:
    return compose_segments(data, [np.array(one, np.int32) for one in lengths], [None] * len(lengths), L0, seed)


def tokens_drawn_slowly(mixture: Mixture, documents: list[list[list[int]]], window: str) -> Counter:
    """How often each token has to come, from the drawn documents and the limits of their buckets alone."""
    counts: Counter = Counter()
    for of_source, rows_of, cells in zip(documents, mixture.drawn, mixture.cells, strict=True):
        for bucket, rows, cell in zip(mixture.buckets, rows_of, cells, strict=True):
            for row in rows.tolist() if bucket.window == window else ():
                document = of_source[cell.document[row]]
                cut = bucket.over_limit is OverLong.truncate
                counts.update(document[: bucket.limit_tokens] if cut else document)
    return counts


corpora = st.lists(st.lists(st.integers(2, 130), min_size=1, max_size=25), min_size=1, max_size=3)


@given(
    corpora,
    st.sampled_from([1, 2, 4, [2, 4]]),
    st.sampled_from(list(OverLong)),
    st.booleans(),
    st.sampled_from([0, 200]),
    st.integers(0, 99),
)
@settings(max_examples=80)
def test_each_planned_token_comes_once_as_an_input_and_once_as_a_target(
    tmp_path_factory, lengths, align_sp, over_long, whole, budget, seed
):
    documents = documents_of(lengths)
    # The short bucket reaches past L0, so that short documents are cut too; the long bucket has all longer ones.
    ranges = [BucketConfig(name="s", window=SHORT, to_tokens=20), BucketConfig(name="l", above_tokens=20)]
    data = data_of(
        lengths,
        align_sp=align_sp,
        over_long=over_long,
        short_tokens=budget,
        long_tokens=budget,
        buckets=ranges,
        max_repeats=1e6,
    )
    try:
        mixture = composed(data, lengths, seed)
    except UserError:
        assume(False)  # no document for one of the budgets
        return
    stores = stores_of(tmp_path_factory.mktemp("stores"), documents)
    after = {a: b for of_source in documents for document in of_source for a, b in itertools.pairwise(document)}
    for window in (SHORT, LONG):
        table = mixture.tables[window]
        inputs, targets = Counter(), Counter()
        for segment in range(table.n_segments):
            batch = batch_of(table, segment, stores, window, whole and window == LONG, PADDING)
            labels = labels_of(batch)
            inputs.update(batch.tokens[batch.tokens != PADDING].tolist())
            targets.update(labels[labels != IGNORE].tolist())
        wanted = tokens_drawn_slowly(mixture, documents, window)
        tail = wanted - inputs
        assert not inputs - wanted, "a token comes more often than its document was drawn"
        assert tail.total() < (T if window == LONG else 1), "more is lost than the last, incomplete long segment"
        assert targets == Counter({after[token]: count for token, count in inputs.items() if token in after})
        check_sequence_shards(table, window, 4 if align_sp == [2, 4] else align_sp)


def check_sequence_shards(table, window: str, shards: int) -> None:
    if window == SHORT:
        assert (table.offset // (T // shards) == (table.offset + table.stop - table.start - 1) // (T // shards)).all()
        assert ((table.stop - table.start) <= L0).all()


@given(corpora, st.sampled_from(list(OverLong)), st.integers(0, 99))
@settings(max_examples=60)
def test_the_report_counts_every_document_and_every_token(lengths, over_long, seed):
    ranges = [
        BucketConfig(name="s", window=SHORT, to_tokens=20),
        BucketConfig(name="l", above_tokens=20, to_tokens=100),
    ]
    data = data_of(lengths, over_long=over_long, buckets=ranges, keep_below={"a": 0.5}, keep_below_tokens=10)
    mixture = composed(data, lengths, seed)
    arrays, masks = [np.array(one, np.int32) for one in lengths], [None] * len(lengths)
    report = report_of(data, arrays, masks, mixture)
    everything = sum(map(sum, lengths))
    lost = report["lost_tokens"]
    in_windows = sum(one["planned_tokens"] for one in report["windows"].values())
    assert (
        in_windows
        == sum(table.tokens for table in mixture.tables.values())
        == sum(row["planned_tokens"] for row in report["cells"])
    )
    assert in_windows + sum(lost.values()) + report["outside"]["tokens"] + report["left_out"]["tokens"] == everything
    assert report["outside"]["tokens"] == sum(length for one in lengths for length in one if length > 100)
    assert lost["dropped"] == (
        0 if over_long is not OverLong.drop else sum(n for one in lengths for n in one if 12 < n <= 20 or 48 < n <= 100)
    )
    n_segments = sum(sum(one["documents_per_segment"]["segments"]) for one in report["windows"].values())
    assert n_segments == sum(table.n_segments for table in mixture.tables.values())
    histograms = report["histograms"]["lengths"]["sources"]
    assert [sum(histograms[name]["tokens"]) for name in histograms] == [sum(one) for one in lengths]
    assert sum(sum(one["planned_tokens"]) for one in histograms.values()) == in_windows
    assert all(row["source"] in as_text(report) for row in report["cells"])


def realistic(n: int, seed: int) -> np.ndarray:
    """Lengths around 20 tokens with a tail of hundreds."""
    return np.random.default_rng(seed).lognormal(3, 1, n).astype(np.int32).clip(2, 400)


def test_the_realised_mix_is_within_half_a_percent_of_both_marginals():
    lengths = [realistic(20_000, seed) for seed in range(3)]
    data = data_of([[]] * 3, align_sp=4, short_tokens=150_000, long_tokens=300_000, weights_of=WeightsOf.corpus)
    data.buckets = [
        BucketConfig(name="m", to_tokens=60, weight=1),
        BucketConfig(name="l", above_tokens=60, to_tokens=300, weight=2),
    ]
    report = report_of(data, lengths, [None] * 3, compose_segments(data, lengths, [None] * 3, L0, 0))
    targets = [[row["target_tokens"] for row in report[f"by_{what}"]] for what in ("bucket", "source")]
    np.testing.assert_allclose(targets[0], [150_000, 100_000, 200_000], atol=3)  # each of nine cells is a whole number
    np.testing.assert_allclose(targets[1], [75_000, 150_000, 225_000], atol=3)
    assert all(abs(row["error"]) < 0.005 for what in ("source", "bucket", "window") for row in report[f"by_{what}"])


def test_a_document_that_is_not_usable_is_never_planned():
    lengths = [realistic(2_000, 0)]
    usable = np.random.default_rng(1).random(2_000) < 0.7
    mixture = compose_segments(data_of([[]]), lengths, [usable], L0, 0)
    seen = np.unique(np.concatenate([table.document for table in mixture.tables.values()]))
    assert usable[seen].all()
    assert set(np.flatnonzero(usable)) - set(seen) <= set(np.flatnonzero(lengths[0] > L0)), (
        "a usable short document is missing"
    )


def test_keep_below_thins_short_documents_of_its_source_and_no_others():
    lengths = [realistic(20_000, 0), realistic(2_000, 1)]
    data = data_of([[]] * 2, keep_below={"a": 0.1}, keep_below_tokens=30)
    mixture = compose_segments(data, lengths, [None, None], L0, 0)
    kept = np.concatenate([cell.document for cell in mixture.cells[0]])
    below = lengths[0] < 30
    share = below[kept].sum() / below.sum()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / below.sum()), "four standard deviations of a tenth"
    assert np.setdiff1d(np.flatnonzero(~below), kept).size == 0
    assert sum(map(len, mixture.cells[1])) == 2_000


@pytest.mark.parametrize(
    ("keep", "words"), [({"z": 0.1}, r"data\.keep_below .*\bz\b"), ({"a": 1.5}, r"data\.keep_below\.a=1\.5 .*0 and 1")]
)
def test_keep_below_of_an_unknown_source_or_out_of_its_limits_is_refused(keep, words):
    with pytest.raises(UserError, match=words):
        composed(data_of([[5]], keep_below=keep), [[5]])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"long_tokens": -1}, r"data\.long_tokens=-1"),
        ({"max_repeats": 0.0}, r"data\.max_repeats=0\.0"),
        ({"weights_of": WeightsOf.corpus}, r"data\.weights_of=corpus .*contradicts data\.short_tokens=0"),
    ],
)
def test_a_mix_that_no_documents_can_fill_is_refused_before_any_is_read(wrong, words):
    with pytest.raises(UserError, match=words):
        check(data_of([[5]], **wrong), L0)


def test_the_seed_alone_decides_draws_and_orders():
    lengths = [realistic(500, 0).tolist(), realistic(500, 1).tolist()]
    data = data_of(lengths, short_tokens=2_000, long_tokens=5_000)
    first, again, other = (composed(data, lengths, seed) for seed in (0, 0, 1))
    for window in (SHORT, LONG):
        columns = [
            [one.tables[window].document.tolist(), one.tables[window].offset.tolist()] for one in (first, again, other)
        ]
        assert columns[0] == columns[1] != columns[2]


def test_documents_of_all_lengths_and_sources_are_spread_over_the_segments():
    """A source's shares of the table's first and second half differ by no more than independent draws do."""
    lengths = [realistic(8_000, seed) for seed in range(2)]
    mixture = compose_segments(data_of([[]] * 2, align_sp=4), lengths, [None] * 2, L0, 0)
    for table in mixture.tables.values():
        first = table.segment < table.n_segments // 2
        share = [(table.source[half] == 0).mean() for half in (first, ~first)]
        assert abs(share[0] - share[1]) < 5 * np.sqrt(0.5 / len(first)), "five standard deviations of the difference"
