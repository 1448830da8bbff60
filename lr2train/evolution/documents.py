"""What candidates are scored on, drawn from a corpus' held-out documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lr2train.config import Config, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import N_KEYS, needle_set, text_set
from lr2train.run import stream

TEXT_PIECES = 16  # spans that plain text is scored in: a race compares them one by one


@dataclass(frozen=True)
class SearchDocument:
    """Tokens, of which those at ``spans`` are scored, each span (an answer) for itself.

    Attributes:
        tokens: int64 [length_tokens].
        spans: half-open token ranges, in order.
    """

    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def n_scored_tokens(self) -> int:
        """Tokens that are scored."""
        return sum(stop - start for start, stop in self.spans)


def draw_documents(config: Config, corpus: Corpus) -> list[SearchDocument]:
    """``search.documents`` for the generations, then ``search.final_documents`` for the final; each of the target window's length.

    Raises:
        UserError: nothing is held out, the length has no room for the needles, or there are more needles than names.
    """
    settings = config.search
    if settings.objective == "needle" and settings.questions + settings.distractors > N_KEYS:
        raise UserError(
            f"search.questions={settings.questions} and search.distractors={settings.distractors} make more needles than there are names "
            f"({N_KEYS}); set search.distractors to {max(0, N_KEYS - settings.questions)} or less"
        )
    n_documents, length, rng = (
        settings.documents + settings.final_documents,
        config.rope.target_window_tokens,
        stream(settings.seed, "search", "needles"),
    )
    if settings.objective == "text":
        borders = np.linspace(1, length, TEXT_PIECES + 1).astype(int).tolist()
        pieces = tuple((start, stop) for start, stop in pairwise(borders) if start < stop)
        return [SearchDocument(tokens, pieces) for tokens in text_set(corpus, n_documents, length, rng)]
    made = needle_set(corpus, config.data.needles, n_documents, length, [settings.depth], rng, settings.questions, settings.distractors)
    return [SearchDocument(one.tokens, one.answer_spans) for one in made]


def digest(documents: Sequence[SearchDocument]) -> str:
    """Of what candidates are scored on: a journal tells nothing of other documents."""
    facts = hashlib.sha256()
    for one in documents:
        facts.update(one.tokens.tobytes())
        facts.update(repr(one.spans).encode())
    return facts.hexdigest()[:16]
