"""A model that answers requests, each under the RoPE table for its length.

Choice: the window of a request is fixed before it starts, by the prompt and all that may be generated: "short" up to
L0, "long" beyond. Requests of one kind and window are computed together, up to ``batch_tokens``. Generation is greedy.
Cost: a text that was asked for more tokens than it needs may be served by the long table although it ends inside L0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lr2train.evaluation.request import Answer, Generate, Likelihood, Request
from lr2train.evaluation.subject import Subject
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.model.decode import ALONE, Lockstep, Row, decode
from lr2train.model.score import Score, score, score_together
from lr2train.model.text import Text, special_stops


class WindowModel:
    """Answers requests with one model.

    Args:
        subject: which table serves which length.
        model: a Hugging Face causal LM in eval mode.
        rotary: from ``subject.install``.
        tokenizer: of the model.
        stop_ids: ids that end a text (``load.stop_ids_of``).
        batch_tokens: tokens that are computed together.
        chunk_tokens: of a chunk of a long text; 0: whole texts, and prompts in ``decode.CHUNK_TOKENS``.
        lockstep: of ranks that divide the weights; every rank then answers at the same time, with as many requests.
    """

    def __init__(
        self,
        subject: Subject,
        model: Any,
        rotary: Any,
        tokenizer: PromptTokenizer,
        stop_ids: Collection[int] = (),
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 0,
        lockstep: Lockstep | None = None,
    ):
        self.subject, self.tokenizer = subject, tokenizer
        self.lockstep = lockstep
        self._model, self._rotary = model, rotary
        self._stop_ids = set(stop_ids)
        self._batch_tokens, self._chunk_tokens = batch_tokens, chunk_tokens

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """The requests, by number, that are answered together: longest first, the same whatever the ranks.

        Every batch has requests of one kind and one window.
        """
        order = sorted(range(len(requests)), key=lambda number: _order(requests[number]))
        groups: dict[tuple[type, str], list[list[int]]] = {}
        for number in order:
            request = requests[number]
            batches = groups.setdefault((type(request), self.subject.window(request.total_tokens)), [[]])
            longest = requests[batches[-1][0]].total_tokens if batches[-1] else 0
            full = (len(batches[-1]) + 1) * longest > self._batch_tokens
            if batches[-1] and (full or self.lockstep is not None):
                batches.append([])
            batches[-1].append(number)
        return [batch for batches in groups.values() for batch in batches]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests of one batch together.

        Raises:
            UserError, RuntimeError: the model cannot compute them, such as for want of memory.
        """
        window = self.subject.window(requests[0].total_tokens)
        start = time.monotonic()
        if isinstance(requests[0], Generate):
            answers = self._generate(requests, window)  # type: ignore[arg-type]
        else:
            answers = [_scored(one, window) for one in self._scores(requests, window)]  # type: ignore[arg-type]
        seconds = (time.monotonic() - start) / len(requests)
        return [replace(answer, seconds=round(seconds, 4)) for answer in answers]

    def _scores(self, requests: Sequence[Likelihood], window: str) -> list[Score]:
        if len(requests) > 1:
            texts = [(one.tokens, one.spans) for one in requests]
            return score_together(self._model, self._rotary, window, texts)
        one = requests[0]
        return [score(self._model, self._rotary, window, one.tokens, one.spans, self._chunk_tokens)]

    def _generate(self, requests: Sequence[Generate], window: str) -> list[Answer]:
        rows = [self._row(one, window) for one in requests]
        texts = [Text(self.tokenizer.hf, one.stops) for one in requests]
        lockstep = self.lockstep or ALONE
        for number in decode(self._model, self._rotary, rows, chunk_tokens=self._chunk_tokens, lockstep=lockstep):
            request = requests[number]
            if texts[number].stops or request.enough:
                texts[number].take(rows[number].tokens)
                if texts[number].stopped or _is_enough(texts[number].so_far, request.enough):
                    rows[number].finish = "stop"
        return [_generated(row, text, window) for row, text in zip(rows, texts, strict=True)]

    def _row(self, request: Generate, window: str) -> Row:
        stop_ids = self._stop_ids | special_stops(self.tokenizer.hf, request.stops)
        return Row(request.tokens.tolist(), request.max_new_tokens, lambda _: window, stop_ids)


def _order(request: Request) -> tuple[int, bytes]:
    """Longest first; texts that differ in their last token alone stand together."""
    return -request.total_tokens, request.tokens[:-1].tobytes()


def _is_enough(text: str, enough: Sequence[str]) -> bool:
    lower = text.lower()
    return bool(enough) and all(one.lower() in lower for one in enough)


def _generated(row: Row, text: Text, window: str) -> Answer:
    finite = row.finish != "not finite"
    error = None if finite else f"the logits after {len(row.tokens)} new tokens are not finite"
    return Answer(window, error=error, text=text.whole(row.tokens), n_new_tokens=len(row.tokens))


def _scored(found: Score, window: str) -> Answer:
    if not all(map(math.isfinite, found.nlls)):
        return Answer(window, error="the losses are not finite")
    return Answer(window, nlls=found.nlls, right=found.right)
