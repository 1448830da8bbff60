"""A sample on its way: everything that is drawn for it, and its text at any size; and the fit to a length.

Choice: the size of a sample is found from a few whole tokenisations, with the secant method inside a bracket. No rule
about the tokenizer is needed, so any tokenizer works. The search ends once the prompt is 99 % full, or cannot grow.
Cost: a prompt leaves up to 1 % of its length empty, more only where one unit of its text is longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lr2train.evaluation.tokens import PromptTokenizer

Streams = Callable[[str], np.random.Generator]
"""The random stream of a sample by a name; each call starts the stream again."""

FULL = 0.99  # share of the room that ends the search
_AIM = 0.996
_SECANT_TURNS = 6  # then halving, which always ends


@dataclass(frozen=True)
class Prompt:
    """The text of a sample at one size.

    Attributes:
        text: the whole prompt, with the beginning of the answer.
        answers: the right answers.
        places: characters in ``text`` whose token positions the record keeps: of the answers, or of the documents of a
            question.
        facts: for the record; plain JSON values.
    """

    text: str
    answers: tuple[str, ...]
    places: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Draft(Protocol):
    """What is drawn for one sample. A greater size gives a longer text."""

    @property
    def smallest(self) -> int:
        """The least size."""
        ...

    def prompt(self, size: int) -> Prompt:
        """The prompt of a size; always the same for one size."""
        ...


class Generator(Protocol):
    """Draws the samples of a task.

    Attributes:
        identity: everything beside name, length, seed and tokenizer that decides the samples; a JSON value.
    """

    identity: Any

    def most(self) -> int | None:
        """Samples that there are; None: any number."""
        ...

    def draft(self, length_tokens: int, number: int, streams: Streams) -> Draft:
        """The draft of sample ``number``."""
        ...


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt.

    Attributes:
        ids: int64 [T], as ``PromptTokenizer.encode`` gives them.
    """

    ids: np.ndarray
    _encoding: Any
    _dropped: int

    @classmethod
    def of(cls, tokenizer: PromptTokenizer, text: str) -> Tokens:
        """Tokenise a prompt once, and keep where its characters went."""
        encoding = tokenizer.hf(text, verbose=False)
        ids, bos = encoding["input_ids"], tokenizer.hf.bos_token_id
        dropped = int(bos is not None and ids[:2] == [bos, bos])
        return cls(np.asarray(ids[dropped:], dtype=np.int64), encoding, dropped)

    def position(self, character: int) -> int:
        """The token that holds a character; a character without a token counts to the next one."""
        for later in range(character, character + 16):
            token = self._encoding.char_to_token(later)
            if token is not None:
                return token - self._dropped
        return len(self.ids)


class NoRoom(Exception):
    """A sample does not fit even at its least size.

    Attributes:
        tokens: of its prompt at that size.
    """

    def __init__(self, tokens: int):
        super().__init__(f"{tokens} tokens")
        self.tokens = tokens


@dataclass(frozen=True)
class Start:
    """Where the search for a size begins: a size, and tokens for each step of the size."""

    size: int
    rate: float


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits.

    Attributes:
        prompt: its text and answers.
        tokens: of the prompt.
        start: where the search for another sample of this task and length may begin.
    """

    prompt: Prompt
    tokens: Tokens
    start: Start


def fit(draft: Draft, tokenizer: PromptTokenizer, room_tokens: int, start: Start | None = None) -> Fitted:
    """The draft at a size whose prompt fills the room.

    Args:
        draft: of the sample.
        tokenizer: counts.
        room_tokens: most tokens of the prompt.
        start: where the search begins; None: at the least size.

    Raises:
        NoRoom: the prompt of the least size is longer than the room.
    """
    low, high = draft.smallest - 1, None  # the greatest size that fits, and the least that does not
    size, rate = (max(start.size, draft.smallest), start.rate) if start else (draft.smallest, 0.0)
    best: Fitted | None = None
    last: tuple[int, int] | None = None
    turn = 0
    while True:
        prompt = draft.prompt(size)
        tokens = Tokens.of(tokenizer, prompt.text)
        n = len(tokens.ids)
        if last is not None and (n - last[1]) * (size - last[0]) > 0:
            rate = (n - last[1]) / (size - last[0])
        if n <= room_tokens:
            low, best = size, Fitted(prompt, tokens, Start(size, rate))
        elif size == draft.smallest:
            raise NoRoom(n)
        else:
            high = size
        if best and (len(best.tokens.ids) >= FULL * room_tokens or high == low + 1):
            return best
        last, turn = (size, n), turn + 1
        size = _next_size(size, low, high, (_AIM * room_tokens - n) / rate if rate else None, turn)


def _next_size(size: int, low: int, high: int | None, step: float | None, turn: int) -> int:
    """A size strictly between ``low`` and ``high``: a secant step, or the middle."""
    if high is not None and (step is None or turn > _SECANT_TURNS):
        return (low + high) // 2
    wanted = 2 * size + 64 if step is None else size + round(step)
    return max(low + 1, wanted if high is None else min(wanted, high - 1))


def needed(draft: Draft, tokenizer: PromptTokenizer) -> int:
    """Tokens of the prompt at its least size."""
    return tokenizer.count(draft.prompt(draft.smallest).text)
