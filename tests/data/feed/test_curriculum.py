"""Curriculum batches: exact labels for each kind of row, shares of kinds, independence of ranks, refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from batches import labels_of, positions_of

from lr2train.config import Config, NeedleConfig, SourceConfig, StageConfig, UserError
from lr2train.data.batch import IGNORE
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.prepare import prepare

REPEATS, NEEDLES, TEXT = ({"repeats": 1.0}, {"needles": 1.0}, {"text": 1.0})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = Config(name="corpus", runs_folder=str(tmp_path_factory.mktemp("runs")))
    config.model.original_window_tokens = 128
    config.data.segment_tokens, config.data.vocab_size = 512, 400
    config.data.needles = NeedleConfig(wording="code", digits=4, max_pairs=3, max_questions=2)
    config.data.sources = [SourceConfig(name="modules", kind="stdlib", max_bytes=60_000)]
    prepare(config)
    return replace(config.data, path=f"{config.runs_folder}/corpus", kind="curriculum")


def loader(data, *stages: StageConfig, rank: int = 0, size: int = 1, seed: int = 0, window: int = 128):
    return make_loader(Corpus.open(data.path), replace(data, stages=list(stages)), seed, rank, size, 4, window, 512)


def rows(batch, length: int):
    n = len(batch.spans)
    return batch.tokens[: n * length].reshape(n, length), labels_of(batch)[: n * length].reshape(n, length)


def assert_spans(batch, length: int):
    n, labels, positions = 512 // length, labels_of(batch), positions_of(batch)
    assert batch.spans == tuple((i * length, (i + 1) * length) for i in range(n))
    assert batch.window == "short"
    assert positions[: n * length].tolist() == list(range(length)) * n
    assert (labels[n * length :] == IGNORE).all()
    assert (positions[n * length :] == 0).all()
    assert batch.n_target_tokens == (labels != IGNORE).sum()


@pytest.mark.parametrize("length", [32, 33, 100])
def test_repeats_are_targets_from_the_second_time_on(data, length):
    (batch, *_) = loader(data, StageConfig(steps=1, length_tokens=length, **REPEATS)).batches(0)
    assert_spans(batch, length)
    tokens, labels = rows(batch, length)
    assert (tokens[:, 0] == 0).all()
    assert tokens[:, 1:].min() > 1
    periods = set()
    for row, targets in zip(tokens[:, 1:], labels, strict=True):
        # a smaller period fits by chance only in very short rows
        period = next(p for p in range(2, length) if (row[p:] == row[:-p]).all())
        assert length // 8 <= period <= length // 2
        periods.add(period)
        # Position t predicts token t + 1 of the row, which is token t of the body: known after a whole period and one
        # token.
        assert targets.tolist() == [IGNORE] * (period + 1) + row[period + 1 :].tolist() + [IGNORE]
    assert len(periods) > 1 or len(tokens) == 1


def test_text_rows_are_crops_of_training_documents(data):
    (batch, *_) = loader(data, StageConfig(steps=1, length_tokens=64, **TEXT)).batches(0)
    assert_spans(batch, 64)
    tokens, labels = rows(batch, 64)
    assert (labels[:, :-1] == tokens[:, 1:]).all()
    assert (labels[:, -1] == IGNORE).all()
    assert (tokens[:, 0] == 0).all()
    documents = [document[1:-1].tobytes() for document in Corpus.open(data.path).documents("train")]
    assert all(any(row[1:].astype(np.uint16).tobytes() in document for document in documents) for row in tokens)


@pytest.mark.parametrize(("kind", "fewest", "most"), [("needles", 1, 2), ("dense", 2, 12)])
def test_needle_rows_ask_for_hidden_pairs_and_answers_alone_are_targets(data, kind, fewest, most):
    corpus = Corpus.open(data.path)
    stage = StageConfig(steps=1, length_tokens=96, **{kind: 1.0})
    asked = []
    for batch in loader(data, stage).batches(0):
        assert_spans(batch, 96)
        for row, targets in zip(*rows(batch, 96), strict=True):
            text = corpus.tokenizer.decode(row[1:])
            known = np.flatnonzero(targets != IGNORE)
            assert (targets[known] == row[known + 1]).all()
            answers = re.findall(r"\d{4}", corpus.tokenizer.decode(targets[known]))
            assert 4 * len(answers) == len(corpus.tokenizer.decode(targets[known]).replace(" ", ""))
            questions = re.findall(r"\n(\w+ = \d{4})(?=\n|$)", text)[-len(answers) :]
            assert [question[-4:] for question in questions] == answers
            assert all(text.count(question) == 2 for question in questions)
            asked.append(len(answers))
    assert fewest <= min(asked) <= max(asked) <= most


def test_chain_rows_ask_for_every_chain_and_one_pair(data):
    corpus, hops = Corpus.open(data.path), 2
    data = replace(data, needles=replace(data.needles, hops=hops))
    asked = []
    for batch in loader(data, StageConfig(steps=1, length_tokens=256, chains=1.0), window=256).batches(0):
        assert_spans(batch, 256)
        for row, targets in zip(*rows(batch, 256), strict=True):
            known = np.flatnonzero(targets != IGNORE)
            ranges = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
            answers = [corpus.tokenizer.decode(row[one + 1]).strip() for one in ranges]
            assert [answer.count(" = ") for answer in answers] == [0] + [hops] * (len(answers) - 1)
            text = corpus.tokenizer.decode(row[1 : ranges[0][0]])
            for answer in answers[1:]:
                *names, number = answer.split(" = ")
                assert all(f"{name} = " in text for name in names)
                assert f"{names[-1]} = {number}\n" in text
                assert f" = {names[0]}\n" in text
            asked.append(len(answers) - 1)
    assert min(asked) >= 1


def test_shares_hold_in_each_batch(data):
    stage = StageConfig(steps=1, length_tokens=32, repeats=0.5, needles=0.0, text=0.5)
    for batch in loader(data, stage).batches(0):
        _, labels = rows(batch, 32)
        assert 7 <= int((labels[:, 0] == IGNORE).sum()) <= 9


def test_stages_follow_each_other_and_the_last_goes_on(data):
    made = loader(
        data, StageConfig(steps=2, length_tokens=32, **REPEATS), StageConfig(steps=3, length_tokens=64, **TEXT)
    )
    assert made.steps_per_epoch == 5
    assert [made.batches(step)[0].spans[0][1] for step in (0, 1, 2, 4, 5, 99)] == [32, 32, 64, 64, 64, 64]


def test_batches_do_not_depend_on_the_number_of_ranks(data):
    stage = StageConfig(steps=9, length_tokens=64, repeats=1.0, needles=1.0, text=1.0)
    alone = loader(data, stage)
    whole = {batch.tokens.tobytes() for batch in alone.batches(3)}
    assert whole == {batch.tokens.tobytes() for batch in loader(data, stage).batches(3)}
    assert len(whole) == 4
    assert whole == {
        batch.tokens.tobytes() for rank in range(2) for batch in loader(data, stage, rank=rank, size=2).batches(3)
    }
    assert whole.isdisjoint(batch.tokens.tobytes() for batch in alone.batches(4))
    assert whole.isdisjoint(batch.tokens.tobytes() for batch in loader(data, stage, seed=1).batches(3))
    assert alone.fingerprint == loader(data, stage, rank=1, size=2).fingerprint


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (r"data\.stages .*length_tokens=256, .*128", StageConfig(steps=1, length_tokens=256, **TEXT)),
        (r"data\.stages\[0\] .*steps=0", StageConfig(steps=0, length_tokens=64, **TEXT)),
        (r"data\.stages\[0\] .*length_tokens=4;", StageConfig(steps=1, length_tokens=4, **TEXT)),
        (r"data\.stages\[0\] .*repeats=0\.0.* set one above 0", StageConfig(steps=1, length_tokens=64)),
        (
            r"data\.stages\[0\]\.length_tokens=12 .*data\.needles\.wording=code",
            StageConfig(steps=1, length_tokens=12, **NEEDLES),
        ),
        (
            r"data\.stages\[0\]\.length_tokens=100 .*chain of 2 needles .*data\.needles\.hops",
            StageConfig(steps=1, length_tokens=100, chains=1.0),
        ),
    ],
)
def test_a_stage_that_cannot_be_made_is_refused_before_training(data, words, stage):
    with pytest.raises(UserError, match=words):
        loader(data, stage)


def test_no_stages_is_an_error(data):
    with pytest.raises(UserError, match=r"data\.stages is empty"):
        loader(data)
