"""Exact duplicates: the first document stays, and held-out documents come first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import Config, SourceConfig
from lr2train.data.corpus import Corpus
from lr2train.data.ingest import deduplicate
from lr2train.prepare import prepare


@given(
    st.lists(
        st.binary(min_size=16, max_size=16).map(
            lambda one: bytes(15) + one[-1:] if one[0] % 2 else one[:1] + bytes(15),
        ),
        max_size=30,
    )
)
@settings(max_examples=100)
def test_every_row_finds_its_first_equal(rows):
    hashes = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)
    assert deduplicate.first_of_each(hashes).tolist() == [rows.index(row) for row in rows]


def config(runs: Path, scope: str) -> Config:
    made = Config(name=scope, runs_folder=str(runs))
    made.model.original_window_tokens = 64
    made.data.segment_tokens, made.data.vocab_size, made.data.holdout, made.data.deduplicate = 128, 380, 0.25, scope
    made.data.workers, made.data.shard_bytes = 1, 1500
    made.data.sources = [SourceConfig(name=name, path=str(runs / f"{name}.jsonl")) for name in ("one", "two")]
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two sources of 60 documents: half of the second is the first's, and both repeat themselves."""
    folder = tmp_path_factory.mktemp("runs")
    for name, numbers in (("one", [i % 50 for i in range(60)]), ("two", [25 + i % 40 for i in range(60)])):
        lines = (json.dumps({"text": f"the text of number {number} " * 8}) for number in numbers)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(("scope", "kept"), [("none", 120), ("source", 90), ("corpus", 65)])
def test_each_text_stays_once_in_its_scope(runs, scope, kept):
    result = prepare(config(runs, scope))
    corpus = Corpus.open(runs / scope)
    texts: list[tuple[str, str]] = []
    for split in ("train", "holdout"):
        for store in corpus.stores(split):
            usable = np.ones(len(store), bool) if store.usable is None else store.usable
            texts += [(split, corpus.tokenizer.decode(store[int(i)][1:-1])) for i in np.flatnonzero(usable)]
    assert len(texts) == kept
    left_out = sum(source.get("duplicates", {"documents": 0})["documents"] for source in result["sources"])
    assert left_out == 120 - kept
    if scope == "corpus":
        assert len({text for _, text in texts}) == kept
        held = {text for split, text in texts if split == "holdout"}
        assert held.isdisjoint(text for split, text in texts if split == "train")
        example = result["sources"][1]["duplicates"]["examples"][0]
        assert set(example) == {"duplicate", "of"}


def test_duplicates_are_not_planned(runs):
    result = prepare(config(runs, "corpus"))
    corpus = Corpus.open(runs / "corpus")
    marks = [store.usable for store in corpus.stores() if store.usable is not None]
    assert len(marks) == len(corpus.stores())
    usable = sum(int(store.lengths[mark].sum()) for store, mark in zip(corpus.stores(), marks, strict=True))
    planned = {
        (int(source), int(document))
        for window in ("short", "long")
        for source, document in zip(
            corpus.segment_table(window).source, corpus.segment_table(window).document, strict=True
        )
    }
    assert all(marks[source][document] for source, document in planned)
    tokens = sum(one["planned_tokens"] for one in result["windows"].values())
    assert 0 < tokens <= usable
