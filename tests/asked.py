"""A tiny model that answers requests, for tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from lr2train.evaluation.answers import Answers
from lr2train.evaluation.request import Generate, Likelihood
from lr2train.evaluation.subject import Subject, install, with_factors
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.evaluation.window_model import WindowModel
from lr2train.model import load


def world(folder: Path) -> Path:
    """A model folder with a tokenizer, windows 64 -> 256."""
    corpus = tiny.make_corpus(folder)
    model = tiny.make_model(folder / "model", tiny.factors_with(1.2))
    for file in (corpus / "tokenizer").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    return model


def subject_of(model: Path) -> Subject:
    return with_factors("ours", model, tiny.factors_with(1.2), True, {})


def window_model(model: Path, **how) -> WindowModel:
    """``how``: batch_tokens and the like."""
    subject = subject_of(model)
    loaded, tokenizer = load.load_whole(model), PromptTokenizer.of(model)
    return WindowModel(subject, loaded, install(subject, loaded), tokenizer, {1}, **how)


def answers_of(model: Path, journal: Path, **how) -> Answers:
    return Answers(lambda: window_model(model, **how), subject_of(model).identity("float32"), journal, tiny.L)


def requests(n: int = 12) -> list[Generate | Likelihood]:
    """Texts of many lengths, on both sides of L0, of both kinds."""
    rng = np.random.default_rng(0)
    found: list[Generate | Likelihood] = []
    for number in range(n):
        tokens = rng.integers(2, tiny.VOCAB, int(rng.integers(5, 120)))
        if number % 2:
            found.append(Generate(tokens, int(rng.integers(1, 12))))
        else:
            found.append(Likelihood(tokens, ((len(tokens) - 3, len(tokens)), (1, 2))))
    return found
