"""Evaluation: scores against plain transformers; cells, accuracy and perplexity of hand-made scores."""

import math

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from lr2train.config import UserError
from lr2train.data.needles import NeedleDocument
from lr2train.evaluation import figures
from lr2train.evaluation.subject import Subject, open_model
from lr2train.model import score as score_module
from lr2train.model.score import Score, score
from lr2train.rope import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("world") / "exported", tiny.factors_with(1.2))


def subject_of(folder, switches: bool = True) -> Subject:
    return Subject("ours", folder, tiny.factors_with(1.2), switches)


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


def test_documents_are_scored_under_the_table_of_their_length(folder):
    model, table = open_model(subject_of(folder), "float32", "cpu")
    texts = [tokens_of(tiny.L0), tokens_of(tiny.L0 + 1)]
    found = [subject_of(folder).score_text(model, table, text) for text in texts]
    assert found == [
        score(model, table, window, text, [(1, len(text))])
        for window, text in zip(("short", "long"), texts, strict=True)
    ]
    answers = [[(len(text) - 3, len(text) - 1)] for text in texts]
    found = [subject_of(folder).score(model, table, text, spans) for text, spans in zip(texts, answers, strict=True)]
    assert found == [
        score(model, table, window, text, spans)
        for window, text, spans in zip(("short", "long"), texts, answers, strict=True)
    ]


# ---- figures of hand-made scores ----


def document(length: int, depth: float) -> NeedleDocument:
    return NeedleDocument(np.zeros(length, dtype=np.int64), ((length - 1, length),), depth, ("1",))


def test_a_cell_is_a_length_and_a_depth():
    scored = [
        (document(200, 0.5), Score((2 * math.log(3),), 2, True)),
        (document(100, 0.0), Score((math.log(2),), 1, True)),
        (document(200, 0.5), Score((math.log(9),), 1, False)),
        (document(100, 1.0), Score((0.0,), 4, False)),
    ]
    assert figures.cells(scored) == [
        {"length_tokens": 100, "depth": 0.0, "accuracy": 1.0, "perplexity": pytest.approx(2.0), "documents": 1},
        {"length_tokens": 100, "depth": 1.0, "accuracy": 0.0, "perplexity": 1.0, "documents": 1},
        {
            "length_tokens": 200,
            "depth": 0.5,
            "accuracy": 0.5,
            "perplexity": pytest.approx(81 ** (1 / 3)),
            "documents": 2,
        },
    ]


def test_perplexity_averages_over_tokens_and_not_over_documents():
    assert figures.perplexity([Score((math.log(16),), 1, True), Score((0.0,), 3, True)]) == pytest.approx(2.0)


def test_a_perplexity_too_large_for_a_float_is_capped():
    assert figures.perplexity([Score((1e9,), 1, False)]) == math.exp(700)
