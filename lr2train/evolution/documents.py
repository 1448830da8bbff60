"""The documents that candidates are scored on, drawn from a corpus' held-out text."""

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

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the first needle, in turn, where ``search.depth`` names none
TEXT_PIECES = 16  # scored spans of a plain text: racing compares span by span


@dataclass(frozen=True)
class SearchDocument:
    """A document and its scored spans.

    Attributes:
        tokens: int64 [L], L the target window.
        spans: half-open token ranges in order; each is one answer (or piece of text) and gets a loss of its own.
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
    n_documents, length = settings.documents + settings.final_documents, config.rope.target_window_tokens
    rng = stream(settings.seed, "search", "needles")
    if settings.objective == "text":
        # From 1: nothing comes before the first token to predict it from.
        borders = np.linspace(1, length, TEXT_PIECES + 1).astype(int).tolist()
        pieces = tuple((start, stop) for start, stop in pairwise(borders) if start < stop)
        return [SearchDocument(tokens, pieces) for tokens in text_set(corpus, n_documents, length, rng)]
    depths = DEPTHS if settings.depth is None else (settings.depth,)
    of_depth = -(-n_documents // len(depths))
    made = needle_set(
        corpus, config.data.needles, of_depth, length, depths, rng, settings.questions, settings.distractors
    )
    in_turn = [made[place] for number in range(of_depth) for place in range(number, len(made), of_depth)]
    return [SearchDocument(one.tokens, one.answer_spans) for one in in_turn[:n_documents]]


def digest(documents: Sequence[SearchDocument]) -> str:
    """Hash of tokens and spans: the evaluations of a journal hold for these documents alone."""
    facts = hashlib.sha256()
    for document in documents:
        facts.update(document.tokens.tobytes())
        facts.update(repr(document.spans).encode())
    return facts.hexdigest()[:16]
