"""The scores of candidates, the final among the best of them, and how sure its result is.

Choice: the finalists meet the final's documents in turn. After each document the leader is compared with each rival
over the documents that both have seen, pair by pair. The chance that the leader is better on unseen documents is
Student's t with a prior: the true difference is centred at 0, and its standard deviation is ``1 / sqrt(PRIOR)`` of that
of a document's difference. A bootstrap of a few documents claims too much, and so does a t without a prior that is
asked after every document (figures in docs/SEARCH.md). A rival leaves as soon as the chance reaches ``search.settle``.
Cost: where finalists differ less than the prior expects, the chance is too high; then the choice matters little, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lr2train.config import Algorithm
from lr2train.evolution.fitness import Fitness, Losses
from lr2train.evolution.genome import Candidate, Space

# Documents that the prior is worth: the true difference of two finalists is expected within a quarter of the standard
# deviation of a document's difference. The two tracks of a descent on a tiny base model differed by 0.18 of it.
PRIOR = 16
_LEAST = 4  # documents before a rival may leave


@dataclass(frozen=True)
class Scored:
    """A candidate and its loss.

    Attributes:
        loss: mean negative log-likelihood of a scored token, nats.
        documents: number of documents that it was scored on.
    """

    candidate: Candidate
    loss: float
    documents: int

    @property
    def perplexity(self) -> float:
        """exp(loss), lower is better."""
        return math.exp(min(self.loss, 700.0))  # float64 overflows at exp(710)


@dataclass(frozen=True)
class Confidence:
    """How sure the winner is.

    Attributes:
        chance: that the winner is better than the runner-up on unseen documents, 0 … 1.
        documents: over how many documents they were compared.
        nats: mean loss of the runner-up minus that of the winner, nats a token.
        missing: about how many further documents would settle it; 0 where it is settled, None where no number would.
        spared: document-forwards that the final did not need.
        unseen: whether the documents are others than those by which the two were chosen.
    """

    chance: float
    documents: int
    nats: float
    missing: int | None
    spared: int
    unseen: bool

    def __str__(self) -> str:
        if self.nats == 0.0:
            return "winner and runner-up are equal on these documents"
        text = f"better than the runner-up with a chance of {self.chance:.0%} ({self.documents} document"
        text += "s" if self.documents > 1 else ""
        text += "" if self.unseen else ", those they were chosen on"
        if self.missing:
            text += f"; about {self.missing} more would settle it"
        return text + (f"; {self.spared} document-forwards spared)" if self.spared else ")")


class CandidateScorer:
    """Scores the candidates of a generation, and the finalists.

    Args:
        space: ``space.settings`` has the number of documents and ``settle``.
        fitness: its first ``search.documents`` documents are for the generations, the further ones for the final.

    Attributes:
        fitness: as given.
    """

    def __init__(self, space: Space, fitness: Fitness):
        self.fitness, self._settings = fitness, space.settings

    def __call__(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Score ``candidates``, in their order, each on every document of the generations."""
        return self.on(candidates, range(self._settings.documents))

    def on(self, candidates: Sequence[Candidate], documents: Sequence[int]) -> list[Scored]:
        """Score ``candidates``, in their order, each on these documents."""
        self.fitness.settle(lambda losses: [losses(one, document) for one in candidates for document in documents])
        return [Scored(one, self.fitness.loss(one, documents), len(documents)) for one in candidates]

    def final(self, best: Sequence[Scored]) -> tuple[list[Scored], Confidence | None]:
        """The finalists, best first, scored on the final's documents alone, and how sure the winner is.

        The finalists were chosen on the documents of the generations, so their losses there are too low. Without
        documents of the final, the documents of the generations decide. There, a descent's tracks have met each
        document at another point: then the best stay as they are, and nothing is said about the winner.
        """
        if not self._settings.final_documents and self._settings.algorithm == Algorithm.gradient:
            return list(best), None
        finalists = list(dict.fromkeys(one.candidate for one in best))  # tracks may meet
        n_first, n_all = self._settings.documents, len(self.fitness.documents)
        order = range(n_first, n_all) if n_all > n_first else range(n_first)
        sizes = [one.n_scored_tokens for one in self.fitness.documents]

        def decide(losses: Losses) -> list[int]:
            def loss(candidate: Candidate, document: int) -> float:
                return float(losses(candidate, document).sum()) / sizes[document]

            return settled(loss, finalists, order, self._settings.settle)

        seen = self.fitness.settle(decide)
        scored = [Scored(one, self.fitness.loss(one, order[:n]), n) for one, n in zip(finalists, seen, strict=True)]
        # By the mean over documents, as everything that is said of the winner: documents may differ in scored tokens.
        ranked = sorted(scored, key=lambda one: (-one.documents, self._mean(one, order), one.candidate.key))
        if len(ranked) < 2:
            return ranked, None
        rivals = [self._differences(ranked[0], one, order) for one in ranked[1:]]
        closest = min(rivals, key=chance)
        missing = further_documents(closest, self._settings.settle)
        spared = sum(len(order) - n for n in seen)
        found = Confidence(chance(closest), len(closest), float(closest.mean()), missing, spared, n_all > n_first)
        return ranked, found

    def _mean(self, finalist: Scored, order: Sequence[int]) -> float:
        """Mean loss over the documents that ``finalist`` met, nats a token."""
        met = order[: finalist.documents]
        return math.fsum(self.fitness.loss(finalist.candidate, [one]) for one in met) / len(met)

    def _differences(self, winner: Scored, rival: Scored, order: Sequence[int]) -> np.ndarray:
        """Loss of ``rival`` minus loss of ``winner`` on each document that both met, nats a token."""
        loss = self.fitness.loss
        return np.array(
            [loss(rival.candidate, [one]) - loss(winner.candidate, [one]) for one in order[: rival.documents]]
        )


