"""Random words, numbers and UUIDs as RULER draws them.

Words are those of the package wonderwords, which RULER uses. The package is imported when words are needed.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable
from functools import cache
from importlib import resources

import numpy as np

_LETTERS = {True: string.ascii_uppercase, False: string.ascii_lowercase}


@cache
def words_of(kind: str) -> tuple[str, ...]:
    """All different words of a list of wonderwords, sorted: "noun" | "adjective" | "verb"."""
    text = resources.files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.rstrip() for line in text.splitlines()} - {""}))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, without repetition, sorted."""
    return tuple(sorted({*words_of("noun"), *words_of("adjective"), *words_of("verb")}))


class Draws:
    """Draws from a random stream that never come twice."""

    def __init__(self, rng: np.random.Generator, taken: set[str] | None = None):
        self._rng = rng
        self.taken = set() if taken is None else taken

    def draw(self, kind: str) -> str:
        """A new "numbers" (seven digits) | "words" (adjective-noun) | "uuids" (version 4)."""
        return self._new({"numbers": self._number, "words": self._pair, "uuids": self._uuid}[kind])

    def name(self, letters: int, upper: bool) -> str:
        """New random letters."""
        return self._new(lambda: "".join(_LETTERS[upper][index] for index in self._rng.integers(26, size=letters)))

    def _new(self, make: Callable[[], str]) -> str:
        while (made := make()) in self.taken:
            pass
        self.taken.add(made)
        return made

    def _number(self) -> str:
        return str(self._rng.integers(10**6, 10**7))

    def _pair(self) -> str:
        adjectives, nouns = words_of("adjective"), words_of("noun")
        return f"{adjectives[self._rng.integers(len(adjectives))]}-{nouns[self._rng.integers(len(nouns))]}"

    def _uuid(self) -> str:
        return str(uuid.UUID(bytes=self._rng.bytes(16), version=4))
