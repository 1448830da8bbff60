"""One RULER task at several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from lr2train import progress
from lr2train.config import UserError
from lr2train.evaluation.request import Answer, Generate, Sample
from lr2train.evaluation.ruler import cache, grading, spec
from lr2train.evaluation.ruler.cache import Made
from lr2train.evaluation.ruler.draft import Draft, Generator, NoRoom, Start, fit, needed
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.io import fingerprint
from lr2train.run import stream

FORMAT = 1
"""Of the generators: another number makes all samples again."""

_QUICK_TOKENS = 2_000_000  # made in seconds; more show their progress


@dataclass(frozen=True)
class RulerTask:
    """A task as ``evaluation.request.Task`` wants it.

    Attributes:
        name: one of ``spec.NAMES``.
        lengths: prompt and generated tokens together.
        count: samples of each length; fewer where the task has no more questions.
        tokenizer: of the model.
        seed: of the samples.
        generator: draws them.
        folder: cache of made samples; None: none are kept.
        measures: the grade, 0 … 100.
    """

    name: str
    lengths: tuple[int, ...]
    count: int
    tokenizer: PromptTokenizer
    seed: int
    generator: Generator
    folder: Path | None = None
    measures: tuple[str, ...] = ("score",)
    _starts: dict[int, tuple[Start, Made]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the model may generate."""
        return spec.NEW_TOKENS[self.name]

    @property
    def is_part(self) -> bool:
        """Whether any answer is enough (string_match_part)."""
        return self.name in (spec.SQUAD, spec.HOTPOTQA)

    @property
    def n_samples(self) -> int:
        """Samples of each length."""
        most = self.generator.most()
        return self.count if most is None else min(self.count, most)

    def samples(self) -> list[Sample]:
        """All samples, length by length; the ids of cached ones are mapped into memory.

        Raises:
            UserError: a length has no room for the task.
        """
        return list(chain.from_iterable(self.of_length(length) for length in self.lengths))

    def of_length(self, length_tokens: int) -> list[Sample]:
        """The samples of one length, from the cache where it has them.

        Raises:
            UserError: the length has no room for the task.
        """
        enough = grading.enough_for_part if self.is_part else grading.enough_for_all
        return [
            Sample(
                self.name,
                number,
                Generate(one.tokens, self.max_new_tokens, enough=enough(one.answers)),
                one.answers,
                length_tokens,
                one.facts,
            )
            for number, one in enumerate(self._made(length_tokens))
        ]

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """RULER's grade of one answer."""
        match = grading.string_match_part if self.is_part else grading.string_match_all
        return {"score": match(answer.text, sample.answers)}

    def too_short(self, length_tokens: int) -> int | None:
        """A greater length that has room for the task; None where this length has."""
        shortest = self.shortest(length_tokens)
        return shortest if shortest > length_tokens else None

    def no_room(self, length_tokens: int) -> UserError:
        """The refusal of a length."""
        return UserError(
            f"RULER's {self.name} does not fit a length of {length_tokens} tokens with this tokenizer; "
            f"set eval.lengths_tokens=[{self.shortest(length_tokens)}] or greater, or take {self.name} out"
        )

    def shortest(self, least_tokens: int = 1) -> int:
        """A length of at least ``least_tokens`` that has room for all samples; hardly a shorter one has.

        What is drawn depends on the length, so the need changes by a few tokens from length to length.
        """
        length = least_tokens
        while (needs := self._least(length)) > length:
            length = needs
        return length

    def _least(self, length_tokens: int) -> int:
        """Tokens that the samples of a length need at their least size, with those that are generated."""
        # Only the documents of questions differ much. Twice the need of another task's first sample is enough for all.
        first = self.max_new_tokens + needed(self._draft(length_tokens, 0), self.tokenizer)
        if not self.is_part and 2 * first <= length_tokens:
            return first
        rest = (needed(self._draft(length_tokens, number), self.tokenizer) for number in range(1, self.n_samples))
        return max(first, self.max_new_tokens + max(rest, default=0))

    def _made(self, length_tokens: int) -> Sequence[Made]:
        if self.folder is None:
            return list(self._make(length_tokens, 0))
        identity = self._identity(length_tokens)
        path = self.folder / f"{self.name}-{length_tokens}-{identity}.samples"
        known = cache.read(path, identity) or []
        if len(known) < self.n_samples:
            made = [*known, *self._make(length_tokens, len(known))]
            cache.write(path, identity, made)
            known = cache.read(path, identity) or []
            if len(known) < self.n_samples:  # a job that wants fewer samples wrote the file meanwhile
                known = made
        return known[: self.n_samples]

    def _identity(self, length_tokens: int) -> str:
        """Fingerprint of everything that decides the samples of a length, but not of their number."""
        values = [FORMAT, self.name, length_tokens, self.seed, self.tokenizer.fingerprint, self.generator.identity]
        return fingerprint(values)

    def _make(self, length_tokens: int, first: int) -> Iterator[Made]:
        made = (self._one(length_tokens, number) for number in range(first, self.n_samples))
        if (self.n_samples - first) * length_tokens < _QUICK_TOKENS:
            return made
        return progress.track(made, self.n_samples, f"make {self.name} of {length_tokens} tokens", first)

    def _one(self, length_tokens: int, number: int) -> Made:
        if length_tokens not in self._starts:
            # Every search for a size begins where that of sample 0 ended, so no sample depends on another's turn.
            self._starts[length_tokens] = self._fitted(length_tokens, 0, None)
        start, made = self._starts[length_tokens]
        return made if number == 0 else self._fitted(length_tokens, number, start)[1]

    def _fitted(self, length_tokens: int, number: int, start: Start | None) -> tuple[Start, Made]:
        room = length_tokens - self.max_new_tokens
        try:
            fitted = fit(self._draft(length_tokens, number), self.tokenizer, room, start)
        except NoRoom:
            raise self.no_room(length_tokens) from None
        positions = [fitted.tokens.position(place) for place in fitted.prompt.places]
        facts = {"size": fitted.start.size, **fitted.prompt.facts}
        if positions:
            facts["answer_positions"] = positions
        return fitted.start, Made(fitted.tokens.ids, fitted.prompt.answers, facts)

    def _draft(self, length_tokens: int, number: int) -> Draft:
        streams = partial(stream, self.seed, "ruler", self.name, length_tokens, number)
        return self.generator.draft(length_tokens, number, streams)
