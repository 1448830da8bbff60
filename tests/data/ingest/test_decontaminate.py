"""Decontamination finds every n-gram that a text shares with an evaluation set, and nothing else."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import DecontaminateConfig
from lr2train.data.ingest.decontaminate import EvaluationNgrams


def slowly(text: str, evaluation: str, ngram: int) -> bool:
    """Whether two texts share a run of words."""
    words, theirs = text.split(), evaluation.split()
    runs = {tuple(theirs[i : i + ngram]) for i in range(len(theirs) - ngram + 1)}
    return any(tuple(words[i : i + ngram]) in runs for i in range(len(words) - ngram + 1))


letters = st.lists(st.sampled_from("abc"), min_size=1, max_size=40).map(" ".join)


@given(letters, letters, st.integers(1, 5))
@settings(max_examples=200)
def test_shared_ngrams_are_those_of_a_plain_search(tmp_path_factory, text, evaluation, ngram):
    if len(evaluation.split()) < ngram:
        return
    file = tmp_path_factory.mktemp("eval") / "a.txt"
    file.write_text(evaluation)
    found = EvaluationNgrams(DecontaminateConfig(files=[str(file)], ngram=ngram)).find(text)
    assert (found is not None) == slowly(text, evaluation, ngram)
    assert found is None or slowly(found, evaluation, ngram)


def test_short_records_are_compared_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(["one two three four five six seven eight nine", "too short to tell"]))
    contamination = EvaluationNgrams(DecontaminateConfig(files=[str(tmp_path / "a.jsonl")]))
    assert len(contamination) == 1
    shared = "one two three four five six seven eight nine"
    assert contamination.find("Zero: one, two; three four FIVE six-seven eight nine ten") == shared
    assert contamination.find("one two three four five six seven eight and nine") is None
    assert contamination.find("too short to tell") is None


def test_a_record_may_hold_line_ends_of_unicode(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"q": "one two three four\u2028five six\x85seven eight nine"}\n{"q": "short"}\n',
        encoding="utf-8",
    )
    contamination = EvaluationNgrams(DecontaminateConfig(files=[str(tmp_path / "a.jsonl")]))
    assert contamination.find("one two three four five six seven eight nine") is not None
