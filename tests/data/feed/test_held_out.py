"""Held-out segments: held-out documents in the form of training segments, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batches import labels_of

from lr2train.config import Config, SourceConfig
from lr2train.data.batch import IGNORE, LONG, SHORT, WINDOWS, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.feed.held_out import HeldOutSegments, _drawn
from lr2train.data.plan.packing import whole_documents
from lr2train.data.store import HOLDOUT
from lr2train.prepare import prepare

L0, T = 128, 512


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    made = Config(name="corpus", runs_folder=str(tmp_path_factory.mktemp("runs")))
    made.model.original_window_tokens = L0
    made.data.segment_tokens, made.data.vocab_size, made.data.holdout = T, 400, 0.2
    made.data.sources = [
        SourceConfig(name="modules", kind="stdlib", max_bytes=150_000),
        SourceConfig(name="definitions", kind="stdlib", max_bytes=60_000, options={"unit": "definition"}),
    ]
    prepare(made)
    return made


@pytest.fixture(scope="module")
def corpus(config) -> Corpus:
    return Corpus.open(Path(config.runs_folder) / "corpus")


def segments(corpus: Corpus, window: str, most: int = 6) -> HeldOutSegments:
    return HeldOutSegments(corpus, window, L0, T, most)


def targets(batches: list[Batch]) -> Counter[bytes]:
    """The segments that have targets, by content."""
    return Counter(batch.tokens.tobytes() + labels_of(batch).tobytes() for batch in batches if batch.n_target_tokens)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_divide_the_segments_of_one_rank(corpus, window, size):
    (alone,) = [segments(corpus, window).batches(0, 1, window == LONG)]
    assert len(alone) == 6
    by_rank = [segments(corpus, window).batches(rank, size, window == LONG) for rank in range(size)]
    assert {len(one) for one in by_rank} == {-(-6 // size)}
    assert targets([batch for one in by_rank for batch in one]) == targets(alone)
    assert all(batch.window == window and len(batch.tokens) == T for one in by_rank for batch in one)


def parts(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each document of a segment under the document mask."""
    labels = labels_of(batch)
    return [(batch.tokens[start:stop], labels[start:stop]) for start, stop in batch.spans]


def held_out_parts(corpus: Corpus, batches: list[Batch], limit: int) -> list[tuple[int, int]]:
    """Asserts that every part is a part of a held-out document, no part twice; returns (tokens, of a document of)."""
    held = corpus.documents(HOLDOUT)
    left = Counter(  # equal parts of equal documents are there twice
        (
            document[start : start + limit].tobytes(),
            document[start + limit : start + limit + 1].tobytes(),
            len(document),
        )
        for document in held
        for start in range(0, len(document), limit)
    )
    found = []
    for tokens, labels in (part for batch in batches for part in parts(batch)):
        assert labels[:-1].tolist() == tokens[1:].tolist()
        follows = b"" if labels[-1] == IGNORE else labels[-1:].astype(tokens.dtype).tobytes()
        (*_, key) = [key for key in left if key[:2] == (tokens.tobytes(), follows) and left[key]]
        left[key] -= 1
        found.append((len(tokens), key[2]))
    return found


def test_short_segments_hold_short_documents_first_and_then_parts_of_longer_ones(corpus):
    few, all_of_them = (segments(corpus, SHORT, most).batches(0, 1, False) for most in (2, 1000))
    assert all(tokens == document <= L0 for tokens, document in held_out_parts(corpus, few, L0))
    found = held_out_parts(corpus, all_of_them, L0)
    modules, definitions = corpus.manifest["windows"][SHORT]["sources"].values()
    assert modules["planned_tokens"] == 0 < definitions["planned_tokens"]
    lengths = corpus.stores(HOLDOUT)[1].lengths.tolist()
    assert max(lengths) > L0
    assert sorted(found) == sorted((min(L0, n - at), n) for n in lengths for at in range(0, n, L0))
    # Attention inside the documents needs no communication among up to T / L0 ranks that share a segment.
    assert all(start // L0 == (stop - 1) // L0 for batch in all_of_them for start, stop in batch.spans)


def test_long_segments_hold_long_documents_without_padding(corpus):
    for most in (3, 1000):
        chosen = segments(corpus, LONG, most)
        lengths = [len(document) for document in corpus.documents(HOLDOUT) if len(document) > L0]
        assert len(chosen.numbers) == min(most, sum(lengths) // T)
        for batch in chosen.batches(0, 1, False):
            assert sum(stop - start for start, stop in batch.spans) == T
            for tokens, _ in parts(batch):
                assert any(tokens.tobytes() in one.tobytes() for one in corpus.documents(HOLDOUT) if len(one) > L0)
    filled = [batch for batch in chosen.batches(0, 1, False) if batch.spans == ((0, T),)]
    assert len(filled) >= sum(length // T for length in lengths)
    assert {batch.spans for batch in chosen.batches(0, 1, True)} == {((0, T),)}


def test_another_start_reads_the_same_segments(corpus):
    again = Corpus.open(corpus.folder)
    for window in WINDOWS:
        first, second = (segments(one, window).batches(0, 1, False) for one in (corpus, again))
        assert targets(first) == targets(second)


def test_the_sources_have_their_shares_while_their_documents_last():
    source = np.repeat([0, 1, 2], [4000, 1000, 50])
    documents = whole_documents(source, np.arange(len(source)), np.full(len(source), 10))
    rng = np.random.default_rng(0)
    drawn = _drawn(documents, 5_000, np.array([0.6, 0.4, 0.0]), rng)
    tokens = np.bincount(drawn.source, weights=drawn.length, minlength=3)
    assert tokens.sum() == 5_000
    assert tokens[2] == 0
    assert tokens[1] / 5_000 == pytest.approx(0.4, abs=0.05)
    assert len(np.unique(drawn.document)) == len(drawn)
    assert _drawn(documents, 10**9, np.array([0.6, 0.4, 0.0]), rng).tokens == 50_000  # all that there is
    assert _drawn(documents, 10**9, np.zeros(3), rng).tokens == documents.tokens


def test_a_corpus_without_held_out_documents_has_no_segment(config):
    none = replace(config, name="none", data=replace(config.data, holdout=0.0))
    prepare(none)
    corpus = Corpus.open(Path(config.runs_folder) / "none")
    for window in WINDOWS:
        assert segments(corpus, window).batches(0, 2, True) == [*segments(corpus, window).numbers] == []
