"""The documents that candidates are scored on, drawn from a corpus' held-out text."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.config import Config, SearchConfig, UserError
from lr2train.data.corpus import HOLDOUT, Corpus
from lr2train.data.needles import N_KEYS, NeedleMaker, check_needles, text_set
from lr2train.run import stream


@dataclass(frozen=True)
class SearchDocument:
    """A document and its scored spans.

    Attributes:
        tokens: int64 [T], T at most the target window.
        spans: half-open token ranges in order; each is one answer, or the whole text, and gets a loss of its own.
    """

    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def n_scored_tokens(self) -> int:
        """Number of tokens in all spans."""
        return sum(stop - start for start, stop in self.spans)


def draw_documents(config: Config, corpus: Corpus) -> list[SearchDocument]:
    """``search.documents`` documents for the generations, then ``search.final_documents`` for the final.

    Their lengths are ``search.lengths`` in turn. The texts do not depend on the lengths.

    Raises:
        UserError: no text is held out, a length has no room for the needles, or there are more needles than names.
    """
    settings = config.search
    if settings.objective == "needle" and settings.questions + settings.distractors > N_KEYS:
        raise UserError(
            f"search.questions={settings.questions} and search.distractors={settings.distractors} make more needles "
            f"than there are names ({N_KEYS}); set search.distractors to {max(0, N_KEYS - settings.questions)} or less"
        )
    if not settings.depths:
        raise UserError("search.depths=[] names no depth; set search.depths to [0.0,0.25,0.5,0.75,1.0]")
    n, target = settings.documents + settings.final_documents, config.rope.target_window_tokens
    lengths = [round(settings.length_of(number) * target) for number in range(n)]
    rng = stream(settings.seed, "search", "needles")
    if settings.objective == "text":
        # (1, …): nothing comes before the first token to predict it from
        texts = text_set(corpus, n, target, rng)
        return [SearchDocument(one[:length], ((1, length),)) for one, length in zip(texts, lengths, strict=True)]
    return _needle_documents(config, corpus, lengths, rng)


def _needle_documents(
    config: Config, corpus: Corpus, lengths: Sequence[int], rng: np.random.Generator
) -> list[SearchDocument]:
    settings, tokenizer = config.search, corpus.tokenizer
    n, target = len(lengths), config.rope.target_window_tokens
    check_needles(config.data.needles)
    maker = NeedleMaker(tokenizer.encode, config.data.needles.wording, config.data.needles.digits, tokenizer.bos, None)
    texts = corpus.text(HOLDOUT).draw_apart(rng, min(n, settings.texts or n), target)
    _refuse_short(settings, maker, min(lengths), target)
    made = [
        maker.make(
            stream(settings.seed, "search", "needles", number),  # no document depends on the others
            texts[number % len(texts)],
            length,
            depths_of(settings, number),
            settings.questions + settings.distractors,
            settings.questions,
        )
        for number, length in enumerate(lengths)
    ]
    return [SearchDocument(one.tokens, one.answer_spans) for one in made]


def _refuse_short(settings: SearchConfig, maker: NeedleMaker, shortest: int, target: int) -> None:
    """Refuse documents below the target window that do not hold the needles, whatever is drawn."""
    if shortest == target:
        return  # exact: the maker refuses what it cannot make
    wanted = settings.questions + settings.distractors
    least = bisect_left(range(target), wanted, key=lambda tokens: maker.most_pairs(tokens, settings.questions))
    if shortest < least:
        raise UserError(
            f"search.lengths={settings.lengths} has documents of {shortest} tokens, which do not surely hold "
            f"search.questions={settings.questions} and search.distractors={settings.distractors}; set each share in "
            f"search.lengths to {math.ceil(100 * least / target) / 100:g} or more"
        )


def depths_of(settings: SearchConfig, document: int) -> list[float]:
    """The depths of the needles that are asked for in a document, question after question.

    Depths and lengths go on together. Where their numbers have a common divisor, the depths go on by one more each time
    both are through, so that each length meets every depth.
    """
    lengths, depths = len(settings.lengths), len(settings.depths)
    again = document // math.lcm(lengths, depths) % math.gcd(lengths, depths)
    return [settings.depths[(document + again + question) % depths] for question in range(settings.questions)]


def digest(documents: Sequence[SearchDocument]) -> str:
    """Hash of tokens and spans: the evaluations of a journal hold for these documents alone."""
    facts = hashlib.sha256()
    for document in documents:
        facts.update(document.tokens.tobytes())
        facts.update(repr(document.spans).encode())
    return facts.hexdigest()[:16]
