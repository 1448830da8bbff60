"""Losses of candidates on documents: computed once, dealt to the ranks, kept in a journal.

Choice: whoever decides what a search does next (a race, a loop over everything) is a pure function of losses that it looks up. ``settle`` runs
it on what is known, collects the first losses that it misses, has the ranks compute them, and runs it again, until it misses nothing. So the
outcome cannot depend on the number of ranks, nor on a kill between two of them; and no rank idles, because a decision that waits for one loss is
carried on with a guess to find out which losses it will want next. Cost: on many ranks some of those are computed in vain. Perplexity is exp(mean
negative log-likelihood over the answer tokens of all documents) (paper, Section 3.2).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lr2train import io
from lr2train.config import UserError
from lr2train.evolution.documents import SearchDocument
from lr2train.evolution.genome import Candidate, Space
from lr2train.model.rotary import WindowRotary
from lr2train.model.score import score
from lr2train.parallel import control

T = TypeVar("T")
Losses = Callable[[Candidate, int], np.ndarray]
"""(candidate, document) -> negative log-likelihood of each answer of the document, nats, float64 [answers]."""

_HOPELESS = 8  # losses that are not finite, and none that is: then the model is at fault and no candidate
WORST = 50.0  # nats a token: what a candidate gets that breaks the model (nan, infinite)


class Fitness:
    """The losses of candidates on documents.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        rotary: takes each candidate's factors in turn.
        space: makes factors of a candidate.
        documents: all that may be asked for.
        journal: a file of one JSON line an evaluation, appended to.
        chunk_tokens: of a forward pass; 0 is whole.
        lockstep: the ranks share the model's weights, so each of them joins every forward pass.
        tell: called on every rank after every round of evaluations.

    Attributes:
        recovered: evaluations that the journal held at the start.
        damaged: its lines that were no evaluations, such as one that a kill cut short; they are computed again.
        computed: evaluations in the journal now.
        document_forwards: evaluations that were asked for so far; ``computed`` exceeds it by what many ranks computed ahead in vain.
    """

    def __init__(
        self,
        model: Any,
        rotary: WindowRotary,
        space: Space,
        documents: Sequence[SearchDocument],
        journal: Path,
        *,
        chunk_tokens: int = 0,
        lockstep: bool = False,
        tell: Callable[[], None] = lambda: None,
    ):
        self.documents = tuple(documents)
        self.tell = tell
        self._model, self._rotary, self._space = model, rotary, space
        self._journal, self._chunk_tokens, self._lockstep = journal, chunk_tokens, lockstep
        entries, self.damaged = control.from_rank_0(_read_journal(journal) if control.rank() == 0 else ([], 0))
        self._known: dict[tuple[str, int], np.ndarray] = {}
        self._some_finite = False
        self._remember(entries)
        self._wanted: set[tuple[str, int]] = set()
        self.recovered = len(self._known)

    @property
    def computed(self) -> int:
        return len(self._known)

    @property
    def document_forwards(self) -> int:
        return len(self._wanted)

    def settle(self, decide: Callable[[Losses], T]) -> T:
        """``decide(losses)``, with every loss that it looks up computed first.

        ``decide`` must be pure. While a loss is missing it is run with guesses and its result is thrown away.

        Raises:
            UserError, RuntimeError: what one rank raised while it evaluated, on every rank.
        """
        while True:
            attempt = _Attempt(self._known, self.documents, control.world())
            try:
                result = decide(attempt.look_up)
            except _EnoughMissing:
                result = None
            if not attempt.missing:
                self._wanted |= attempt.asked
                return result  # type: ignore[return-value]
            self._compute(attempt.missing)

    def loss(self, candidate: Candidate, documents: Sequence[int]) -> float:
        """Mean negative log-likelihood of a scored token over these documents, which must be known; nats."""
        total = math.fsum(float(self._known[candidate.key, document].sum()) for document in documents)
        return total / sum(self.documents[document].n_scored_tokens for document in documents)

    def _compute(self, pairs: list[tuple[Candidate, int]]) -> None:
        """One pair a rank, shared and journalled."""
        mine = pairs[control.rank()] if control.rank() < len(pairs) else None

        def evaluate() -> dict[str, Any] | None:
            return self._evaluate(*(mine or pairs[-1]), keep=mine is not None)

        # A rank that fails while the others wait for its share of the weights can only end, and so end them.
        shared = control.from_all(evaluate()) if self._lockstep else control.together(evaluate)
        entries = [entry for entry in shared if entry is not None]
        self._remember(entries)
        control.together(lambda: self._write(entries) if control.rank() == 0 else None)
        if len(self._known) >= _HOPELESS:
            self.refuse_broken_model()
        self.tell()

    def refuse_broken_model(self) -> None:
        """Refuse a model of which no loss at all is finite, on every rank.

        Raises:
            UserError: every loss that was computed is infinite or not a number.
        """
        if self._known and not self._some_finite:
            raise UserError(
                f"none of {len(self._known)} losses is finite, whatever the factors: the model's weights or its dtype are broken; set model.path to "
                "another copy of the model, or model.dtype=float32"
            )

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        try:
            with self._journal.open("a") as file:
                file.write("".join(line_of(entry) for entry in entries))
        except OSError as error:
            raise UserError(
                f"{self._journal} cannot be written ({error.strerror}); free some room on that disk, and run the same command again to go on"
            ) from error

    def _evaluate(self, candidate: Candidate, document: int, keep: bool) -> dict[str, Any] | None:
        if not (keep or self._lockstep):
            return None
        start = time.perf_counter()
        self._rotary.use(self._space.factors(candidate))
        wanted = self.documents[document]
        scored = score(self._model, self._rotary, "long", wanted.tokens, wanted.spans, self._chunk_tokens)
        if not keep:
            return None
        return {
            "candidate": candidate.key,
            "critical_index": candidate.critical_index,
            "attention_factor": candidate.attention_factor,
            "tail": candidate.tail,
            "document": document,
            "nll": scored.nll,
            "answers": scored.nlls,
            "seconds": round(time.perf_counter() - start, 4),
            "rank": control.rank(),
        }

    def _remember(self, entries: Sequence[dict[str, Any]]) -> None:
        for entry in entries:
            losses = np.asarray(entry["answers"], dtype=np.float64)  # null, where a loss was not finite, is read as nan
            self._some_finite |= bool(np.isfinite(losses).any())
            worst = WORST * np.array([stop - start for start, stop in self.documents[entry["document"]].spans])
            self._known[entry["candidate"], entry["document"]] = np.where(np.isfinite(losses), losses, worst)


class _EnoughMissing(Exception):
    """Every rank has something to compute: there is no need to guess on."""


class _Attempt:
    """One run of a decision: what it asked for, and what of it is missing."""

    def __init__(self, known: dict[tuple[str, int], np.ndarray], documents: Sequence[SearchDocument], room: int):
        self._known, self._documents, self._room = known, documents, room
        self._guesses: dict[tuple[str, int], np.ndarray] = {}
        self.asked: set[tuple[str, int]] = set()
        self.missing: list[tuple[Candidate, int]] = []

    def look_up(self, candidate: Candidate, document: int) -> np.ndarray:
        """What is known, or a guess; raises _EnoughMissing when every rank has something to compute."""
        pair = candidate.key, document
        if pair in self._known:
            self.asked.add(pair)
            return self._known[pair]
        if pair not in self._guesses:
            self._guesses[pair] = np.zeros(len(self._documents[document].spans))  # the candidate stays in the race until it is known
            self.missing.append((candidate, document))
            if len(self.missing) == self._room:
                raise _EnoughMissing
        return self._guesses[pair]


def _read_journal(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The evaluations, and how many lines are none; those are taken out of the file, so that the next append joins nothing."""
    lines = journal.read_text(errors="replace").splitlines(keepends=True) if journal.exists() else []
    parsed = [(line, _parsed(line)) for line in lines]
    good = [(line, entry) for line, entry in parsed if entry is not None]
    if len(good) < len(lines):
        io.write_text(journal, "".join(line for line, _ in good))
    return [entry for _, entry in good], len(lines) - len(good)


def line_of(entry: dict[str, Any]) -> str:
    """An evaluation as a line of the journal, with a checksum of its own: a changed loss would change what the search finds."""
    plain = io.finite(entry)
    return json.dumps({**plain, "check": io.fingerprint(plain)}, allow_nan=False) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return None
    if not isinstance(entry, dict) or not {"candidate", "document", "answers", "check"} <= entry.keys():
        return None
    return entry if entry.pop("check") == io.fingerprint(entry) else None
