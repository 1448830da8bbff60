"""The plan keeps every token: compared with a slow planner that moves token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import OverLong, UserError
from lr2train.data import buckets, packing
from lr2train.data.batch import IGNORE
from lr2train.data.buckets import Selection
from lr2train.data.loader import materialise
from lr2train.data.store import Store, StoreWriter

PADDING = 1
FIRST_ID = 10  # ids of document tokens are unique, so a token names its place in the corpus


def selection(lengths: list[int]) -> Selection:
    return Selection(np.zeros(len(lengths), np.int16), np.arange(len(lengths)), np.array(lengths, dtype=np.int64))


def unique_documents(lengths: list[int]) -> list[np.ndarray]:
    ends = FIRST_ID + np.cumsum([0, *lengths])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(ends)]


def store_of(folder, documents: list[np.ndarray]) -> Store:
    with StoreWriter(folder / "s", 100_000, {"fingerprint": "f"}) as writer:
        for document in documents:
            writer.add(document)
    return Store(folder / "s")


def next_token(documents: list[np.ndarray]) -> dict[int, int]:
    return {int(a): int(b) for document in documents for a, b in itertools.pairwise(document)}


def best_fit_slowly(lengths: list[int], capacity: int) -> list[int]:
    """Room used in each bin by best-fit decreasing, one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        best = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(best)
        rooms.append(best - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80), st.integers(16, 50))
@settings(max_examples=150, deadline=None)
def test_best_fit_over_counts_equals_one_document_at_a_time(lengths, capacity):
    bin_of = packing.best_fit(np.array(lengths), capacity)
    used = np.bincount(bin_of, weights=lengths).astype(int)
    assert sorted(capacity - used) == best_fit_slowly(lengths, capacity)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=60), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_short_segments_hold_every_token_once_inside_its_shard(tmp_path_factory, lengths, align_sp):
    documents = unique_documents(lengths)
    store = store_of(tmp_path_factory.mktemp("short"), documents)
    pieces = packing.pack_short(selection(lengths), 48, align_sp)
    target, seen = next_token(documents), []
    for segment in range(pieces.n_segments):
        batch = materialise(pieces, segment, [store], "short", False, PADDING)
        inside = np.zeros(48, bool)
        for start, stop in batch.spans:
            inside[start:stop] = True
            assert start // (48 // align_sp) == (stop - 1) // (48 // align_sp), "a document crosses a shard's border"
            assert batch.positions[start:stop].tolist() == list(range(stop - start))
        seen += batch.tokens[inside].tolist()
        assert batch.labels.tolist() == [
            target.get(token, IGNORE) if real else IGNORE for token, real in zip(batch.tokens.tolist(), inside, strict=True)
        ]
        assert (batch.tokens[~inside] == PADDING).all()
        assert (batch.positions[~inside] == 0).all()
        assert batch.n_target_tokens == sum(label != IGNORE for label in batch.labels.tolist())
    assert sorted(seen) == list(range(FIRST_ID, FIRST_ID + sum(lengths)))


