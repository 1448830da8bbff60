"""The whole plan on random corpora: each planned token comes once as an input and once as a target, and the report counts what is there."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lr2train.config import BucketConfig, DataConfig, OverLong, SourceConfig, UserError, WeightsOf
from lr2train.data.batch import IGNORE, LONG, SHORT
from lr2train.data.feed.loader import materialise
from lr2train.data.plan.compose import Mixture, check, compose_segments
from lr2train.data.plan.report import as_text, report_of
from lr2train.data.store import Store, StoreWriter

L0, T, PADDING = 12, 48, 1
FIRST_ID = 10  # ids of document tokens are unique, so a token names its place in the corpus


def documents_of(lengths: list[list[int]]) -> list[list[list[int]]]:
    """[source][document] -> ids, no id twice in the corpus."""
    ends = iter(itertools.pairwise(np.cumsum([FIRST_ID, *itertools.chain(*lengths)]).tolist()))
    return [[list(range(*next(ends))) for _ in of_source] for of_source in lengths]


def stores_of(folder: Path, documents: list[list[list[int]]]) -> list[Store]:
    for source, of_source in enumerate(documents):
        with StoreWriter(folder / str(source), 60_000, {"fingerprint": "f"}) as writer:
            for document in of_source:
                writer.add(document)
    return [Store(folder / str(source)) for source in range(len(documents))]


def data_of(lengths: list[list[int]], **knobs) -> DataConfig:
    names = "abc"[: len(lengths)]
    return DataConfig(
        sources=[SourceConfig(name=name, weight=1.0 + number) for number, name in enumerate(names)], **{"segment_tokens": T, **knobs}
    )


def planned(data: DataConfig, lengths: list[list[int]], seed: int = 0) -> Mixture:
    return compose_segments(data, [np.array(one, np.int32) for one in lengths], [None] * len(lengths), L0, seed)


def tokens_drawn_slowly(plan: Mixture, documents: list[list[list[int]]], window: str) -> Counter:
    """How often each token ought to come, from the documents that were drawn and the limits of their buckets alone."""
    counts: Counter = Counter()
    for of_source, rows_of, cells in zip(documents, plan.drawn, plan.cells, strict=True):
        for bucket, rows, cell in zip(plan.buckets, rows_of, cells, strict=True):
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
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_planned_token_comes_once_as_an_input_and_once_as_a_target(
    tmp_path_factory, lengths, align_sp, over_long, whole, budget, seed
):
    documents = documents_of(lengths)
    # The short bucket reaches past L0, so that short documents are cut too; the long one has what is longer.
    ranges = [BucketConfig(name="s", window=SHORT, to_tokens=20), BucketConfig(name="l", above_tokens=20)]
    data = data_of(
        lengths, align_sp=align_sp, over_long=over_long, short_tokens=budget, long_tokens=budget, buckets=ranges, max_repeats=1e6
    )
    try:
        plan = planned(data, lengths, seed)
    except UserError:
        assume(False)  # no document for one of the budgets
        return
    stores = stores_of(tmp_path_factory.mktemp("stores"), documents)
    after = {a: b for of_source in documents for document in of_source for a, b in itertools.pairwise(document)}
    for window in (SHORT, LONG):
        pieces = plan.tables[window]
        inputs, targets = Counter(), Counter()
        for segment in range(pieces.n_segments):
            batch = materialise(pieces, segment, stores, window, whole and window == LONG, PADDING)
            inputs.update(batch.tokens[batch.tokens != PADDING].tolist())
            targets.update(batch.labels[batch.labels != IGNORE].tolist())
        wanted = tokens_drawn_slowly(plan, documents, window)
        tail = wanted - inputs
        assert not inputs - wanted, "a token comes more often than its document was drawn"
        assert tail.total() < (T if window == LONG else 1), "more is lost than the last, incomplete long segment"
        assert targets == Counter({after[token]: count for token, count in inputs.items() if token in after})
        check_shards(pieces, window, 4 if align_sp == [2, 4] else align_sp)


def check_shards(pieces, window: str, shards: int) -> None:
    if window == SHORT:
        assert (pieces.offset // (T // shards) == (pieces.offset + pieces.stop - pieces.start - 1) // (T // shards)).all()
        assert ((pieces.stop - pieces.start) <= L0).all()


@given(corpora, st.sampled_from(list(OverLong)), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_report_counts_every_document_and_every_token(lengths, over_long, seed):
    ranges = [BucketConfig(name="s", window=SHORT, to_tokens=20), BucketConfig(name="l", above_tokens=20, to_tokens=100)]
    data = data_of(lengths, over_long=over_long, buckets=ranges, keep_below={"a": 0.5}, keep_below_tokens=10)
    plan = planned(data, lengths, seed)
    arrays, masks = [np.array(one, np.int32) for one in lengths], [None] * len(lengths)
    report = report_of(data, arrays, masks, plan)
    everything = sum(map(sum, lengths))
    lost = report["lost_tokens"]
    in_windows = sum(one["planned_tokens"] for one in report["windows"].values())
    assert in_windows == sum(pieces.tokens for pieces in plan.tables.values()) == sum(row["planned_tokens"] for row in report["cells"])
    assert in_windows + sum(lost.values()) + report["outside"]["tokens"] + report["left_out"]["tokens"] == everything
    assert report["outside"]["tokens"] == sum(length for one in lengths for length in one if length > 100)
    assert lost["dropped"] == (
        0 if over_long is not OverLong.drop else sum(n for one in lengths for n in one if 12 < n <= 20 or 48 < n <= 100)
    )
    n_pieces = sum(sum(one["documents_per_segment"]["segments"]) for one in report["windows"].values())
    assert n_pieces == sum(pieces.n_segments for pieces in plan.tables.values())
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
    data.buckets = [BucketConfig(name="m", to_tokens=60, weight=1), BucketConfig(name="l", above_tokens=60, to_tokens=300, weight=2)]
    plan = compose_segments(data, lengths, [None] * 3, L0, 0)
    report = report_of(data, lengths, [None] * 3, plan)
    targets = [[row["target_tokens"] for row in report[f"by_{what}"]] for what in ("bucket", "source")]
    np.testing.assert_allclose(targets[0], [150_000, 100_000, 200_000], atol=3)  # each of nine cells is a whole number
    np.testing.assert_allclose(targets[1], [75_000, 150_000, 225_000], atol=3)
    assert all(abs(row["error"]) < 0.005 for what in ("source", "bucket", "window") for row in report[f"by_{what}"])


def test_documents_that_are_not_usable_are_never_planned():
    lengths = [realistic(2_000, 0)]
    usable = np.random.default_rng(1).random(2_000) < 0.7
    plan = compose_segments(data_of([[]]), lengths, [usable], L0, 0)
    seen = np.unique(np.concatenate([pieces.document for pieces in plan.tables.values()]))
    assert usable[seen].all()
    assert set(np.flatnonzero(usable)) - set(seen) <= set(np.flatnonzero(lengths[0] > L0)), "all short ones are there"


def test_a_share_of_the_documents_below_a_length_is_kept_and_all_others():
    lengths = [realistic(20_000, 0), realistic(2_000, 1)]
    data = data_of([[]] * 2, keep_below={"a": 0.1}, keep_below_tokens=30)
    plan = compose_segments(data, lengths, [None, None], L0, 0)
    kept = np.concatenate([cell.document for cell in plan.cells[0]])
    below = lengths[0] < 30
    share = below[kept].sum() / below.sum()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / below.sum()), "four standard deviations of a tenth"
    assert np.setdiff1d(np.flatnonzero(~below), kept).size == 0
    assert sum(map(len, plan.cells[1])) == 2_000


@pytest.mark.parametrize(("keep", "words"), [({"z": 0.1}, "names z, and data.sources has a"), ({"a": 1.5}, "a=1.5 is not between 0 and 1")])
def test_a_share_to_keep_that_makes_no_sense_is_refused(keep, words):
    with pytest.raises(UserError, match=words):
        planned(data_of([[5]], keep_below=keep), [[5]])


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"long_tokens": -1}, "long_tokens=-1"), ({"max_repeats": 0.0}, "max_repeats"), ({"weights_of": WeightsOf.corpus}, "contradicts")],
)
def test_what_no_document_can_mend_is_refused_before_any_is_read(knobs, words):
    with pytest.raises(UserError, match=words):
        check(data_of([[5]], **knobs), L0)


def test_a_plan_depends_on_its_seed_and_on_nothing_else():
    lengths = [realistic(500, 0).tolist(), realistic(500, 1).tolist()]
    data = data_of(lengths, short_tokens=2_000, long_tokens=5_000)
    first, again, other = (planned(data, lengths, seed) for seed in (0, 0, 1))
    for window in (SHORT, LONG):
        columns = [[plan.tables[window].document.tolist(), plan.tables[window].offset.tolist()] for plan in (first, again, other)]
        assert columns[0] == columns[1] != columns[2]


def test_documents_of_all_lengths_and_sources_are_spread_over_the_segments():
    """No trend along the plan: the sources' shares of its first and second half agree within what chance makes of independent draws."""
    lengths = [realistic(8_000, seed) for seed in range(2)]
    plan = compose_segments(data_of([[]] * 2, align_sp=4), lengths, [None] * 2, L0, 0)
    for pieces in plan.tables.values():
        first = pieces.segment < pieces.n_segments // 2
        share = [(pieces.source[half] == 0).mean() for half in (first, ~first)]
        assert abs(share[0] - share[1]) < 5 * np.sqrt(0.5 / len(first)), (
            "five standard deviations of a share of half the pieces, in each half"
        )
