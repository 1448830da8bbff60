"""Needle documents: key-value sentences hidden in text, asked for at the end (paper, Appendix C; RULER's niah).

Choice: each part of a sentence (text up to the number, number, question) is tokenised apart, and the ids are joined. So
the tokens of an answer are known exactly for any tokenizer, and are the same in the needle and after the question.
Cost: where two parts meet, the ids may differ from the ids of the joined text. The space before a number belongs to the
answer only where the tokenizer merges the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from lr2train.config import NeedleConfig, UserError
from lr2train.data.corpus import HOLDOUT
from lr2train.data.text import Text

Encode = Callable[[str], np.ndarray]

_ADJECTIVES = (
    "amber ancient brave bright calm clever cold copper crimson curious dusty eager early fierce gentle golden happy "
    "hidden hollow humble icy jolly keen lively lonely lucky mellow misty noble numerous odd pale proud quiet rapid "
    "rusty silent silver tiny wild"
)
_NOUNS = (
    "anchor apple arrow badge basket beacon bell bridge candle canyon castle cloud comet copper desk drum eagle ember "
    "falcon feather forest garden hammer harbor island kite lantern maple meadow mirror mountain needle orchard pebble "
    "river saddle stone tower valley whistle"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
N_KEYS = len(ADJECTIVES) * len(NOUNS)


@dataclass(frozen=True)
class Wording:
    """The sentences of a document.

    The number follows ``needle`` and ``question`` after one space; ``{key}`` stands for the pair's name.
    """

    needle: str
    needle_end: str
    question: str
    question_end: str = "\n"  # between an answer and the next question
    link: str = " is: "  # between the names of a chain in its answer
    intro: str = ""
    key_joint: str = "-"

    def key(self, index: int) -> str:
        """Name number ``index`` of ``N_KEYS``."""
        return self.key_joint.join((ADJECTIVES[index // len(NOUNS)], NOUNS[index % len(NOUNS)]))


WORDINGS: dict[str, Wording] = {
    "paper": Wording(
        intro="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        needle="One of the special magic numbers for {key} is:",
        needle_end=". ",
        question="\nWhat is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
    ),
    "plain": Wording(
        needle="The magic number of {key} is:", needle_end=".\n", question="\nThe magic number of {key} is:"
    ),
    "code": Wording(needle="{key} =", needle_end="\n", question="\n{key} =", link=" = ", key_joint="_"),
}


def sentences(wording: str, times: int = 60) -> Iterator[str]:
    """Training text for the tokenizer of a corpus with needles: each key's sentence and question, ``times`` over."""
    how = WORDINGS[wording]
    for _ in range(times):
        yield "".join(
            f"{how.needle.format(key=how.key(index))} {how.question.format(key=how.key(index))} "
            for index in range(N_KEYS)
        )


@dataclass(frozen=True)
class NeedleDocument:
    """A document of exactly the length asked for.

    Attributes:
        tokens: int64 [length_tokens].
        answer_spans: half-open token ranges of the answers after the questions, in order; ``tokens[start:stop]`` is
            exactly the answer.
        depth: place in the filler of the needle that is asked for first, 0 start … 1 end.
        answers: the numbers as text, one for each range; of a chain, its names from the second on and the number.
    """

    tokens: np.ndarray
    answer_spans: tuple[tuple[int, int], ...]
    depth: float
    answers: tuple[str, ...]

    @property
    def n_answer_tokens(self) -> int:
        """Tokens of all answers: those are scored."""
        return sum(stop - start for start, stop in self.answer_spans)


def check_needles(needles: NeedleConfig) -> None:
    """Refuse settings of which no document can be made.

    Raises:
        UserError: a setting is out of its limits.
    """
    _check_form(needles.wording, needles.digits)
    for key, low, high in (("max_pairs", 1, N_KEYS), ("max_questions", 1, N_KEYS), ("at_start", 0, 1)):
        between(f"data.needles.{key}", getattr(needles, key), low, high)


def _check_form(wording: str, digits: int) -> None:
    if wording not in WORDINGS:
        raise UserError(
            f"data.needles.wording={wording} is not one of {', '.join(WORDINGS)}; set data.needles.wording to one of "
            "them"
        )
    between("data.needles.digits", digits, 1, 18)


