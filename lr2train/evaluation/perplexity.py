"""Perplexity of held-out text by length: every token of a document is predicted from all before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lr2train.evaluation.subject import Subject
from lr2train.model.score import Score, score


def scores(model: Any, rotary: Any, subject: Subject, documents: Sequence[np.ndarray]) -> Iterator[tuple[int, Score]]:
    """(length, score) of each document, under the table that its length calls for."""
    for tokens in documents:
        yield len(tokens), score(model, rotary, subject.window(len(tokens)), tokens, [(1, len(tokens))])
