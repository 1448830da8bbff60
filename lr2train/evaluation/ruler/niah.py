"""Needles in a haystack: the eight niah tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.draft import Prompt, Streams
from lr2train.evaluation.ruler.essays import Essays
from lr2train.evaluation.ruler.words import Draws


class NiahGenerator:
    """Draws the samples of one niah task.

    Args:
        how: its parameters.
        essays: the haystack of essays; other haystacks need none.
    """

    def __init__(self, how: spec.Niah, essays: Essays | None):
        self._how, self._essays = how, essays if how.haystack == "essay" else None
        self.identity: Any = self._essays.fingerprint if self._essays else None

    def most(self) -> int | None:
        """Any number."""
        return None

    def draft(self, length_tokens: int, number: int, streams: Streams) -> NiahDraft:
        """The draft of a sample: keys and values are all different."""
        return NiahDraft(self._how, self._essays, streams)


class NiahDraft:
    """One sample. Its size counts words of essays, or lines of the other haystacks."""

    def __init__(self, how: spec.Niah, essays: Essays | None, streams: Streams):
        self._how, self._essays, self._streams = how, essays, streams
        draws, rng = Draws(streams("needles")), streams("order")
        self._keys = [draws.draw(how.key) for _ in range(how.keys)]
        values = [[draws.draw(how.value) for _ in range(how.values)] for _ in self._keys]
        pairs = [(key, value) for key, of_key in zip(self._keys, values, strict=True) for value in of_key]
        self._pairs = [pairs[index] for index in rng.permutation(len(pairs))]
        asked = rng.permutation(how.keys)[: how.queries].tolist()
        self._queries = [self._keys[index] for index in asked]
        self._answers = tuple(value for index in asked for value in values[index])
        self._hay, self._others = Draws(streams("haystack"), draws.taken), list[str]()

    @property
    def smallest(self) -> int:
        """As many units as needles."""
        return len(self._pairs)

    def prompt(self, size: int) -> Prompt:
        """The prompt with ``size`` words or lines of haystack."""
        needles = [self._needle(key, value) for key, value in self._pairs]
        context, depths = self._in_essay(needles, size) if self._essays else self._in_lines(needles, size)
        text = question(self._how, context, self._queries, len(self._answers))
        depth_of = dict(zip((value for _, value in self._pairs), depths, strict=True))
        facts = {"haystack_units": size, "depths": [depth_of[answer] for answer in self._answers]}
        return Prompt(text, self._answers, tuple(text.index(answer) for answer in self._answers), facts)

    def _needle(self, key: str, value: str) -> str:
        return spec.NEEDLE.format(kind=self._how.value, key=key, value=value)

    def _in_essay(self, needles: Sequence[str], size: int) -> tuple[str, list[float]]:
        """The context, and the depth of each needle, 0 … 1."""
        assert self._essays
        sentences = self._essays.sentences(size)
        chosen = self._streams("depths").permutation(len(spec.DEPTHS_PERCENT))[: len(needles)].tolist()
        depths = sorted(spec.DEPTHS_PERCENT[index] for index in chosen)
        return in_sentences(sentences, needles, depths), [depth / 100 for depth in depths]

    def _in_lines(self, needles: Sequence[str], size: int) -> tuple[str, list[float]]:
        lines = [spec.NOISE] * size if self._how.haystack == "noise" else self._other_needles(size)
        places = sorted(self._streams("places").choice(size, len(needles), replace=False).tolist())
        # From the last place on, so that an insertion moves no place that is still to come.
        for place, needle in zip(reversed(places), reversed(needles), strict=True):
            lines.insert(place, needle)
        return "\n".join(lines), [place / size for place in places]

    def _other_needles(self, size: int) -> list[str]:
        while len(self._others) < size:
            self._others.append(self._needle(self._hay.draw(self._how.key), self._hay.draw(self._how.value)))
        return self._others[:size]


def in_sentences(sentences: Sequence[str], needles: Sequence[str], depths_percent: Sequence[int]) -> str:
    """Needles among sentences, each before the sentence at its depth; depths rise.

    An empty part between two needles still has its spaces, as in RULER.
    """
    places = [int(len(sentences) * (depth / 100)) for depth in depths_percent]
    parts, done = list[str](), 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(sentences[done:place]), needle]
        done = place
    return " ".join([*parts, " ".join(sentences[done:])])


def question(how: spec.Niah, context: str, queries: Sequence[str], n_answers: int) -> str:
    """The whole prompt around a context."""
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    text, kind = (spec.NIAH_ONE, how.value[:-1]) if n_answers == 1 else (spec.NIAH_MANY, how.value)
    return text.format(kind=kind, context=context, query=query)
