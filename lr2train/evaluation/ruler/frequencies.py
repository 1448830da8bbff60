"""Aggregation: common words of a numbered list (cwe), and frequent words of a coded text (fwe)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.draft import Prompt, Streams
from lr2train.evaluation.ruler.words import Draws, all_words
from lr2train.io import fingerprint

_FWE_ANSWERS = slice(1, 4)  # by rank; rank 0 is the noise
# Words in all from which the fourth rank is always more frequent than the fifth: floor(n c / 16) > floor(n c / 25).
_FWE_LEAST_WORDS = 53
_FWE_LEAST_VOCABULARY = 5


class CommonGenerator:
    """Draws the samples of cwe."""

    def __init__(self) -> None:
        self.identity: Any = fingerprint(list(all_words()))

    def most(self) -> int | None:
        """Any number."""
        return None

    def draft(self, length_tokens: int, number: int, streams: Streams) -> CommonDraft:
        """The draft of a sample; below 4096 tokens words repeat less often."""
        fewer = length_tokens < spec.FEWER_BELOW
        return CommonDraft(spec.CWE_FEWER_REPEATS if fewer else spec.CWE_REPEATS, streams)


class CommonDraft:
    """One sample. Its size counts different words, the common ones among them.

    RULER takes a second list of words where wonderwords has too few. Here pairs of an adjective and a noun follow; they
    are never common words.
    """

    def __init__(self, repeats: spec.Repeats, streams: Streams):
        self._repeats, self._streams = repeats, streams
        known = all_words()
        self._words: list[str] = [known[index] for index in streams("words").permutation(len(known))]
        self._pairs = Draws(streams("pairs"))
        rng = streams("example")
        shown = [known[index] for index in rng.permutation(len(known))[: repeats.example_words]]
        entries = repeated(shown, repeats.example_common, repeats.example_uncommon, rng)
        self._before = example(entries, shown[: spec.CWE_COMMON])

    @property
    def smallest(self) -> int:
        """The common words and one more."""
        return spec.CWE_COMMON + 1

    def prompt(self, size: int) -> Prompt:
        """The prompt with ``size`` different words."""
        while len(self._words) < size:
            self._words.append(self._pairs.draw("words"))
        words = self._words[:size]
        entries = repeated(words, self._repeats.common, self._repeats.uncommon, self._streams("places"))
        facts = {"haystack_units": size, "list_entries": len(entries)}
        return Prompt(self._before + cwe_question(entries), tuple(words[: spec.CWE_COMMON]), (), facts)


def repeated(words: list[str], common: int, uncommon: int, rng: np.random.Generator) -> list[str]:
    """The first ten words ``common`` times and the others ``uncommon`` times, in random order."""
    counts = [common if rank < spec.CWE_COMMON else uncommon for rank in range(len(words))]
    ranks: list[int] = rng.permutation(np.repeat(np.arange(len(words)), counts)).tolist()
    return [words[rank] for rank in ranks]


def numbered(words: Sequence[str]) -> str:
    """``1. first 2. second …``"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def cwe_question(entries: Sequence[str]) -> str:
    """A list with its question and the beginning of the answer."""
    return spec.CWE_TEXT.format(context=numbered(entries))


def example(entries: Sequence[str], common: Sequence[str]) -> str:
    """The worked example before a question."""
    return f"{cwe_question(entries)} {numbered(common)}\n"


class FrequentGenerator:
    """Draws the samples of fwe."""

    identity: Any = None

    def most(self) -> int | None:
        """Any number."""
        return None

    def draft(self, length_tokens: int, number: int, streams: Streams) -> FrequentDraft:
        """The draft of a sample; the vocabulary grows with the length."""
        vocabulary = (length_tokens - spec.NEW_TOKENS[spec.FWE]) // spec.FWE_TOKENS_A_WORD
        return FrequentDraft(max(_FWE_LEAST_VOCABULARY, vocabulary), streams)


class FrequentDraft:
    """One sample. Its size is the number of words before rounding: the word of rank k comes
    floor(size / (zeta(2) k^2)) times.
    """

    def __init__(self, vocabulary: int, streams: Streams):
        draws = Draws(streams("words"))
        self._words = [spec.FWE_NOISE, *(draws.name(spec.FWE_LETTERS, upper=False) for _ in range(vocabulary - 1))]
        self._streams = streams

    @property
    def smallest(self) -> int:
        """The answers are more frequent than all other words."""
        return _FWE_LEAST_WORDS

    def prompt(self, size: int) -> Prompt:
        """The prompt of a size."""
        counts = frequencies(size, len(self._words))
        ranks = self._streams("places").permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
        text = fwe_question([self._words[rank] for rank in ranks])
        facts = {"haystack_units": size, "frequencies": counts[_FWE_ANSWERS.start : _FWE_ANSWERS.stop + 1].tolist()}
        return Prompt(text, tuple(self._words[_FWE_ANSWERS]), (), facts)


def frequencies(size: int, vocabulary: int) -> np.ndarray:
    """int64 [vocabulary]: how often the word of each rank comes, from a zeta distribution with alpha 2."""
    ranks = np.arange(1, vocabulary + 1, dtype=np.float64)
    return (size * ranks**-2.0 / (math.pi**2 / 6)).astype(np.int64)


def fwe_question(words: Sequence[str]) -> str:
    """A coded text with its question and the beginning of the answer."""
    return spec.FWE_TEXT.format(context=" ".join(words))
