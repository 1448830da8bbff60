"""The losses of candidates on documents: each is computed once, on one of the ranks, and kept in a journal.

Fitness is the needle-driven perplexity exp(mean negative log-likelihood over the answer tokens of all documents)
(paper, Section 3.2).

Choice: a decision of the search (a loop over all candidates, the final) is a pure function of losses that it looks up.
``Fitness.settle`` runs the decision on the known losses, lets the ranks compute the first losses that are missing, and
runs it again, until none is missing. So neither the number of ranks nor a kill can change the result. While a loss is
missing the decision continues with a guess, to find work for the other ranks. Cost: on many ranks some of these losses
are computed in vain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lr2train import journals, ranks
from lr2train.config import SLOPE_FORWARDS, UserError
from lr2train.evolution.documents import SearchDocument
from lr2train.evolution.genome import Candidate, Space
from lr2train.model.rotary import WindowRotary
from lr2train.model.score import score
from lr2train.model.slopes import SlopeModel
from lr2train.parallel import control

T = TypeVar("T")
Losses = Callable[[Candidate, int], np.ndarray]
"""(candidate, document) -> negative log-likelihood of each answer of the document, nats, float64 [answers]."""

_HOPELESS = 8  # evaluations after which a model without any finite loss is refused: no candidate is to blame
_ENTRY = ("candidate", "document", "answers")  # what every line of the journal holds
WORST = 50.0  # nats a token, in the place of a loss that is not finite


@dataclass(frozen=True)
class Slope:
    """A candidate's loss on one document, and its derivatives.

    Attributes:
        loss: mean negative log-likelihood of a scored token, nats.
        log_rescale: float64 [D], derivative in the logarithm of each rescale factor.
        attention_factor: derivative in the attention factor.
    """

    loss: float
    log_rescale: np.ndarray
    attention_factor: float


class Fitness:
    """The losses of candidates on documents.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        rotary: gets the factors of each candidate before its forward pass.
        space: turns a candidate into factors.
        documents: of the generations, then of the final.
        journal: a file with one JSON line an evaluation; new lines are appended.
        chunk_tokens: length of a chunk of the forward pass; 0: the whole document at once.
        lockstep: the weights are divided over the ranks (ZeRO-3), so every rank joins every forward pass.
        tell: called on every rank after every round of evaluations.

    Attributes:
        recovered: number of evaluations in the journal at the start.
        damaged: number of journal lines that were no evaluations, such as one that a kill cut short; these are computed
            again.
        computed: number of evaluations in the journal now.
        document_forwards: number of evaluations that decisions have used; ``computed`` also counts those that were
            computed in vain.
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
        entries, self.damaged = control.from_rank_0(journals.read(journal, _ENTRY) if ranks.rank() == 0 else ([], 0))
        self._known: dict[tuple[str, int], np.ndarray] = {}
        self._slopes: dict[tuple[str, int], Slope] = {}
        self._some_finite = False
        self._remember(entries)
        self._wanted: set[tuple[str, int]] = set()
        self._wanted_slopes: set[tuple[str, int]] = set()
        self.recovered = self.computed

    @property
    def computed(self) -> int:
        return len(self._known) + SLOPE_FORWARDS * len(self._slopes)

    @property
    def document_forwards(self) -> int:
        return len(self._wanted) + SLOPE_FORWARDS * len(self._wanted_slopes)

    def settle(self, decide: Callable[[Losses], T]) -> T:
        """Return ``decide(losses)`` once every loss that it looks up is computed.

        ``decide`` must be pure: it is run several times. A run that met a missing loss got a guess, and its result is
        thrown away.

        Raises:
            UserError, RuntimeError: one rank failed while it evaluated; raised on every rank.
        """
        while True:
            attempt = _Attempt(self._known, self.documents, ranks.world())
            try:
                result = decide(attempt.look_up)
            except _EnoughMissing:
                result = None
            if not attempt.missing:
                self._wanted |= attempt.asked
                return result  # type: ignore[return-value]
            self._compute(attempt.missing, self._evaluate)

    def loss(self, candidate: Candidate, documents: Sequence[int]) -> float:
        """Mean negative log-likelihood of a scored token over these documents, nats; every loss must be known."""
        total = math.fsum(float(self._known[candidate.key, document].sum()) for document in documents)
        return total / sum(self.documents[document].n_scored_tokens for document in documents)

    def slopes(self, pairs: Sequence[tuple[Candidate, int]]) -> list[Slope]:
        """The losses of (candidate, document) pairs with their derivatives, spread over the ranks. A collective.

        Raises:
            UserError, RuntimeError: one rank failed while it evaluated; raised on every rank.
        """
        keys = [(candidate.key, document) for candidate, document in pairs]
        # of two equal pairs one is computed: tracks may meet
        missing = [pair for key, pair in dict(zip(keys, pairs, strict=True)).items() if key not in self._slopes]
        for first in range(0, len(missing), ranks.world()):
            self._compute(missing[first : first + ranks.world()], self._evaluate_slopes)
        self._wanted_slopes.update(keys)
        return [self._slopes[key] for key in keys]

    @cached_property
    def _slope_model(self) -> SlopeModel:
        return SlopeModel(self._model, self._rotary, recompute=self._chunk_tokens > 0)

    def _compute(
        self,
        pairs: list[tuple[Candidate, int]],
        evaluate_pair: Callable[[Candidate, int], dict[str, Any]],
    ) -> None:
        """Compute one pair on each rank; all ranks get all losses, and rank 0 appends them to the journal."""
        mine = pairs[ranks.rank()] if ranks.rank() < len(pairs) else None

        # A rank without a pair passes the last pair: in lockstep it joins that forward pass and drops the result.
        def evaluate() -> dict[str, Any] | None:
            if mine is None and not self._lockstep:
                return None
            entry = evaluate_pair(*(mine or pairs[-1]))
            return None if mine is None else entry

        # In lockstep a failed rank must end at once, and so end the job: the others wait for its part of the weights.
        shared = control.from_all(evaluate()) if self._lockstep else control.together(evaluate)
        entries = [entry for entry in shared if entry is not None]
        self._remember(entries)
        control.together(lambda: journals.append(self._journal, entries) if ranks.rank() == 0 else None)
        if len(self._known) + len(self._slopes) >= _HOPELESS:
            self.refuse_broken_model()
        self.tell()

    def refuse_broken_model(self) -> None:
        """Refuse a model without any finite loss.

        Raises:
            UserError: every computed loss is infinite or nan; raised on every rank.
        """
        n_losses = len(self._known) + len(self._slopes)
        if n_losses and not self._some_finite:
            raise UserError(
                f"none of {n_losses} losses is finite, whatever the factors: "
                "the model's weights or its dtype are broken; "
                "set model.path to another copy of the model, or model.dtype=float32"
            )

    def _evaluate(self, candidate: Candidate, document: int) -> dict[str, Any]:
        """The journal's entry of a loss."""
        start, wanted = time.perf_counter(), self.documents[document]
        self._rotary.use(self._space.factors(candidate))
        scored = score(self._model, self._rotary, "long", wanted.tokens, wanted.spans, self._chunk_tokens)
        return _entry(candidate, document, scored.nlls, start)

    def _evaluate_slopes(self, candidate: Candidate, document: int) -> dict[str, Any]:
        """The journal's entry of a loss with its slopes, for the sum over scored tokens."""
        start, wanted = time.perf_counter(), self.documents[document]
        self._rotary.use(self._space.factors(candidate))
        found = self._slope_model(wanted.tokens, wanted.spans)
        slopes = {"log_rescale": found.log_rescale.tolist(), "attention_factor": found.attention_factor}
        return _entry(candidate, document, found.nlls, start) | {"slopes": slopes}

    def _remember(self, entries: Sequence[dict[str, Any]]) -> None:
        for entry in entries:
            # JSON has null for a loss that was not finite; numpy reads nan.
            losses = np.asarray(entry["answers"], dtype=np.float64)
            self._some_finite |= bool(np.isfinite(losses).any())
            wanted = self.documents[entry["document"]]
            worst = WORST * np.array([stop - start for start, stop in wanted.spans])
            losses = np.where(np.isfinite(losses), losses, worst)
            key = entry["candidate"], entry["document"]
            if "slopes" not in entry:
                self._known[key] = losses
                continue
            slopes, n = entry["slopes"], wanted.n_scored_tokens
            by_factor = np.asarray(slopes["log_rescale"], dtype=np.float64) / n
            factor = float(np.asarray(slopes["attention_factor"], dtype=np.float64)) / n
            # A candidate without a finite loss has no slope: nothing moves it but earlier steps, and its loss drops it.
            self._slopes[key] = Slope(
                math.fsum(losses.tolist()) / n,
                np.nan_to_num(by_factor, posinf=0, neginf=0),
                factor if math.isfinite(factor) else 0.0,
            )


