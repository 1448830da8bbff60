"""Variable tracking (vt): a chain of assignments among lines of noise, after a worked example."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.draft import Prompt, Streams
from lr2train.evaluation.ruler.words import Draws
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.run import stream


class VariableGenerator:
    """Draws the samples of vt.

    Args:
        tokenizer: fits the worked example into 500 tokens, once for all samples.
    """

    identity: Any = None

    def __init__(self, tokenizer: PromptTokenizer):
        self._tokenizer = tokenizer

    def most(self) -> int | None:
        """Any number."""
        return None

    def draft(self, length_tokens: int, number: int, streams: Streams) -> VariableDraft:
        """The draft of a sample, with a worked example of its own names."""
        return VariableDraft(streams, example(streams("example"), self._example_noises))

    @cached_property
    def _example_noises(self) -> int:
        """Lines of noise in the worked example."""
        noises = spec.VT_EXAMPLE_NOISES
        while True:
            text, _, _ = chain_prompt(stream(0, "ruler", "vt", "example"), spec.VT_EXAMPLE_NAME_LETTERS, noises + 1)
            if len(self._tokenizer.encode_plain(text)) > spec.VT_EXAMPLE_TOKENS:
                return noises
            noises += 1


class VariableDraft:
    """One sample. Its size counts lines of noise."""

    def __init__(self, streams: Streams, before: str):
        self._streams, self._before = streams, before

    @property
    def smallest(self) -> int:
        """A line of noise for each assignment."""
        return spec.VT_HOPS + 1

    def prompt(self, size: int) -> Prompt:
        """The prompt with ``size`` lines of noise."""
        text, names, places = chain_prompt(self._streams("chain"), spec.VT_NAME_LETTERS, size)
        text = self._before + text
        at = tuple(text.index(f"VAR {name} =") for name in names)
        return Prompt(text, names, at, {"haystack_units": size, "depths": [place / size for place in places]})


def chain_prompt(rng: np.random.Generator, letters: int, noises: int) -> tuple[str, tuple[str, ...], list[int]]:
    """A text with its question, the names of the chain, and their places among the lines of noise."""
    draws = Draws(rng)
    names = tuple(draws.name(letters, upper=True) for _ in range(spec.VT_HOPS + 1))
    value = str(rng.integers(10_000, 99_999))  # RULER never draws 99999
    places = sorted(rng.choice(noises, len(names), replace=False).tolist())
    return question(in_noise(chain(names, value), places, noises), value), names, places


def chain(names: Sequence[str], value: str) -> list[str]:
    """The assignments; a space ends each but the first, as in RULER."""
    return [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before} " for before, name in pairwise(names))]


def in_noise(assignments: Sequence[str], places: Sequence[int], noises: int) -> str:
    """Assignments among lines of noise, each before the line of its place; places rise."""
    lines = [spec.NOISE] * noises
    for done, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
        lines.insert(place + done, assignment)
    return "\n".join(lines)


def question(context: str, value: str) -> str:
    """A text with its question and the beginning of the answer."""
    return spec.VT_TEXT.format(context=context, query=value, count=spec.VT_HOPS + 1)


def example(rng: np.random.Generator, noises: int) -> str:
    """The worked example before a question: short names, and the answer."""
    text, names, _ = chain_prompt(rng, spec.VT_EXAMPLE_NAME_LETTERS, noises)
    return f"{text} {' '.join(names)}\n\n"
