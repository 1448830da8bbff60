"""Our model as lm-eval's ``LM``: every request of lm-eval becomes a request of ``request.py``.

Choice: texts are encoded as lm-eval's own Hugging Face object (``HFLM``) encodes them: context and continuation in one
piece, BOS where the tokenizer puts it, the beginning cut off beyond the window. Generation is greedy. Cost: a setting
of a task that asks for sampling or beams has no effect; that is told once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2
import numpy as np
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs

from lr2train.config import UserError
from lr2train.evaluation.answers import Answers
from lr2train.evaluation.request import Answer, Generate, Likelihood, Request
from lr2train.evaluation.tokens import PromptTokenizer

MAX_NEW_TOKENS = 256  # of a task that sets no limit: HFLM's own
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # without effect where do_sample is off


@dataclass
class Asked:
    """What is known about the requests of one sample.

    Attributes:
        tokens: of its longest request, all that may be generated included.
        window: that served the longest request: "short" | "long".
        truncated: whether a request lost its beginning.
        seconds: spent on all its requests.
        error: of the first request without an answer.
    """

    tokens: int = 0
    window: str = ""
    truncated: bool = False
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """A request of lm-eval as ours; ``error`` says why there is none."""

    request: Request | None
    truncated: bool = False
    error: str = ""


class HarnessModel(TemplateLM):
    """Our model as lm-eval's ``LM``.

    A request without an answer has the value nan, or an empty text; ``asked`` tells which samples failed.

    Args:
        answers: of the model.
        tokenizer: of the model.
        longest_tokens: of a text, its last token and all that may be generated included. ``max_length`` of HFLM counts
            the tokens that a model reads, without the last one of a text that is scored: HFLM has the same numbers
            with ``max_length=longest_tokens - 1`` for log-likelihoods, ``longest_tokens`` for generation.
        add_bos_token: whether texts begin with BOS. None: as the tokenizer does it.
        log: takes one line about what lm-eval asked for and does not get.

    Raises:
        UserError: the tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self,
        answers: Answers,
        tokenizer: PromptTokenizer,
        longest_tokens: int,
        *,
        add_bos_token: bool | None = None,
        log: Callable[[str], None] = lambda line: None,
    ):
        super().__init__()
        self.tokenizer = tokenizer.hf
        self.asked: dict[tuple[str, int], Asked] = {}
        self.label = "lm-eval"
        self._answers, self._longest, self._add_bos_token = answers, longest_tokens, add_bos_token
        self._log, self._told = log, set()
        if self.prefix_token_id is None:
            raise UserError(
                "the tokenizer of the model has neither a BOS nor an EOS token, and lm-eval's tasks need one of them; "
                "name one in its tokenizer_config.json"
            )

    @property
    def eot_token_id(self) -> int:
        """EOS of the tokenizer."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self._longest

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task sets no limit."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """A name for the caches of lm-eval."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; BOS is not added to a text that begins with the prefix token."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if has_bos_prefix(string, prefix) else self._add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. A template that takes no system message gets the chat without one."""
        as_text = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return as_text(chat_history)
        except jinja2.exceptions.TemplateError:
            return as_text([message for message in chat_history if message["role"] != "system"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the continuation) of (context, continuation) pairs."""
        prepared = [self._likelihood(*self._encoded(*request.args)) for request in requests]
        answers = self._ask(prepared)
        self._note([(request, one, answer) for request, one, answer in zip(requests, prepared, answers, strict=True)])
        return [_value(one, answer) for one, answer in zip(prepared, answers, strict=True)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        prepared = [self._likelihood(context, continuation) for _, context, continuation in requests]
        return [_value(one, answer) for one, answer in zip(prepared, self._ask(prepared), strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats; a text beyond the window is scored in windows that do not overlap."""
        of_texts = [self._windows(*request.args) for request in requests]
        windows = [
            (request, self._likelihood(*pair))
            for request, pairs in zip(requests, of_texts, strict=True)
            for pair in pairs
        ]
        answers = self._ask([one for _, one in windows])
        self._note([(request, one, answer) for (request, one), answer in zip(windows, answers, strict=True)])
        found = iter(_value(one, answer)[0] for (_, one), answer in zip(windows, answers, strict=True))
        return [math.fsum(itertools.islice(found, len(pairs))) for pairs in of_texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The most likely continuation of each (context, how to generate), without the stop string."""
        prepared = [self._generation(request.task_name, *request.args) for request in requests]
        answers = self._ask(prepared)
        self._note([(request, one, answer) for request, one, answer in zip(requests, prepared, answers, strict=True)])
        return [answer.text if answer.error is None else "" for answer in answers]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation; the prefix token is the context where there is none."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        pairs = lm_eval_utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._longest - 1,
            context_len=1,
        )
        return list(map(lm_eval_utils.make_disjoint_window, pairs))

    def _likelihood(self, context: list[int], continuation: list[int]) -> _Prepared:
        whole = context + continuation
        tokens = whole[-self._longest :]
        start = len(tokens) - len(continuation)
        if not continuation:
            return _Prepared(None, error="the continuation has no token of its own")
        if start < 1:
            return _Prepared(None, error=f"{len(continuation)} tokens to score have no token before them")
        truncated = len(tokens) < len(whole)
        return _Prepared(Likelihood(np.asarray(tokens, dtype=np.int64), ((start, len(tokens)),)), truncated)

    def _generation(self, task: str, context: str, how: Mapping[str, Any], *_: Any) -> _Prepared:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(how), self.max_gen_toks))
        stops = handle_stop_sequences(wanted.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        n_new = wanted.pop("max_gen_toks")
        self._tell_ignored(task, wanted)
        whole = self.tok_encode(context) or [self.prefix_token_id]
        tokens = whole[-max(self._longest - n_new, 1) :]
        request = Generate(np.asarray(tokens, dtype=np.int64), n_new, _effective(stops))
        return _Prepared(request, len(tokens) < len(whole))

    def _tell_ignored(self, task: str, wanted: Mapping[str, Any]) -> None:
        sampled = wanted.get("do_sample", False)
        ignored = {key: value for key, value in wanted.items() if sampled or key not in ("do_sample", *_SAMPLING)}
        if ignored and task not in self._told:
            self._told.add(task)
            said = ", ".join(f"{key}={value}" for key, value in ignored.items())
            self._log(f"{task} asks for {said}; its texts are generated greedily, without these settings")

    def _ask(self, prepared: Sequence[_Prepared]) -> list[Answer]:
        found = iter(self._answers.ask([one.request for one in prepared if one.request is not None], self.label))
        return [Answer("", error=one.error) if one.request is None else next(found) for one in prepared]

    def _note(self, done: Sequence[tuple[Any, _Prepared, Answer]]) -> None:
        """Remember what became of the requests of each sample."""
        for request, prepared, answer in done:
            asked = self.asked.setdefault((request.task_name, request.doc_id), Asked())
            if prepared.request is not None and prepared.request.total_tokens >= asked.tokens:
                asked.tokens, asked.window = prepared.request.total_tokens, answer.window
            asked.truncated |= prepared.truncated
            asked.seconds += answer.seconds
            asked.error = asked.error or answer.error


def _value(prepared: _Prepared, answer: Answer) -> tuple[float, bool]:
    if answer.error is not None or not isinstance(prepared.request, Likelihood):
        return math.nan, False
    ((start, stop),) = prepared.request.spans
    return -answer.nlls[0], answer.right[0] == stop - start


def _effective(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings that can end a text: lm-eval cuts at one after the other, so that a later string that holds an
    earlier one never matches.
    """
    kept: list[str] = []
    for stop in stops:
        if stop and not any(earlier in stop for earlier in kept):
            kept.append(stop)
    return tuple(kept)
