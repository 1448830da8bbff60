"""Racing: how many documents each candidate of a generation is scored on.

Choice: all candidates meet the documents in one order, the hardest first. After each document, a candidate outside the
best ``top_k`` is dropped in two cases. Certain: its losses so far exceed the losses of the ``top_k``-th kept candidate
on all documents, and no loss is negative. Likely: a paired one-sided test over the answers so far says that it is worse
than the ``top_k``-th best of the race, as in F-race (Birattari et al. 2002) and irace. A candidate that is not dropped
is scored on every document, so survivors are compared on equal terms. Cost: with a finite ``racing_z`` an unlucky
candidate is dropped wrongly now and then. With ``inf`` only certain losers are dropped, and the best ``top_k`` are
those of a search without racing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.evolution.fitness import Fitness, Losses
from lr2train.evolution.genome import Candidate, Space


@dataclass(frozen=True)
class Scored:
    """A candidate and its loss.

    Attributes:
        loss: mean negative log-likelihood of a scored token, nats.
        documents: number of documents that it was scored on.
        dropped: it left the race before the last document; ``loss`` covers the documents before.
    """

    candidate: Candidate
    loss: float
    documents: int
    dropped: bool = False

    @property
    def perplexity(self) -> float:
        """exp(loss), lower is better."""
        return math.exp(min(self.loss, 700.0))  # float64 overflows at exp(710)


class CandidateScorer:
    """Scores the candidates of a generation, with racing or without it.

    Args:
        space: ``space.settings`` switches racing on and sets its limits.
        fitness: its first ``search.documents`` documents are for the generations, the further ones for the final.

    Attributes:
        fitness: as given.
    """

    def __init__(self, space: Space, fitness: Fitness):
        self.fitness, self._settings = fitness, space.settings

    def __call__(self, candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> list[Scored]:
        """Score ``candidates``, in their order, against ``kept``, which were scored on all documents before."""
        settings = self._settings

        def decide(losses: Losses) -> list[list[int]]:
            order = _hardest_first(losses, kept, settings.documents)
            if settings.racing:
                return race(losses, candidates, kept, settings.top_k, order, settings.racing_z, settings.racing_answers)
            return without_racing(losses, candidates, order)

        return self._scored(candidates, self.fitness.settle(decide), settings.documents)

    def final(self, finalists: Sequence[Candidate]) -> list[Scored]:
        """The finalists, best first, scored on the final's documents alone; with racing, they race for the first place.

        The finalists were chosen on the documents of the generations, so their losses there are too low.
        """
        settings, order = self._settings, range(self._settings.documents, len(self.fitness.documents))

        def decide(losses: Losses) -> list[list[int]]:
            if settings.racing:
                return race(losses, finalists, [], 1, order, settings.racing_z, settings.racing_answers)
            return without_racing(losses, finalists, order)

        return by_place(self._scored(finalists, self.fitness.settle(decide), len(order)))

    def _scored(self, candidates: Sequence[Candidate], seen: list[list[int]], n_documents: int) -> list[Scored]:
        return [
            Scored(candidate, self.fitness.loss(candidate, documents), len(documents), len(documents) < n_documents)
            for candidate, documents in zip(candidates, seen, strict=True)
        ]


def by_place(scored: Sequence[Scored]) -> list[Scored]:
    """Best first. Dropped candidates come last: the more documents, the better; then the lower loss, then the key."""
    return sorted(scored, key=lambda one: (one.dropped, -one.documents, one.loss, one.candidate.key))


def without_racing(losses: Losses, candidates: Sequence[Candidate], order: Sequence[int]) -> list[list[int]]:
    """Look up every candidate on every document; returns the documents of each candidate. Pure."""
    for candidate in candidates:
        for document in order:
            losses(candidate, document)
    return [list(order) for _ in candidates]


def race(
    losses: Losses,
    candidates: Sequence[Candidate],
    kept: Sequence[Candidate],
    keep: int,
    order: Sequence[int],
    z: float,
    min_answers: int,
) -> list[list[int]]:
    """The documents that each candidate meets, in ``order``; all of them for a candidate that is not dropped. Pure.

    Args:
        losses: looks up the losses of (candidate, document).
        candidates: race for the places.
        kept: known on all documents; never dropped.
        keep: number of places, for candidates and kept ones together.
        order: of the documents.
        z: a candidate is dropped where its mean difference to the ``keep``-th best exceeds ``z`` standard errors.
        min_answers: the least number of answers for that comparison.
    """
    limit = _kth([_total([losses(one, document) for document in order]) for one in kept], keep)
    # Losses so far, one array a document.
    runs: dict[Candidate, list[np.ndarray]] = {one: [] for one in (*kept, *candidates)}
    live = list(candidates)
    for document in order:
        for one in (*kept, *live):
            runs[one].append(losses(one, document))
        ranked = sorted((*kept, *live), key=lambda one: (_total(runs[one]), one.key))
        last_in = runs[ranked[min(keep, len(ranked)) - 1]]
        # Certain losers, then likely losers; the best ``keep`` always stay.
        out = {
            one for one in ranked[keep:] if _total(runs[one]) > limit or _is_worse(runs[one], last_in, z, min_answers)
        }
        live = [one for one in live if one not in out]
    return [list(order[: len(runs[one])]) for one in candidates]


def _is_worse(mine: list[np.ndarray], other: list[np.ndarray], z: float, min_answers: int) -> bool:
    """Whether mean > z * s / sqrt(n) over the paired differences of n answers, s their standard deviation."""
    differences = np.concatenate(mine) - np.concatenate(other)
    if len(differences) < min_answers or math.isinf(z):
        return False
    return bool(differences.mean() > z * differences.std(ddof=1) / math.sqrt(len(differences)))


def _hardest_first(losses: Losses, kept: Sequence[Candidate], documents: int) -> list[int]:
    """Documents by the total loss of the kept candidates, largest first; by number in generation 0.

    Where the kept candidates lose most, other candidates can differ most.
    """
    hardness = [-math.fsum(float(losses(one, document).sum()) for one in kept) for document in range(documents)]
    return sorted(range(documents), key=lambda document: (hardness[document], document))


def _total(run: Sequence[np.ndarray]) -> float:
    """Rounded once (fsum), so the order of the documents does not change the last bits."""
    return math.fsum(float(losses.sum()) for losses in run)


def _kth(totals: list[float], k: int) -> float:
    return sorted(totals)[k - 1] if len(totals) >= k else math.inf
