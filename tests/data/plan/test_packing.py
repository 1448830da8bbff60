"""Packing: each token stands in one segment and is a target once, as a slow token-by-token packer has it.

Also: no short document crosses a sequence shard, lengths are mixed within a segment, and padding is small.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from batches import batch_of, labels_of, positions_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.data.batch import IGNORE
from lr2train.data.plan import packing, segment_table
from lr2train.data.store import SourceStore, StoreWriter

PADDING = 1
FIRST_ID = 10  # ids of document tokens are unique, so a token names its place in the corpus


def selection(lengths: list[int]) -> packing.Selection:
    return packing.whole_documents(np.zeros(len(lengths)), np.arange(len(lengths)), np.array(lengths, dtype=np.int64))


def unique_documents(lengths: list[int]) -> list[np.ndarray]:
    ends = FIRST_ID + np.cumsum([0, *lengths])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(ends)]


def store_of(folder, documents: list[np.ndarray]) -> SourceStore:
    with StoreWriter(folder / "s", 100_000, {"fingerprint": "f"}) as writer:
        for document in documents:
            writer.add(document)
    return SourceStore([folder / "s"])


def next_token(documents: list[np.ndarray]) -> dict[int, int]:
    return {int(a): int(b) for document in documents for a, b in itertools.pairwise(document)}


def best_fit_slowly(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin by best-fit decreasing, one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        best = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(best)
        rooms.append(best - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80), st.integers(16, 50))
@settings(max_examples=150)
def test_best_fit_over_counts_equals_one_document_at_a_time(lengths, capacity):
    bin_of = packing.best_fit(np.array(lengths), capacity)
    used = np.bincount(bin_of, weights=lengths).astype(int)
    assert sorted(capacity - used) == best_fit_slowly(lengths, capacity)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=60), st.sampled_from([1, 2, 4]), st.sampled_from([None, 0, 1]))
@settings(max_examples=60)
def test_short_segments_hold_each_token_once_inside_its_sequence_shard(tmp_path_factory, lengths, align_sp, seed):
    documents = unique_documents(lengths)
    store = store_of(tmp_path_factory.mktemp("short"), documents)
    rng = None if seed is None else np.random.default_rng(seed)
    table = packing.pack_short(selection(lengths), 48, align_sp, rng)
    assert table.n_segments <= -(-len(best_fit_slowly(lengths, 48 // align_sp)) // align_sp), (
        "more segments than best-fit"
    )
    target, seen = next_token(documents), []
    for segment in range(table.n_segments):
        batch = batch_of(table, segment, [store], "short", False, PADDING)
        labels, positions, inside = labels_of(batch), positions_of(batch), np.zeros(48, bool)
        for start, stop in batch.spans:
            inside[start:stop] = True
            assert start // (48 // align_sp) == (stop - 1) // (48 // align_sp), (
                "a document crosses a border between sequence shards"
            )
            assert positions[start:stop].tolist() == list(range(stop - start))
        seen += batch.tokens[inside].tolist()
        assert labels.tolist() == [
            target.get(token, IGNORE) if real else IGNORE
            for token, real in zip(batch.tokens.tolist(), inside, strict=True)
        ]
        assert (batch.tokens[~inside] == PADDING).all()
        assert (positions[~inside] == 0).all()
        assert batch.n_target_tokens == sum(label != IGNORE for label in labels.tolist())
    assert sorted(seen) == list(range(FIRST_ID, FIRST_ID + sum(lengths)))


@given(st.lists(st.integers(5, 70), min_size=1, max_size=30), st.sampled_from([16, 24]), st.booleans())
@settings(max_examples=80)
def test_long_segments_hold_whole_documents_first_and_then_follow_the_stream(
    tmp_path_factory, lengths, segment_tokens, whole
):
    documents = unique_documents(lengths)
    filled = [len(document) // segment_tokens * segment_tokens for document in documents]
    # Documents of a segment's length or more fill segments of their own; their rests and all other documents follow as
    # one stream.
    alone = [int(token) for document, stop in zip(documents, filled, strict=True) for token in document[:stop]]
    stream = alone + [
        int(token) for document, start in zip(documents, filled, strict=True) for token in document[start:]
    ]
    store = store_of(tmp_path_factory.mktemp("long"), documents)
    table = packing.pack_long(selection(lengths), segment_tokens)
    batches = [batch_of(table, segment, [store], "long", whole, PADDING) for segment in range(table.n_segments)]
    tokens = [token for batch in batches for token in batch.tokens.tolist()]
    n_full = len(stream) // segment_tokens * segment_tokens
    assert tokens == stream[:n_full]
    target = next_token(documents)
    assert [label for batch in batches for label in labels_of(batch).tolist()] == [
        target.get(token, IGNORE) for token in tokens
    ]
    for batch in batches:
        check_long_spans(batch, segment_tokens, whole, target)


def check_long_spans(batch, segment_tokens, whole, target):
    positions = positions_of(batch)
    if whole:
        assert batch.spans == ((0, segment_tokens),)
        assert positions.tolist() == list(range(segment_tokens))
        return
    assert batch.spans[0][0] == 0
    assert batch.spans[-1][1] == segment_tokens
    for start, stop in batch.spans:
        assert positions[start:stop].tolist() == list(range(stop - start))
        assert all(
            target[a] == b
            for a, b in zip(
                batch.tokens[start : stop - 1].tolist(), batch.tokens[start + 1 : stop].tolist(), strict=True
            )
        )


def test_each_token_but_the_first_is_a_target_once_even_where_a_document_is_cut(tmp_path):
    documents = unique_documents([40])
    table = packing.pack_long(selection([40]), 10)
    store = store_of(tmp_path, documents)
    labels = np.concatenate(
        [labels_of(batch_of(table, segment, [store], "long", True, PADDING)) for segment in range(4)]
    )
    assert labels.tolist() == [*documents[0][1:].tolist(), IGNORE]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 20))
@settings(max_examples=60)
def test_the_parts_of_split_documents_are_the_same_tokens_in_order(lengths, limit):
    parts = packing.split_short(selection(lengths), limit)
    assert parts.length.max() <= limit
    tokens = [
        (int(d), int(s) + i)
        for d, s, n in zip(parts.document, parts.start, parts.length, strict=True)
        for i in range(n)
    ]
    assert tokens == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert len(parts) == sum(-(-length // limit) for length in lengths), "only the last part of a document is not full"


def test_the_columns_of_a_segment_table_are_four_bytes_each():
    for table in (packing.pack_short(selection([5, 9, 3]), 16), packing.pack_long(selection([40, 9]), 16)):
        assert {getattr(table, column).dtype for column in segment_table.COLUMNS} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("align_sp", "shards"), [(1, 1), (8, 8), ([2, 8], 8), ([4, 6], 12)])
def test_several_sizes_of_sp_are_served_by_their_least_common_multiple(align_sp, shards):
    assert packing.sequence_shards(align_sp) == shards


@pytest.mark.parametrize("align_sp", [0, "8", [], [2, 0], 1.5, True])
def test_an_align_sp_that_is_no_number_of_sequence_shards_is_refused(align_sp):
    with pytest.raises(UserError, match=rf"data\.align_sp={re.escape(str(align_sp))} .*set it to 8"):
        packing.sequence_shards(align_sp)


@given(
    st.lists(st.integers(1, 16), max_size=80), st.integers(16, 50), st.integers(0, 99), st.sampled_from([0.0, 1.1, 9.0])
)
@settings(max_examples=150)
def test_bins_of_varied_lengths_hold_what_fits_and_are_numbered_without_gaps(lengths, capacity, seed, kept_back):
    bin_of = packing.varied_fit(np.array(lengths, np.int32), capacity, np.random.default_rng(seed), kept_back)
    assert len(bin_of) == len(lengths)
    used = np.bincount(bin_of, weights=lengths)
    assert ((used > 0) & (used <= capacity)).all()


@given(st.lists(st.integers(0, 20), max_size=20), st.lists(st.integers(1, 20), max_size=30))
@settings(max_examples=100)
def test_best_fit_fills_the_room_that_is_left_in_partly_filled_bins(rooms, lengths):
    bin_of = packing.best_fit(np.array(lengths, np.int32), 20, np.array(rooms, int))
    left = list(rooms)
    for length in sorted(lengths, reverse=True):  # one document at a time
        fitting = [room for room in left if room >= length]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else 20) - length)
    n_bins = max([len(rooms), *(bin_of + 1).tolist()])
    now = np.array([*rooms, *[20] * (n_bins - len(rooms))]) - np.bincount(bin_of, weights=lengths, minlength=n_bins)
    assert sorted(now.tolist()) == sorted(left)


@pytest.mark.parametrize("align_sp", [1, 8])
def test_documents_of_one_length_do_not_gather_in_a_segment(align_sp):
    """The mean length of a segment's documents varies about as in a random draw; best-fit's varies far more."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 40_000).astype(np.int64).clip(2, 1024)
    tight, varied = (
        packing.pack_short(selection(lengths), 8192, align_sp, rng) for rng in (None, np.random.default_rng(0))
    )
    assert varied.n_segments <= tight.n_segments + 1
    spread = [
        np.median(np.abs(np.bincount(one.segment) / len(lengths) * one.n_segments - 1)) for one in (tight, varied)
    ]
    # of a renewal process, normal
    by_chance = 0.6745 * np.sqrt(np.square(lengths.astype(float)).mean() / lengths.mean() / 8192)
    assert spread[1] < 1.5 * by_chance, "1.5, because the documents that fill gaps are not drawn at random"
    assert spread[0] > 2 * spread[1]
    steps = np.diff(varied.stop - varied.start)[np.diff(varied.segment) == 0]
    assert 0.9 < (steps < 0).sum() / (steps > 0).sum() < 1.1, "the documents of a sequence shard stand in falling order"


