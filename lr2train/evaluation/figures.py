"""Figures from answered needle documents and texts: accuracy by length and depth (paper, Figure 6), perplexities."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lr2train.evaluation.needles import exact_answers, n_scored
from lr2train.evaluation.request import Answer, Likelihood, Sample

Answered = tuple[Sample, Answer]


def cells(needles: Sequence[Answered]) -> list[dict[str, Any]]:
    """One row for each (length, depth): accuracy, token recall, answer perplexity and number of documents."""
    grouped: dict[tuple[int, float], list[Answered]] = defaultdict(list)
    for sample, answer in needles:
        grouped[sample.length_tokens, sample.facts["depth"]].append((sample, answer))
    return [
        {
            "length_tokens": length,
            "depth": depth,
            "accuracy": accuracy(group),
            "recall": recall(group),
            "perplexity": perplexity(group),
            "documents": len(group),
        }
        for (length, depth), group in sorted(grouped.items())
    ]


def by_length(needles: Sequence[Answered], texts: Sequence[Answered]) -> list[dict[str, Any]]:
    """One row for each length, over all depths.

    ``shares`` has the share of exact answers of each document, by a hash of its tokens: two models are compared over
    the documents that both have answered.
    """
    rows = []
    for length in sorted({sample.length_tokens for sample, _ in needles}):
        answers = [one for one in needles if one[0].length_tokens == length]
        text = [one for one in texts if one[0].length_tokens == length]
        rows.append(
            {
                "length_tokens": length,
                "accuracy": accuracy(answers),
                "answer_perplexity": perplexity(answers),
                "text_perplexity": perplexity(text),
                "shares": {_name(sample): accuracy([(sample, answer)]) for sample, answer in answers},
            }
        )
    return rows


def by_position(texts: Sequence[Answered]) -> list[dict[str, Any]]:
    """Perplexity of each range of positions in the longest texts: how much a longer context helps."""
    longest = max((sample.length_tokens for sample, _ in texts), default=0)
    sums: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample, answer in texts:
        if sample.length_tokens == longest:
            assert isinstance(sample.request, Likelihood)
            for span, nll in zip(sample.request.spans, answer.nlls, strict=True):
                sums[span].append(nll)
    return [
        {"first": start, "stop": stop, "perplexity": _exp(math.fsum(nlls) / (len(nlls) * (stop - start)))}
        for (start, stop), nlls in sorted(sums.items())
    ]


def accuracy(answered: Sequence[Answered]) -> float:
    """Share of answers that are exact."""
    found = [exact for sample, answer in answered for exact in exact_answers(sample, answer)]
    return sum(found) / len(found)


def recall(answered: Sequence[Answered]) -> float:
    """Share of answer tokens that are the most likely ones."""
    return sum(sum(answer.right) for _, answer in answered) / sum(n_scored(sample) for sample, _ in answered)


def perplexity(answered: Sequence[Answered]) -> float:
    """exp(mean nats per scored token), capped at exp(700); nan where nothing was scored."""
    if not answered:
        return math.nan
    nats = math.fsum(math.fsum(answer.nlls) for _, answer in answered)
    return _exp(nats / sum(n_scored(sample) for sample, _ in answered))


def _name(sample: Sample) -> str:
    assert isinstance(sample.request, Likelihood)
    return hashlib.sha256(sample.request.tokens.tobytes()).hexdigest()[:12]


def _exp(nats: float) -> float:
    """exp, capped: float64 overflows at exp(710)."""
    return math.exp(min(nats, 700.0))
