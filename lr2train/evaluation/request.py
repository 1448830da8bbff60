"""What is asked of a model and what the model answers: the types that all benchmarks share.

Choice: a benchmark is a ``Task``: it makes samples, and grades answers. It knows nothing of models, ranks or files. Who
asks the model (``answers``) knows nothing of benchmarks. Cost: a task whose second question depends on the first answer
cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from lr2train.config import EvalConfig
    from lr2train.data.corpus import Corpus
    from lr2train.evaluation.filler import TextFolder
    from lr2train.evaluation.tokens import PromptTokenizer


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with the most likely tokens.

    Attributes:
        tokens: int64 [T], the prompt, BOS included where the tokenizer has one.
        max_new_tokens: most tokens that are generated.
        stops: the text ends before the first of these strings.
        enough: the text may end as soon as it holds all these strings, in either case: nothing after them can change
            the grade. Empty: never.
    """

    tokens: np.ndarray
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    enough: tuple[str, ...] = ()

    @property
    def total_tokens(self) -> int:
        """The prompt and all that may be generated: decides the window."""
        return len(self.tokens) + self.max_new_tokens


@dataclass(frozen=True)
class Likelihood:
    """Score the tokens of spans of a text, each predicted from all tokens before it.

    Attributes:
        tokens: int64 [T], BOS included where the tokenizer has one.
        spans: half-open token ranges; no span begins at 0, as the first token has no context.
    """

    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def total_tokens(self) -> int:
        """Tokens of the text: decides the window."""
        return len(self.tokens)


Request = Generate | Likelihood


@dataclass(frozen=True)
class Answer:
    """What a model said to one request.

    Attributes:
        window: "short" | "long", the RoPE table that served.
        seconds: spent on the request; of a batch, the request's share.
        error: why there is no answer; None where there is one.
        text: Generate: the continuation, without the stop string.
        n_new_tokens: Generate: tokens generated.
        nlls: Likelihood: negative log-likelihood of each span, nats.
        right: Likelihood: tokens of each span that are the most likely ones after the true tokens before them.
    """

    window: str
    seconds: float = 0.0
    error: str | None = None
    text: str = ""
    n_new_tokens: int = 0
    nlls: tuple[float, ...] = ()
    right: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        task: name of the task, as tables show it.
        number: of the sample, among the samples of its task and length.
        request: what the model is asked.
        answers: the right answers as text; what they mean is the task's affair.
        length_tokens: the length that was asked for; 0 where the task has none.
        facts: what the record of the sample keeps beside, such as a depth; plain JSON values.
        left_out: why the sample is not asked, such as a text that is too long; None: it is asked.
    """

    task: str
    number: int
    request: Request
    answers: tuple[str, ...] = ()
    length_tokens: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(frozen=True)
class TaskInputs:
    """What a task of a user's own package is made from: ``eval.tasks=[package.module.Class]`` calls ``Class(inputs)``.

    Attributes:
        tokenizer: of the model that answers.
        lengths_tokens: of prompts and documents, as far as the model's window goes.
        settings: the keys of ``eval``.
        source: held-out documents; None without ``data.path`` and ``eval.essays``.
    """

    tokenizer: PromptTokenizer
    lengths_tokens: Sequence[int]
    settings: EvalConfig
    source: Corpus | TextFolder | None


class Task(Protocol):
    """A benchmark, or one of its tasks."""

    @property
    def name(self) -> str:
        """As ``eval.tasks`` and tables name it."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the grades; the first one stands in tables. All are percentages, 0 … 100, unless the task says."""
        ...

    def samples(self) -> Sequence[Sample]:
        """All samples, the same on every rank and in every run.

        Raises:
            UserError: a file of the benchmark is missing or has another form, or a length has no room for the task.
        """
        ...

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """The grades of an answer without error, by the names of ``measures``."""
        ...
