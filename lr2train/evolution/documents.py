"""The documents that candidates are scored on, drawn from a corpus' held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.config import Config, UserError
from lr2train.data.corpus import HOLDOUT, Corpus
from lr2train.data.needles import N_KEYS, NeedleMaker, check_needles, text_set
from lr2train.run import stream


@dataclass(frozen=True)
class SearchDocument:
    """A document and its scored spans.

    Attributes:
        tokens: int64 [L], L the target window.
        spans: half-open token ranges in order; each is one answer, or the whole text, and gets a loss of its own.
    """

    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def n_scored_tokens(self) -> int:
        """Number of tokens in all spans."""
        return sum(stop - start for start, stop in self.spans)


def draw_documents(config: Config, corpus: Corpus) -> list[SearchDocument]:
    """``search.documents`` documents for the generations, then ``search.final_documents`` for the final; L tokens each.

    Raises:
        UserError: no text is held out, the length has no room for the needles, or there are more needles than names.
    """
    settings = config.search
    if settings.objective == "needle" and settings.questions + settings.distractors > N_KEYS:
        raise UserError(
            f"search.questions={settings.questions} and search.distractors={settings.distractors} make more needles "
            f"than there are names ({N_KEYS}); set search.distractors to {max(0, N_KEYS - settings.questions)} or less"
        )
    if not settings.depths:
        raise UserError("search.depths=[] names no depth; set search.depths to [0.0,0.25,0.5,0.75,1.0]")
    n_documents, length = settings.documents + settings.final_documents, config.rope.target_window_tokens
    rng = stream(settings.seed, "search", "needles")
    if settings.objective == "text":
        whole = ((1, length),)  # nothing comes before the first token to predict it from
        return [SearchDocument(tokens, whole) for tokens in text_set(corpus, n_documents, length, rng)]
    return _needle_documents(config, corpus, n_documents, rng)


def _needle_documents(config: Config, corpus: Corpus, n: int, rng: np.random.Generator) -> list[SearchDocument]:
    """Question ``q`` of document ``d`` is about a needle at depth number ``d + q`` of ``search.depths``, in turn."""
    settings, length, tokenizer = config.search, config.rope.target_window_tokens, corpus.tokenizer
    depths = settings.depths
    check_needles(config.data.needles)
    maker = NeedleMaker(tokenizer.encode, config.data.needles.wording, config.data.needles.digits, tokenizer.bos, None)
    texts = corpus.text(HOLDOUT).draw_apart(rng, min(n, settings.texts or n), length)
    made = [
        maker.make(
            rng,
            texts[number % len(texts)],
            length,
            [depths[(number + question) % len(depths)] for question in range(settings.questions)],
            settings.questions + settings.distractors,
            settings.questions,
        )
        for number in range(n)
    ]
    return [SearchDocument(one.tokens, one.answer_spans) for one in made]


def digest(documents: Sequence[SearchDocument]) -> str:
    """Hash of tokens and spans: the evaluations of a journal hold for these documents alone."""
    facts = hashlib.sha256()
    for document in documents:
        facts.update(document.tokens.tobytes())
        facts.update(repr(document.spans).encode())
    return facts.hexdigest()[:16]
