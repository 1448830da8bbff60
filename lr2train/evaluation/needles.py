"""Needle retrieval by length and depth (paper, Figure 6), and perplexity by length and by position.

Choice: one forward pass a document. An answer is exact where the most likely token is the right one at every position,
given the right tokens before it: greedy decoding then produces the answer. Token recall is the share of such positions.
Cost: after a first wrong token, recall goes on from the right text and not from the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from lr2train import run
from lr2train.config import EvalConfig, NeedleConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import WORDINGS, NeedleDocument, needle_set, text_set
from lr2train.evaluation.filler import TextFolder
from lr2train.evaluation.request import Answer, Likelihood, Sample

NEEDLES, TEXT = "needles", "text"
FIRST_BUCKET = 256  # tokens; each further bucket of positions reaches twice as far


@dataclass(frozen=True)
class NeedleTask:
    """Needles at every length, depth and wording, ``eval.samples`` documents each."""

    settings: EvalConfig
    needles: NeedleConfig
    source: Corpus | TextFolder
    lengths_tokens: Sequence[int]

    name = NEEDLES

    @property
    def measures(self) -> tuple[str, ...]:
        """exact: answers; recall: their tokens; all: documents with every answer exact; pairs, chains: their answers.

        A measure stands there only where it can differ from the first.
        """
        several = ("all",) if self.settings.questions + self.settings.chains > 1 else ()
        return ("exact", "recall", *several, *(("pairs", "chains") if self.settings.chains else ()))

    def samples(self) -> Sequence[Sample]:
        """The documents.

        Raises:
            UserError: a depth or wording is wrong, or a length has no room for the sentences.
        """
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        if not self.settings.depths:
            raise UserError("eval.depths=[] leaves nothing to measure; set eval.depths to depths between 0 and 1")
        if unknown := [one for one in self.settings.wordings if one not in WORDINGS]:
            raise UserError(f"eval.wordings holds {unknown[0]}, which is not one of {', '.join(WORDINGS)}; remove it")
        return [
            self._sample(number, length, wording, document)
            for length in self.lengths_tokens
            for number, (wording, document) in enumerate(self._documents(length))
        ]

    def _documents(self, length: int) -> list[tuple[str, NeedleDocument]]:
        """Each length and wording has a random stream of its own."""
        found = []
        for wording in self.settings.wordings or [self.needles.wording]:
            own = () if wording == self.needles.wording else (wording,)
            rng = run.stream(self.settings.seed, "evaluate", "needles", length, *own)
            made = needle_set(
                self.source,
                replace(self.needles, wording=wording),
                self.settings.samples,
                length,
                self.settings.depths,
                rng,
                self.settings.questions,
                self.settings.distractors,
                self.settings.chains,
            )
            found += [(wording, document) for document in made]
        return found

    def _sample(self, number: int, length: int, wording: str, document: NeedleDocument) -> Sample:
        facts = {"depth": document.depth, "wording": wording}
        request = Likelihood(document.tokens, document.answer_spans)
        return Sample(self.name, number, request, document.answers, length, facts)

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """The measures of one document, percent."""
        found, n_pairs = exact_answers(sample, answer), self.settings.questions
        grades = {
            "exact": _percent(found),
            "recall": 100.0 * sum(answer.right) / n_scored(sample),
            "all": 100.0 * all(found),
            "pairs": _percent(found[:n_pairs]),
            "chains": _percent(found[n_pairs:]),
        }
        return {name: grades[name] for name in self.measures}


@dataclass(frozen=True)
class TextTask:
    """Plain text at every length; its spans are buckets of positions."""

    settings: EvalConfig
    source: Corpus | TextFolder
    lengths_tokens: Sequence[int]

    name = TEXT
    measures = ("nats",)

    def samples(self) -> Sequence[Sample]:
        """The texts."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        return [
            Sample(self.name, number, Likelihood(tokens, buckets(length)), (), length)
            for length in self.lengths_tokens
            for number, tokens in enumerate(
                text_set(
                    self.source,
                    self.settings.text_documents,
                    length,
                    run.stream(self.settings.seed, "evaluate", "text", length),
                )
            )
        ]

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Mean negative log-likelihood of a token, nats."""
        return {"nats": math.fsum(answer.nlls) / n_scored(sample)}


def buckets(length_tokens: int) -> tuple[tuple[int, int], ...]:
    """Ranges of positions that double in length: [1, 256), [256, 512), [512, 1024) …; the first token is not scored."""
    borders = [1]
    while (border := max(FIRST_BUCKET, borders[-1] * 2 if borders[-1] > 1 else 0)) < length_tokens:
        borders.append(border)
    return tuple(pairwise([*borders, length_tokens]))


def exact_answers(sample: Sample, answer: Answer) -> list[bool]:
    """Of each answer of a needle document, whether all its tokens are right."""
    assert isinstance(sample.request, Likelihood)
    return [right == stop - start for (start, stop), right in zip(sample.request.spans, answer.right, strict=True)]


def _percent(found: Sequence[bool]) -> float:
    return 100.0 * sum(found) / max(1, len(found))


def n_scored(sample: Sample) -> int:
    """Tokens of all spans of a sample."""
    assert isinstance(sample.request, Likelihood)
    return sum(stop - start for start, stop in sample.request.spans)