def between(key: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside its limits.

    Raises:
        UserError: the value is below ``low`` or above ``high``.
    """
    if not low <= value <= high:
        raise UserError(f"{key}={value} is not between {low} and {high}; set {key} inside these limits")


class NeedleMaker:
    """Makes needle documents of one wording with one tokenizer, and remembers the ids of each text that it tokenised.

    Args:
        encode: text to ids, without special tokens.
        wording: a name of ``WORDINGS``.
        digits: of a hidden number; the first digit is not 0.
        bos: id before the document, or None.
        eos: id after the last answer, or None.

    Raises:
        UserError: the wording is unknown, digits are out of their limits, or the tokenizer does not tell numbers apart.
    """

    def __init__(self, encode: Encode, wording: str, digits: int, bos: int | None, eos: int | None) -> None:
        _check_form(wording, digits)
        self._encode, self._wording, self._digits = encode, WORDINGS[wording], digits
        self._known: dict[str, list[int]] = {}
        self._bos, self._eos = [] if bos is None else [bos], [] if eos is None else [eos]
        self._refuse_without_digits()

    def make(
        self,
        rng: np.random.Generator,
        filler: np.ndarray,
        length_tokens: int,
        depth: float | Sequence[float] | None = None,
        n_pairs: int = 1,
        n_questions: int = 1,
        n_chains: int = 0,
        hops: int = 1,
    ) -> NeedleDocument:
        """One document.

        Args:
            rng: draws keys, numbers and places.
            filler: ids of the text to hide in; its beginning is used. ``length_tokens`` ids are always enough.
            length_tokens: of the whole document, BOS and EOS included.
            depth: of the needle that is asked for first, 0 … 1, or of the first ones, one each; None draws it. The
                depths of all other needles are drawn.
            n_pairs: needles with a number.
            n_questions: pairs that are asked for at the end.
            n_chains: chains of needles (RULER's variable tracking), all asked for after the pairs. The first needle
                of a chain holds the name of the next, the last one a number, and they stand in any order at places of
                their own. The answer names every needle on the way: ``c = b``, ``a = 5``, ``b = a`` are asked by
                ``c =`` and answered by ``b = a = 5``.
            hops: needles of a chain that hold a name.

        Raises:
            UserError: the length has no room for the sentences, the filler is too short, there are more questions than
                pairs, or the depth lies outside [0, 1].
        """
        depths = [] if depth is None else [depth] if isinstance(depth, float | int) else list(depth)
        for one in depths:
            between("depth", one, 0, 1)  # from eval.depths or search.depths
        if not 1 <= n_questions <= n_pairs <= N_KEYS:
            raise UserError(
                f"needle document with {n_pairs} pairs and {n_questions} questions; ask at least one question, and at "
                f"most one a pair (of {N_KEYS})"
            )
        pairs = list(zip(*self._draw(rng, n_pairs), strict=True))
        chains = self._draw_chains(rng, n_chains, hops, [key for key, _ in pairs]) if n_chains else []
        asked = pairs[:n_questions]
        asked += [(chain[0][0], self._wording.link.join(value for _, value in chain)) for chain in chains]
        needles = [self._needle(key, value) for key, value in itertools.chain.from_iterable([pairs, *chains])]
        questions = [self._question(key, answer) for key, answer in asked]
        head = self._bos + self._part(self._wording.intro)
        tail, spans = self._ask(questions)
        room = length_tokens - len(head) - len(tail) - sum(map(len, needles))
        self._check(room, length_tokens, len(filler))
        places = rng.integers(0, room, size=len(needles), endpoint=True)
        places[: len(depths)] = [round(one * room) for one in depths]
        tokens = _hide(head, filler[:room], needles, places, tail)
        first = length_tokens - len(tail)
        answer_spans = tuple((first + start, first + stop) for start, stop in spans)
        return NeedleDocument(
            tokens,
            answer_spans,
            depths[0] if depths else float(places[0]) / max(1, room),
            tuple(answer for _, answer in asked),
        )

    def most_pairs(self, length_tokens: int, max_questions: int = 1, n_chains: int = 0, hops: int = 1) -> int:
        """Pairs that fit a document of this length whatever is drawn, beside ``n_chains`` chains, with up to
        ``max_questions`` asked for.
        """
        fixed, needle, question, name = self._costs
        # Against a pair: a name may be longer than a number, and the answer holds a name and a link for each hop.
        chain = (hops + 1) * (needle + name) + question + hops * name
        room = length_tokens - fixed - n_chains * chain
        asked = min(max_questions, room // (needle + question))
        return max(0, asked if asked < max_questions else (room - asked * question) // needle)

    @cached_property
    def _costs(self) -> tuple[int, int, int, int]:
        """Most tokens of the fixed text, a needle, a question with its answer, and a name with a link; a digit is at
        most one token.
        """
        wording, number = self._wording, self._digits + 1
        keys = [wording.key(index) for index in range(N_KEYS)]
        needle = (
            max(len(self._part(wording.needle, key)) for key in keys) + number + len(self._part(wording.needle_end))
        )
        question = (
            max(len(self._part(wording.question, key)) for key in keys) + number + len(self._part(wording.question_end))
        )
        name = max(len(self._apart(f" {key}{wording.link}")) for key in keys)
        return len(self._bos) + len(self._eos) + len(self._part(wording.intro)), needle, question, name

    def _draw(self, rng: np.random.Generator, n_pairs: int) -> tuple[list[str], list[str]]:
        """Distinct keys, and numbers."""
        indices = rng.choice(N_KEYS, n_pairs, replace=False) if n_pairs > 1 else rng.integers(N_KEYS, size=1)
        numbers = rng.integers(10 ** (self._digits - 1) if self._digits > 1 else 0, 10**self._digits, size=n_pairs)
        return [self._wording.key(index) for index in indices.tolist()], [str(number) for number in numbers.tolist()]

    def _draw_chains(
        self, rng: np.random.Generator, n_chains: int, hops: int, taken: Sequence[str]
    ) -> list[list[tuple[str, str]]]:
        """The needles of each chain, from the name that is asked for to the number; all names are distinct."""
        n_names = n_chains * (hops + 1)
        keys, numbers = self._draw(rng, min(N_KEYS, n_names + len(taken)))
        free = [key for key in keys if key not in set(taken)]
        if len(free) < n_names:
            raise UserError(
                f"needle document with {len(taken)} pairs and {n_chains} chains of {hops + 1} needles has more names "
                f"than there are ({N_KEYS}); use fewer"
            )
        names = [free[first : first + hops + 1] for first in range(0, n_names, hops + 1)]
        return [
            list(zip(chain, [*chain[1:], number], strict=True)) for chain, number in zip(names, numbers, strict=False)
        ]

    def _needle(self, key: str, value: str) -> list[int]:
        joint, answer = self._value(value)
        return self._part(self._wording.needle, key) + joint + answer + self._part(self._wording.needle_end)

    def _question(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """Ids of the text before the answer, and of the answer."""
        joint, answer = self._value(value)
        return self._part(self._wording.question, key) + joint, answer

    def _ask(self, questions: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of all questions with their answers, and the range of each answer in them."""
        tail: list[int] = []
        spans = []
        for before, answer in questions:
            tail += (self._part(self._wording.question_end) if tail else []) + before
            spans.append((len(tail), len(tail) + len(answer)))
            tail += answer
        return tail + self._eos, spans

    def _value(self, value: str) -> tuple[list[int], list[int]]:
        """Ids of the space before a number or name where the space is a token of its own, and ids of the value."""
        space, ids = self._part(" "), self._apart(f" {value}")
        joint = space if space and ids[: len(space)] == space else []
        answer = ids[len(joint) :]
        if not answer:
            raise UserError(
                f"the tokenizer turns the number {value} into no token, so nothing is left to score; set "
                "data.tokenizer to one that knows digits"
            )
        return joint, answer

    def _refuse_without_digits(self) -> None:
        """Refuse a tokenizer whose answers do not tell which number was found."""
        answers = {digit: self._value(digit * self._digits)[1] for digit in "0123456789"}
        unknown = set(self._apart("☃"))  # a tokenizer with byte fallback has tokens for this sign too
        blind = [digit for digit, ids in answers.items() if set(ids) <= unknown]
        if blind or len(set(map(tuple, answers.values()))) < len(answers):
            raise UserError(
                f"the tokenizer has no token for {', '.join(blind) or 'each digit'}, so an answer would not tell which "
                "number was found; set data.tokenizer to one that knows digits"
            )

    def _part(self, template: str, key: str = "") -> list[int]:
        text = template.format(key=key)
        if text not in self._known:
            self._known[text] = self._apart(text) if text else []
        return self._known[text]

    def _apart(self, text: str) -> list[int]:
        """Ids of a text as inside a document.

        SentencePiece tokenizers put a space before the first character of a text. So the text is encoded behind a
        character that it cannot merge with. That is a line break, or a letter where the
        text begins with a space, because some tokenizers make one space of several.
        """
        for before in ("x", "\n") if text[0].isspace() else ("\n",):
            whole, first = _ids(self._encode(before + text)), _ids(self._encode(before))
            if whole[: len(first)] == first:
                return whole[len(first) :]
        return _ids(self._encode(text))

    @staticmethod
    def _check(room: int, length_tokens: int, filler_tokens: int) -> None:
        if room < 0:
            raise UserError(
                f"a needle document of {length_tokens} tokens is {-room} too short for its sentences; use a greater "
                "length, fewer pairs or chains, or data.needles.wording=code"
            )
        if room > filler_tokens:
            raise UserError(
                f"a needle document of {length_tokens} tokens needs {room} tokens of filler and has {filler_tokens}; "
                "give longer filler text"
            )


def _hide(
    head: list[int], filler: np.ndarray, needles: list[list[int]], places: np.ndarray, tail: list[int]
) -> np.ndarray:
    parts: list[list[int] | np.ndarray] = [head]
    done = 0
    for index in np.argsort(places, kind="stable").tolist():
        place = int(places[index])
        parts += [filler[done:place], needles[index]]
        done = place
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in (*parts, filler[done:], tail)])


