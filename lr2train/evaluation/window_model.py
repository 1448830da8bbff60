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
from functools import partial
from typing import Any

import torch

from lr2train.evaluation.request import Answer, Generate, Likelihood, Request
from lr2train.evaluation.subject import Subject
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.model.greedy import ALONE, Continuation, Lockstep, continue_prompts
from lr2train.model.score import Score, score, score_together


class WindowModel:
    """Answers requests with one model.

    Args:
        subject: which table serves which length.
        model: a Hugging Face causal LM in eval mode.
        rotary: from ``subject.install``.
        tokenizer: of the model.
        stop_ids: ids that end a text (``load.stop_ids_of``).
        batch_tokens: tokens that are computed together.
        chunk_tokens: of a chunk of a long text; 0: whole texts, and prompts in ``greedy.CHUNK_TOKENS``.
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
        special = [self._special_stops(one.stops) for one in requests]

        def ended(row: int, tokens: list[int]) -> bool:
            return tokens[-1] in special[row] or self._ended(requests[row], tokens)

        found = continue_prompts(
            self._model,
            self._rotary,
            window,
            [torch.from_numpy(one.tokens) for one in requests],
            [one.max_new_tokens for one in requests],
            self._stop_ids,
            ended,
            self._chunk_tokens,
            self.lockstep or ALONE,
        )
        return list(map(partial(self._text, window), requests, found))

    def _text(self, window: str, request: Generate, found: Continuation) -> Answer:
        text = self.tokenizer.decode(found.tokens)
        cut = min((at for stop in request.stops if stop and (at := text.find(stop)) >= 0), default=len(text))
        error = None if found.finite else f"the logits after {len(found.tokens)} new tokens are not finite"
        return Answer(window, error=error, text=text[:cut], n_new_tokens=len(found.tokens))

    def _ended(self, request: Generate, tokens: list[int]) -> bool:
        if not (request.stops or request.enough):
            return False
        text = self.tokenizer.decode(tokens)
        if any(stop in text for stop in request.stops if stop):
            return True
        lower = text.lower()
        return bool(request.enough) and all(one.lower() in lower for one in request.enough)

    def _special_stops(self, stops: Sequence[str]) -> set[int]:
        """Ids of the stop strings that are special tokens: the text of an answer does not show them."""
        known = dict(zip(self.tokenizer.hf.all_special_tokens, self.tokenizer.hf.all_special_ids, strict=True))
        return {known[stop] for stop in stops if stop in known}


def _order(request: Request) -> tuple[int, bytes]:
    """Longest first; texts that differ in their last token alone stand together."""
    return -request.total_tokens, request.tokens[:-1].tobytes()


def _scored(found: Score, window: str) -> Answer:
    if not all(map(math.isfinite, found.nlls)):
        return Answer(window, error="the losses are not finite")
    return Answer(window, nlls=found.nlls, right=found.right)