@given(st.lists(st.integers(5, 70), min_size=1, max_size=30), st.sampled_from([16, 24]), st.sampled_from(list(OverLong)), st.booleans())
@settings(max_examples=80, deadline=None)
def test_long_segments_hold_whole_documents_first_and_then_follow_the_stream(tmp_path_factory, lengths, segment_tokens, over_long, whole):
    documents = unique_documents(lengths)
    kept = [document for document in documents if over_long is not OverLong.drop or len(document) <= segment_tokens]
    kept = [document[:segment_tokens] if over_long is OverLong.truncate else document for document in kept]
    filled = [len(document) // segment_tokens * segment_tokens for document in kept]
    # Documents of a segment's length or more fill segments of their own; what is left of them and all others follow as one stream.
    alone = [int(token) for document, stop in zip(kept, filled, strict=True) for token in document[:stop]]
    stream = alone + [int(token) for document, start in zip(kept, filled, strict=True) for token in document[start:]]
    store = store_of(tmp_path_factory.mktemp("long"), documents)
    pieces, lost = packing.pack_long(selection(lengths), segment_tokens, over_long)
    batches = [materialise(pieces, segment, [store], "long", whole, PADDING) for segment in range(pieces.n_segments)]
    tokens = [token for batch in batches for token in batch.tokens.tolist()]
    n_full = len(stream) // segment_tokens * segment_tokens
    assert tokens == stream[:n_full]
    assert lost.tail == len(stream) - n_full
    assert lost.tail + lost.truncated + lost.dropped + len(tokens) == sum(lengths)
    target = next_token(documents)
    assert [label for batch in batches for label in batch.labels.tolist()] == [target.get(token, IGNORE) for token in tokens]
    for batch in batches:
        check_long_spans(batch, segment_tokens, whole, target)


def check_long_spans(batch, segment_tokens, whole, target):
    if whole:
        assert batch.spans == ((0, segment_tokens),)
        assert batch.positions.tolist() == list(range(segment_tokens))
        return
    assert batch.spans[0][0] == 0
    assert batch.spans[-1][1] == segment_tokens
    for start, stop in batch.spans:
        assert batch.positions[start:stop].tolist() == list(range(stop - start))
        assert all(
            target[a] == b for a, b in zip(batch.tokens[start : stop - 1].tolist(), batch.tokens[start + 1 : stop].tolist(), strict=True)
        )


def test_every_token_but_the_first_is_a_target_once_even_where_a_document_is_cut(tmp_path):
    documents = unique_documents([40])
    pieces, _ = packing.pack_long(selection([40]), 10)
    store = store_of(tmp_path, documents)
    labels = np.concatenate([materialise(pieces, segment, [store], "long", True, PADDING).labels for segment in range(4)])
    assert labels.tolist() == [*documents[0][1:].tolist(), IGNORE]


def test_documents_sort_by_the_original_window():
    short, long = buckets.sort_by_window([np.array([512, 513, 3]), np.array([600], np.int32)], 512)
    assert [one.document.tolist() for one in short] == [[0, 2], []]
    assert [one.document.tolist() for one in long] == [[1], [0]]


@given(st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=20), min_size=2, max_size=3), st.integers(1, 3000), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_met_by_each_source_within_one_document(lengths, budget, seed):
    parts = [Selection(np.full(len(one), number, np.int16), np.arange(len(one)), np.array(one)) for number, one in enumerate(lengths)]
    weights = [1.0, 3.0, 0.5][: len(parts)]
    drawn = buckets.draw(parts, weights, budget, np.random.default_rng(seed))
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        share, mine = budget * weight / sum(weights), drawn.take(drawn.source == number)
        assert share <= mine.tokens < share + part.length.max()
        times = np.bincount(mine.document, minlength=len(part))
        assert times.max() - times.min() <= 1, "a document comes again before all others came"


def test_without_a_budget_every_document_comes_once():
    drawn = buckets.draw([selection([3, 4]), selection([5])], [0.1, 9.0], 0, np.random.default_rng(0))
    assert sorted(drawn.length.tolist()) == [3, 4, 5]


@pytest.mark.parametrize(("align_sp", "words"), [(3, "not divisible"), (8, "does not fit a shard")])
def test_shards_that_cannot_hold_documents_are_refused(align_sp, words):
    with pytest.raises(UserError, match=words):
        packing.pack_short(selection([9]), 64, align_sp)


def test_millions_of_documents_are_planned_in_seconds():
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64).clip(2, 8192)
    documents = Selection(np.zeros(len(lengths), np.int16), np.arange(len(lengths)), lengths)
    pieces = packing.pack_short(documents, 131072, 16)
    assert pieces.tokens == lengths.sum()
    assert pieces.padding_share < 0.001


@given(st.lists(st.integers(5, 40), min_size=1, max_size=12), st.sampled_from(["short", "long"]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_only_chosen_tokens_are_targets_where_a_store_says_so(tmp_path_factory, lengths, window, seed):
    rng = np.random.default_rng(seed)
    documents, chosen = unique_documents(lengths), set()
    prefix = tmp_path_factory.mktemp("chosen") / "one"
    with StoreWriter(prefix, 60_000, {"fingerprint": "x"}) as writer:
        for document in documents:
            start, stop = sorted(rng.choice(len(document) + 1, 2, replace=False).tolist())
            writer.add(document, [(start, stop)])
            chosen |= set(document[start:stop].tolist())
    documents_of = selection(lengths)
    pieces = packing.pack_short(documents_of, 48) if window == "short" else packing.pack_long(documents_of, 16)[0]
    target = next_token(documents)
    for segment in range(pieces.n_segments):
        batch = materialise(pieces, segment, [Store(prefix)], window, False, PADDING)
        for token, label in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            following = target.get(token)
            assert label == (following if following in chosen else IGNORE)
        assert batch.n_target_tokens == int((batch.labels != IGNORE).sum())
