"""Evaluation: scores against plain transformers; cells, accuracy and perplexity of hand-made scores."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lr2train.config import EvalConfig, NeedleConfig, UserError
from lr2train.evaluation import figures
from lr2train.evaluation.needles import NeedleTask, buckets
from lr2train.evaluation.request import Answer, Likelihood, Sample
from lr2train.evaluation.subject import Subject, install, with_factors
from lr2train.model import load
from lr2train.model import score as score_module
from lr2train.model.score import score
from lr2train.rope import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("world") / "exported", tiny.factors_with(1.2))


def subject_of(folder, switches: bool = True) -> Subject:
    return with_factors("ours", folder, tiny.factors_with(1.2), switches, {})


def open_model(subject: Subject, dtype: str, device: str):
    """The subject's model with its factors installed, and the rotary module."""
    model = load.load_whole(subject.folder, dtype, device, subject.overrides)
    return model, install(subject, model)


def tokens_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(2, tiny.VOCAB, length)


@torch.no_grad()
def plain_losses(folder, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll of each token but the first, whether it is the likeliest) in plain transformers, fp64, long window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    logits, ids = model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1), torch.from_numpy(tokens)[1:]
    return -logits.gather(1, ids[:, None])[:, 0], logits.argmax(-1) == ids


def test_a_score_is_the_sum_over_the_spans_in_plain_transformers(folder, monkeypatch):
    monkeypatch.setattr(score_module, "CHUNK", 7)
    model, table = open_model(subject_of(folder), "float32", "cpu")
    tokens, spans = tokens_of(150), [(1, 4), (60, 75), (149, 150)]
    losses, _ = plain_losses(folder, tokens)
    found = score(model, table, "long", tokens, spans)
    expected = sum(losses[start - 1 : stop - 1].sum().item() for start, stop in spans)
    assert found.nll == pytest.approx(expected, rel=1e-4)  # fp32 against fp64
    assert found.n_tokens == 19
    assert score(model, table, "short", tokens, spans).nll != pytest.approx(expected, rel=1e-2), "the window matters"


def test_a_score_is_exact_where_greedy_decoding_produces_every_token(folder):
    model, table = open_model(subject_of(folder), "float32", "cpu")
    tokens = tokens_of(100)
    for at in (97, 98, 99):  # the answer becomes the most likely text, token by token
        tokens[at] = model_says(model, table, tokens[:at])
    assert score(model, table, "long", tokens, [(97, 100)]).exact
    tokens[98] = (tokens[98] + 1) % tiny.VOCAB
    assert not score(model, table, "long", tokens, [(97, 99)]).exact
    assert score(model, table, "long", tokens, [(97, 98)]).exact


@torch.no_grad()
def model_says(model, table, tokens: np.ndarray) -> int:
    table.window = "long"
    return int(model(torch.from_numpy(tokens)[None]).logits[0, -1].argmax())


def test_other_factors_change_the_long_table_alone(folder):
    model, table = open_model(subject_of(folder), "float32", "cpu")
    tokens, before = tokens_of(100), {}
    for window in ("short", "long"):
        before[window] = score(model, table, window, tokens, [(50, 100)]).nll
    table.use(METHODS["pi"](tiny.SPECTRUM, tiny.L))
    assert score(model, table, "short", tokens, [(50, 100)]).nll == before["short"]
    assert score(model, table, "long", tokens, [(50, 100)]).nll != before["long"]
    table.use(tiny.factors_with(1.2))
    assert score(model, table, "long", tokens, [(50, 100)]).nll == before["long"]


def test_nothing_to_score_is_an_error(folder):
    model, table = open_model(subject_of(folder), "float32", "cpu")
    with pytest.raises(UserError, match="no token to score"):
        score(model, table, "long", tokens_of(20), [])
    with pytest.raises(AssertionError, match="nothing before it"):
        score(model, table, "long", tokens_of(20), [(0, 3)])


def test_the_length_chooses_the_table(folder):
    switching, published = subject_of(folder), subject_of(folder, switches=False)
    assert [switching.window(n) for n in (1, tiny.L0, tiny.L0 + 1, tiny.L)] == ["short", "short", "long", "long"]
    assert {published.window(n) for n in (1, tiny.L0, tiny.L)} == {"long"}