def settled(
    loss: Callable[[Candidate, int], float], finalists: Sequence[Candidate], order: Sequence[int], settle: float
) -> list[int]:
    """How many documents of ``order`` each finalist meets until ``settle`` is reached. Pure.

    Args:
        loss: looks up the loss of (candidate, document), nats a token.
        finalists: at least one.
        order: of the documents.
        settle: the chance at which a rival leaves; 1: none leaves.
    """
    met: dict[Candidate, list[float]] = {one: [] for one in finalists}
    live = list(finalists)
    for document in order:
        for one in live:
            met[one].append(loss(one, document))
        leader = min(live, key=lambda one: (math.fsum(met[one]), one.key))
        if len(met[leader]) >= _LEAST and settle < 1:
            lead = np.array(met[leader])
            live = [one for one in live if one is leader or chance(np.array(met[one]) - lead) < settle]
        if len(live) == 1 < len(finalists):
            break
    return [len(met[one]) for one in finalists]


def chance(differences: np.ndarray) -> float:
    """The chance that the mean over all documents is above 0, from the ``differences`` of some; the module says how."""
    n, mean = len(differences), float(differences.mean())
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if spread == 0.0:
        return 0.5 if mean == 0.0 or n == 1 else float(mean > 0.0)
    return student_t(mean * math.sqrt(n) / spread * math.sqrt(n / (n + PRIOR)), n - 1)


def further_documents(differences: np.ndarray, settle: float) -> int | None:
    """About how many more documents bring ``chance`` to ``settle``, if these stand for all; None: no number would."""
    n, mean, spread = len(differences), float(differences.mean()), float(differences.std())
    if chance(differences) >= settle:
        return 0
    if settle >= 1 or mean <= 0 or spread == 0.0:
        return None
    wanted = NormalDist().inv_cdf(settle)
    # n / sqrt(n + PRIOR) * mean / spread = wanted, solved for n; the t-distribution is near the normal one by then.
    square = (wanted * spread / mean) ** 2
    return max(1, math.ceil((square + math.sqrt(square**2 + 4 * square * PRIOR)) / 2) - n)


def student_t(t: float, degrees: int) -> float:
    """The distribution function of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):  # terms of the series
        total += term
        term *= k / (k + 1) * cosine**2
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + 0.5 * within


def as_json(confidence: Confidence | None) -> dict[str, Any] | None:
    """The contents of ``search.json``; None where there is no runner-up."""
    return None if confidence is None else {**vars(confidence), "words": str(confidence)}