def _ids(encoded: np.ndarray) -> list[int]:
    return np.asarray(encoded).tolist()


class HeldOutText(Protocol):
    """What needles ask a corpus for."""

    @property
    def tokenizer(self) -> Any:
        """Has ``encode`` and ``bos``."""
        ...

    def text(self, split: str = ...) -> Text:
        """Random stretches of a split."""
        ...


def needle_set(
    corpus: HeldOutText,
    needles: NeedleConfig,
    n_documents: int,
    length_tokens: int,
    depths: Sequence[float],
    rng: np.random.Generator,
    questions: int = 1,
    distractors: int = 0,
    chains: int = 0,
) -> list[NeedleDocument]:
    """Needle documents for a measurement: filler is held out, and no document gives filler twice before all gave some.

    The paper hides one needle and asks for it (Appendix C).

    Args:
        corpus: gives the tokenizer and the filler.
        needles: wording, digits and hops.
        n_documents: at each depth.
        length_tokens: of each document.
        depths: of the needles that are asked for; the depths of all other needles are drawn.
        rng: decides texts, keys and numbers.
        questions: needles that are asked for.
        distractors: needles that are not.
        chains: chains of ``needles.hops`` hops, all asked for; their needles lie anywhere.

    Raises:
        UserError: nothing is held out, the length has no room for the sentences, or a setting is out of its limits.
    """
    check_needles(needles)
    tokenizer = corpus.tokenizer
    maker = NeedleMaker(tokenizer.encode, needles.wording, needles.digits, tokenizer.bos, None)
    fillers = corpus.text(HOLDOUT).draw_apart(rng, n_documents * len(depths), length_tokens)
    return [
        maker.make(
            rng,
            filler,
            length_tokens,
            [depth] * questions,
            questions + distractors,
            questions,
            n_chains=chains,
            hops=needles.hops,
        )
        for filler, depth in zip(fillers, np.repeat(depths, n_documents).tolist(), strict=True)
    ]


def text_set(corpus: HeldOutText, n_documents: int, length_tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Held-out text for perplexity: int64 [length_tokens] each, BOS first where the tokenizer has one.

    Raises:
        UserError: the corpus has no held-out document.
    """
    bos = [] if corpus.tokenizer.bos is None else [corpus.tokenizer.bos]
    bodies = corpus.text(HOLDOUT).draw(rng, n_documents, length_tokens - len(bos))
    return [np.concatenate([np.array(bos, dtype=np.int64), body]) for body in bodies]
