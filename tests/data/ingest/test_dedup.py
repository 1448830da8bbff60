"""Exact duplicates: found wherever they lie, the first one stays, and what is held out comes first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import Config, SourceConfig
from lr2train.data.corpus import Corpus
from lr2train.data.ingest import dedup
from lr2train.data.ingest.decontaminate import Contamination, DecontaminateConfig
from lr2train.prepare import prepare


@given(
    st.lists(st.binary(min_size=16, max_size=16).map(lambda one: bytes(15) + one[-1:] if one[0] % 2 else one[:1] + bytes(15)), max_size=30)
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_the_first_of_each_is_found(rows):
    hashes = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)
    assert dedup.first_of_each(hashes).tolist() == [rows.index(row) for row in rows]


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
def test_each_text_stays_once(runs, scope, kept):
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
        for source, document in zip(corpus.segment_table(window).source, corpus.segment_table(window).document, strict=True)
    }
    assert all(marks[source][document] for source, document in planned)
    tokens = sum(one["planned_tokens"] for one in result["windows"].values())
    assert 0 < tokens <= usable


def slowly(text: str, evaluation: str, ngram: int) -> bool:
    """Whether two texts share a run of words."""
    words, theirs = text.split(), evaluation.split()
    runs = {tuple(theirs[i : i + ngram]) for i in range(len(theirs) - ngram + 1)}
    return any(tuple(words[i : i + ngram]) in runs for i in range(len(words) - ngram + 1))


letters = st.lists(st.sampled_from("abc"), min_size=1, max_size=40).map(" ".join)


@given(letters, letters, st.integers(1, 5))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_shared_runs_are_found_as_slowly(tmp_path_factory, text, evaluation, ngram):
    if len(evaluation.split()) < ngram:
        return
    file = tmp_path_factory.mktemp("eval") / "a.txt"
    file.write_text(evaluation)
    found = Contamination(DecontaminateConfig(files=[str(file)], ngram=ngram)).find(text)
    assert (found is not None) == slowly(text, evaluation, ngram)
    assert found is None or slowly(found, evaluation, ngram)


def test_short_records_are_compared_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(["one two three four five six seven eight nine", "too short to tell"]))
    contamination = Contamination(DecontaminateConfig(files=[str(tmp_path / "a.jsonl")]))
    assert len(contamination) == 1
    assert contamination.find("Zero: one, two; three four FIVE six-seven eight nine ten") == "one two three four five six seven eight nine"
    assert contamination.find("one two three four five six seven eight and nine") is None
    assert contamination.find("too short to tell") is None


def test_a_record_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one two three four\u2028five six\x85seven eight nine"}\n{"q": "short"}\n', encoding="utf-8")
    contamination = Contamination(DecontaminateConfig(files=[str(tmp_path / "a.jsonl")]))
    assert contamination.find("one two three four five six seven eight nine") is not None
