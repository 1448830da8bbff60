"""Needle in a haystack: retrieval accuracy and answer perplexity by document length and needle depth (paper, Figure 6).

Accuracy is exact match of greedy decoding. It is read off one forward pass: if the most likely token is the right one at every answer
position given the right ones before, greedy decoding says exactly the answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lr2train.data.needles import NeedleDocument
from lr2train.evaluation.subject import Subject
from lr2train.model.score import Score, score


def scores(model: Any, rotary: Any, subject: Subject, documents: Sequence[NeedleDocument]) -> Iterator[tuple[NeedleDocument, Score]]:
    """Score every document's answers under the table that its length calls for."""
    for document in documents:
        yield document, score(model, rotary, subject.window(len(document.tokens)), document.tokens, document.answer_spans)


def cells(scored: Sequence[tuple[NeedleDocument, Score]]) -> list[dict[str, Any]]:
    """One row a (length, depth): accuracy (share of documents answered whole), answer perplexity, number of documents."""
    grouped: dict[tuple[int, float], list[Score]] = defaultdict(list)
    for document, one in scored:
        grouped[len(document.tokens), document.depth].append(one)
    return [
        {"length_tokens": length, "depth": depth, "accuracy": accuracy(group), "perplexity": perplexity(group), "documents": len(group)}
        for (length, depth), group in sorted(grouped.items())
    ]


def accuracy(group: Sequence[Score]) -> float:
    """Share of documents answered exactly."""
    return sum(one.exact for one in group) / len(group)


def perplexity(group: Sequence[Score]) -> float:
    """exp(mean nats per scored token); capped so that a hopeless model does not overflow."""
    return math.exp(min(math.fsum(one.nll for one in group) / sum(one.n_tokens for one in group), 700.0))