def _entry(candidate: Candidate, document: int, nlls: Sequence[float], start: float) -> dict[str, Any]:
    """A line of the journal; ``start`` is the time at which the evaluation began."""
    return {
        "candidate": candidate.key,
        "critical_index": candidate.critical_index,
        "attention_factor": candidate.attention_factor,
        "tail": candidate.tail,
        "document": document,
        "nll": math.fsum(nlls),
        "answers": nlls,
        "seconds": round(time.perf_counter() - start, 4),
        "rank": ranks.rank(),
    }


class _EnoughMissing(Exception):
    """As many losses are missing as there are ranks; the decision need not continue with guesses."""


class _Attempt:
    """One run of a decision.

    Attributes:
        asked: (candidate key, document) pairs whose losses were known.
        missing: pairs whose losses were guessed, at most one a rank.
    """

    def __init__(self, known: dict[tuple[str, int], np.ndarray], documents: Sequence[SearchDocument], room: int):
        self._known, self._documents, self._room = known, documents, room
        self._guesses: dict[tuple[str, int], np.ndarray] = {}
        self.asked: set[tuple[str, int]] = set()
        self.missing: list[tuple[Candidate, int]] = []

    def look_up(self, candidate: Candidate, document: int) -> np.ndarray:
        """The known losses, or a guess. Raises _EnoughMissing as soon as there is a missing loss for every rank."""
        pair = candidate.key, document
        if pair in self._known:
            self.asked.add(pair)
            return self._known[pair]
        if pair not in self._guesses:
            # No loss is smaller, so the final goes on with this candidate.
            self._guesses[pair] = np.zeros(len(self._documents[document].spans))
            self.missing.append((candidate, document))
            if len(self.missing) == self._room:
                raise _EnoughMissing
        return self._guesses[pair]