@pytest.mark.parametrize(
    ("align_sp", "words"),
    [(3, r"data\.segment_tokens=64 .* data\.align_sp"), (8, r"9 tokens .* set data\.align_sp to 7")],
)
def test_sequence_shards_that_cannot_hold_the_documents_are_refused(align_sp, words):
    with pytest.raises(UserError, match=words):
        packing.pack_short(selection([9]), 64, align_sp)


@pytest.mark.parametrize(("window", "align_sp"), [(8192, 1), (8192, 8), (8192, 16), (2048, 64)])
def test_realistic_documents_pad_less_than_three_thousandths(window, align_sp):
    lengths = np.random.default_rng(0).lognormal(6.5, 1, 300_000).astype(np.int64)
    lengths = lengths[lengths <= window]
    table = packing.pack_short(selection(lengths), 131072, align_sp, np.random.default_rng(0))
    assert table.tokens == lengths.sum()
    assert table.padding_share < 0.003  # two thousandths for variety, and the rest of best-fit


@given(st.lists(st.integers(5, 40), min_size=1, max_size=12), st.sampled_from(["short", "long"]), st.integers(0, 10**6))
@settings(max_examples=40)
def test_only_learned_tokens_are_targets_where_a_store_names_them(tmp_path_factory, lengths, window, seed):
    rng = np.random.default_rng(seed)
    documents, chosen = unique_documents(lengths), set()
    prefix = tmp_path_factory.mktemp("chosen") / "one"
    with StoreWriter(prefix, 60_000, {"fingerprint": "x"}) as writer:
        for document in documents:
            start, stop = sorted(rng.choice(len(document) + 1, 2, replace=False).tolist())
            writer.add(document, [(start, stop)])
            chosen |= set(document[start:stop].tolist())
    documents_of = selection(lengths)
    table = packing.pack_short(documents_of, 48) if window == "short" else packing.pack_long(documents_of, 16)
    target = next_token(documents)
    for segment in range(table.n_segments):
        batch = batch_of(table, segment, [SourceStore([prefix])], window, False, PADDING)
        labels = labels_of(batch)
        for token, label in zip(batch.tokens.tolist(), labels.tolist(), strict=True):
            following = target.get(token)
            assert label == (following if following in chosen else IGNORE)
        assert batch.n_target_tokens == int((labels != IGNORE).sum())


def test_a_documents_last_token_may_stand_alone_in_a_store_that_names_learned_tokens(tmp_path):
    """17 tokens fill a segment of 16, and the last token goes into the stream, where it predicts nothing."""
    documents = unique_documents([17, 31])
    with StoreWriter(tmp_path / "s", 60_000, {"fingerprint": "x"}) as writer:
        for document in documents:
            writer.add(document, [(0, len(document))])
    table = packing.pack_long(selection([17, 31]), 16)
    batch = batch_of(table, 2, [SourceStore([tmp_path / "s"])], "long", False, PADDING)
    assert batch.spans == ((0, 1), (1, 16))
    assert batch.tokens.tolist() == [documents[0][-1], *documents[1][16:]]
    assert labels_of(batch).tolist() == [IGNORE, *documents[1][17:], IGNORE]
