"""Figures from scores: needle accuracy by length and depth (paper, Figure 6), answer perplexity and text perplexity.

Accuracy is exact match of greedy decoding, read off one forward pass. If the most likely token is the right one at
every answer position, given the right tokens before it, greedy decoding produces the answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lr2train.data.needles import NeedleDocument
from lr2train.model.score import Score


def cells(scored: Sequence[tuple[NeedleDocument, Score]]) -> list[dict[str, Any]]:
    """One row for each (length, depth): accuracy, answer perplexity and number of documents."""
    grouped: dict[tuple[int, float], list[Score]] = defaultdict(list)
    for document, one in scored:
        grouped[len(document.tokens), document.depth].append(one)
    return [
        {
            "length_tokens": length,
            "depth": depth,
            "accuracy": accuracy(group),
            "perplexity": perplexity(group),
            "documents": len(group),
        }
        for (length, depth), group in sorted(grouped.items())
    ]


def by_length(needles: Sequence[tuple[int, Score]], texts: Sequence[tuple[int, Score]]) -> list[dict[str, Any]]:
    """One row for each length, over all depths; ``needles`` and ``texts`` are (length, score) pairs."""
    rows = []
    for length in sorted({length for length, _ in needles}):
        answers = [one for size, one in needles if size == length]
        text = [one for size, one in texts if size == length]
        rows.append(
            {
                "length_tokens": length,
                "accuracy": accuracy(answers),
                "answer_perplexity": perplexity(answers),
                "text_perplexity": perplexity(text),
            }
        )
    return rows


def accuracy(scores: Sequence[Score]) -> float:
    """Share of documents whose answers are all exact."""
    return sum(one.exact for one in scores) / len(scores)


def perplexity(scores: Sequence[Score]) -> float:
    """exp(mean nats per scored token), capped at exp(700): float64 overflows at exp(710)."""
    return math.exp(min(math.fsum(one.nll for one in scores) / sum(one.n_tokens for one in scores), 700.0))