# ---- figures of hand-made scores ----


def answered(length: int, depth: float, nlls: tuple[float, ...], right: tuple[int, ...], n_tokens: int = 1):
    """A needle document whose spans have ``n_tokens`` each, and its answer."""
    spans = tuple((length - n_tokens * (number + 1), length - n_tokens * number) for number in range(len(nlls)))
    sample = Sample("needles", 0, Likelihood(np.zeros(length, np.int64), spans), ("1",), length, {"depth": depth})
    return sample, Answer("long", nlls=nlls, right=right)


@pytest.mark.parametrize(
    ("questions", "chains", "right", "grades"),
    [
        (1, 0, (2,), {"exact": 100.0, "recall": 100.0}),
        (1, 0, (1,), {"exact": 0.0, "recall": 50.0}),
        (2, 0, (2, 1), {"exact": 50.0, "recall": 75.0, "all": 0.0}),
        (1, 1, (2, 2), {"exact": 100.0, "recall": 100.0, "all": 100.0, "pairs": 100.0, "chains": 100.0}),
        (3, 1, (2, 0, 2, 1), {"exact": 50.0, "recall": 62.5, "all": 0.0, "pairs": 200 / 3, "chains": 0.0}),
    ],
)
def test_a_document_is_graded_answer_by_answer(questions, chains, right, grades):
    """Two tokens an answer; the answers of chains are the last."""
    task = NeedleTask(EvalConfig(questions=questions, chains=chains), NeedleConfig(), None, [])
    sample, answer = answered(100, 0.5, (0.0,) * len(right), right, 2)
    assert task.grade(sample, answer) == pytest.approx(grades)
    assert task.measures == tuple(grades)


def test_a_cell_is_a_length_and_a_depth():
    scored = [
        answered(200, 0.5, (2 * math.log(3),), (2,), 2),
        answered(100, 0.0, (math.log(2),), (1,)),
        answered(200, 0.5, (math.log(9), 0.0), (0, 1)),
        answered(100, 1.0, (0.0,), (3,), 4),
    ]
    assert figures.cells(scored) == [
        {"length_tokens": 100, "depth": 0.0, "accuracy": 1.0, "recall": 1.0, "perplexity": pytest.approx(2.0),
         "documents": 1},
        {"length_tokens": 100, "depth": 1.0, "accuracy": 0.0, "recall": 0.75, "perplexity": 1.0, "documents": 1},
        {"length_tokens": 200, "depth": 0.5, "accuracy": pytest.approx(2 / 3), "recall": 0.75,
         "perplexity": pytest.approx(3.0), "documents": 2},
    ]  # fmt: skip


def test_perplexity_averages_over_tokens_and_not_over_documents():
    found = [answered(100, 0.0, (math.log(16),), (1,)), answered(100, 0.0, (0.0,), (3,), 3)]
    assert figures.perplexity(found) == pytest.approx(2.0)


def test_perplexity_by_position_is_of_the_longest_texts():
    def text(length: int, nats: float):
        spans = buckets(length)
        nlls = tuple(nats * (index + 1) * (stop - start) for index, (start, stop) in enumerate(spans))
        return Sample("text", 0, Likelihood(np.zeros(length, np.int64), spans), (), length), Answer("long", nlls=nlls)

    found = figures.by_position([text(600, 1.0), text(600, 3.0), text(300, 9.0)])
    assert [(row["first"], row["stop"]) for row in found] == [(1, 256), (256, 512), (512, 600)]
    assert [math.log(row["perplexity"]) for row in found] == pytest.approx([2.0, 4.0, 6.0])


@given(st.integers(2, 5000))
def test_buckets_of_positions_cover_a_text_but_its_first_token(length):
    found = buckets(length)
    assert [position for start, stop in found for position in range(start, stop)] == list(range(1, length))
    assert all(stop - start <= max(256, start) for start, stop in found)


def test_a_perplexity_too_large_for_a_float_is_capped():
    assert figures.perplexity([answered(10, 0.0, (1e9,), (0,))]) == math.exp(700)
