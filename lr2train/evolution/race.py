"""Racing: who is scored on how many documents.

Choice: all candidates of a generation meet the documents in the same order, the hardest first. After each, a candidate outside the best
``top_k`` so far is dropped if its losses already exceed what the ``top_k``-th best candidate has lost on all documents (it cannot enter any more: no loss is
negative), or if a paired one-sided test over the answers seen says that it is worse than the ``top_k``-th best of the race (as F-race does it: Birattari et
al. 2002, and irace after it). Whoever is not dropped is scored on everything, so survivors are compared on the same documents. Cost: with a finite
``racing_z`` an unlucky candidate is dropped wrongly now and then; with ``inf`` the result is that of no racing at all.
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
    """A candidate and what it lost.

    Attributes:
        loss: mean negative log-likelihood of a scored token, nats.
        documents: how many it was scored on.
        dropped: it left the race before the last document; ``loss`` is over those that it met.
    """

    candidate: Candidate
    loss: float
    documents: int
    dropped: bool = False

    @property
    def perplexity(self) -> float:
        """exp(loss), lower is better."""
        return math.exp(min(self.loss, 700.0))


class CandidateScorer:
    """Scores the candidates of a generation against those that were kept, under the settings of the space.

    Args:
        space: its settings say whether there is racing, and how daring.
        fitness: whose first ``search.documents`` documents the generations are scored on, and the further ones the finalists.
    """

    def __init__(self, space: Space, fitness: Fitness):
        self._fitness, self._knobs = fitness, space.settings

    def __call__(self, candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> list[Scored]:
        """The candidates in their order, dropped ones among them. ``kept`` have been scored on everything before."""
        settings = self._knobs

        def decide(losses: Losses) -> list[list[int]]:
            order = _hardest_first(losses, kept, settings.documents)
            if settings.racing:
                return race(losses, candidates, kept, settings.top_k, order, settings.racing_z, settings.racing_answers)
            return without_racing(losses, candidates, order)

        return self._scored(candidates, self._fitness.settle(decide), settings.documents)

    def final(self, finalists: Sequence[Candidate]) -> list[Scored]:
        """The finalists, best first, on the further documents alone: on those of the generations they were chosen, luck included.

        They race for the first place.
        """
        settings, order = self._knobs, range(self._knobs.documents, len(self._fitness.documents))

        def decide(losses: Losses) -> list[list[int]]:
            if settings.racing:
                return race(losses, finalists, [], 1, order, settings.racing_z, settings.racing_answers)
            return without_racing(losses, finalists, order)

        scored = self._scored(finalists, self._fitness.settle(decide), len(order))
        return sorted(scored, key=lambda one: (one.dropped, -one.documents, one.loss, one.candidate.key))

    def _scored(self, candidates: Sequence[Candidate], seen: list[list[int]], of: int) -> list[Scored]:
        return [
            Scored(candidate, self._fitness.loss(candidate, documents), len(documents), len(documents) < of)
            for candidate, documents in zip(candidates, seen, strict=True)
        ]


def without_racing(losses: Losses, candidates: Sequence[Candidate], order: Sequence[int]) -> list[list[int]]:
    """No racing: every candidate on every document. Pure."""
    for candidate in candidates:
        for document in order:
            losses(candidate, document)
    return [list(order) for _ in candidates]


def race(
    losses: Losses, candidates: Sequence[Candidate], kept: Sequence[Candidate], keep: int, order: Sequence[int], z: float, min_answers: int
) -> list[list[int]]:
    """The documents that each candidate was scored on, in ``order``; all of them for whoever was not dropped. Pure.

    Args:
        losses: looks up the losses of (candidate, document).
        candidates: racing.
        kept: known on all documents; never dropped.
        keep: places to be won, by candidates and kept ones together.
        order: of the documents.
        z: standard errors of the mean difference to the ``keep``-th best by which a candidate must be worse to be dropped.
        min_answers: compared before that.
    """
    limit = _kth([_total([losses(one, document) for document in order]) for one in kept], keep)
    runs: dict[Candidate, list[np.ndarray]] = {one: [] for one in (*kept, *candidates)}
    live = list(candidates)
    for document in order:
        for one in (*kept, *live):
            runs[one].append(losses(one, document))
        ranked = sorted((*kept, *live), key=lambda one: (_total(runs[one]), one.key))
        last_in = runs[ranked[min(keep, len(ranked)) - 1]]
        out = {one for one in ranked[keep:] if _total(runs[one]) > limit or _is_worse(runs[one], last_in, z, min_answers)}
        live = [one for one in live if one not in out]
    return [list(order[: len(runs[one])]) for one in candidates]


def _is_worse(mine: list[np.ndarray], other: list[np.ndarray], z: float, min_answers: int) -> bool:
    differences = np.concatenate(mine) - np.concatenate(other)
    if len(differences) < min_answers or math.isinf(z):
        return False
    return bool(differences.mean() > z * differences.std(ddof=1) / math.sqrt(len(differences)))


def _hardest_first(losses: Losses, kept: Sequence[Candidate], documents: int) -> list[int]:
    """By the loss of those that were kept: where they lose most, others can lose most. As they are numbered while nobody is kept."""
    hardness = [-math.fsum(float(losses(one, document).sum()) for one in kept) for document in range(documents)]
    return sorted(range(documents), key=lambda document: (hardness[document], document))


def _total(run: Sequence[np.ndarray]) -> float:
    """Exactly rounded, so that it does not depend on the order of the documents."""
    return math.fsum(float(losses.sum()) for losses in run)


def _kth(totals: list[float], k: int) -> float:
    return sorted(totals)[k - 1] if len(totals) >= k else math.inf
