"""Gradient descent on factors and attention factor, from the most promising critical indices.

The needle loss is differentiable in every free value of a candidate but the critical index. So the search has two
parts. First, a start for each critical index is scored by forward passes alone, all on the same documents; the best
``top_k`` go on. Then each of these tracks makes ``generations`` steps of Adam (Kingma and Ba 2015), on documents in
turn, and is projected onto the search space: a non-decreasing tail within the bounds.

Choice: every coordinate is a share of its range (the tail's in logarithms), so one step size fits all of them. A track
keeps exact values and is evaluated at the nearest candidate of the grid. So its evaluations go to the journal of all
algorithms, and a killed search resumes from there. A slope in the critical index itself exists (factors below it are
smooth in it), and was dropped: on the tiny model it led away from the better indices. Cost: a forward and a backward
pass count as three document-forwards. A descent stays in the basin of its start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lr2train.config import SearchConfig
from lr2train.evolution.final import CandidateScorer, Scored
from lr2train.evolution.fitness import Slope
from lr2train.evolution.genome import ALL, Candidate, Space
from lr2train.evolution.loop import Generation, ranked
from lr2train.run import stream

_BETAS = 0.8, 0.95  # of Adam's moments: a track makes about ten steps
_EPSILON = 1e-8
_LAST_STEP = 0.1  # the last step's size, as a share of the first one's (cosine in between)


@dataclass
class _Track:
    """The way of one start through the space.

    Attributes:
        values: float64 [n + 1], shares 0 … 1 of their ranges: the logarithms of the tail, then the attention factor.
        losses: of each document that it has met, nats a token.
        steps: how many were made.
    """

    critical_index: int
    values: np.ndarray
    losses: list[float] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self._moments = np.zeros((2, len(self.values)))

    def step(self, slope: np.ndarray, size: float) -> None:
        """One step of Adam against ``slope``, projected onto non-decreasing tails within the bounds."""
        self.steps += 1
        for moment, beta, new in zip(self._moments, _BETAS, (slope, slope**2), strict=True):
            moment += (1.0 - beta) * (new - moment)
        first, second = (moment / (1.0 - beta**self.steps) for moment, beta in zip(self._moments, _BETAS, strict=True))
        moved = self.values - size * first / (np.sqrt(second) + _EPSILON)
        self.values = np.clip(np.append(non_decreasing(moved[:-1]), moved[-1]), 0.0, 1.0)


def descend(space: Space, scorer: CandidateScorer, seed: int) -> Iterator[Generation]:
    """Yield the scored starts, then ``search.generations`` rounds of one step a track.

    ``Generation.population`` holds the starts, best first; then the points that the tracks have reached, by the loss of
    the latest half of their rounds, each at the point that the round began with.
    """
    settings, fitness = space.settings, scorer.fitness
    order = stream(seed, "search", "descent").permutation(settings.documents).tolist()
    tracks = {_candidate(space, track): track for track in _starts(space)}
    seen = {one.key for one in tracks}
    population = ranked(scorer.on(list(tracks), _in_turn(order, 0, settings.screen_documents)))
    yield Generation(0, population, len(seen))
    live = [tracks[one.candidate] for one in population[: settings.top_k]]
    for number in range(settings.generations):
        first = settings.screen_documents + number * settings.step_documents
        documents = _in_turn(order, first, settings.step_documents)
        points = [_candidate(space, track) for track in live]
        slopes = fitness.slopes([(point, document) for point in points for document in documents])
        scored = []
        for place, track in enumerate(live):
            part = slopes[place * len(documents) : (place + 1) * len(documents)]
            track.losses += [one.loss for one in part]
            track.step(_chained(space, track, part), _step_size(settings, number))
            recent = track.losses[len(track.losses) // 2 :]  # early points are far from the present one
            scored.append(Scored(_candidate(space, track), float(np.mean(recent)), len(recent)))
        seen.update(one.candidate.key for one in scored)
        yield Generation(number + 1, ranked(scored), len(seen))


def _starts(space: Space) -> list[_Track]:
    """A constant tail and an attention factor in the middle of their ranges, for each critical index.

    Where every factor is free: the curves from which LongRoPE v1 starts.
    """
    if space.all_dims:
        low, high = (math.log(bound) for bound in space.bounds)
        shares = [np.clip((np.log(curve) - low) / (high - low), 0.0, 1.0) for curve in space.curves()]
        return [_Track(ALL, np.append(one, 0.5)) for one in shares]
    indices = space.spread_indices
    return [_Track(index, np.full(space.spectrum.n_dims - index + 1, 0.5)) for index in indices]


def _candidate(space: Space, track: _Track) -> Candidate:
    low, high = space.bounds
    tail = tuple(space.on_grid(low * (high / low) ** share) for share in track.values[:-1].tolist())
    return Candidate(track.critical_index, tail, space.attention_factor_at(float(track.values[-1])))


def _chained(space: Space, track: _Track, slopes: Sequence[Slope]) -> np.ndarray:
    """The mean slope in the track's coordinates [n + 1].

    Factors below the critical index follow from the tail's first one.
    """
    low, high = space.bounds
    index, settings = track.critical_index, space.settings
    by_factor = np.mean([one.log_rescale for one in slopes], axis=0)
    tail = by_factor[index:].copy()
    tail[0] += by_factor[:index] @ space.head_slopes(_candidate(space, track))
    factor_range = settings.attention_factor_high - settings.attention_factor_low
    factor = factor_range * np.mean([one.attention_factor for one in slopes])
    return np.append(math.log(high / low) * tail, factor if settings.search_attention_factor else 0.0)


def _in_turn(order: Sequence[int], first: int, n: int) -> list[int]:
    """``n`` documents from place ``first`` on; after the last one the first one follows."""
    return [order[place % len(order)] for place in range(first, first + n)]


def _step_size(settings: SearchConfig, number: int) -> float:
    share = number / max(1, settings.generations - 1)
    return settings.step_size * (_LAST_STEP + (1.0 - _LAST_STEP) * 0.5 * (1.0 + math.cos(math.pi * share)))


def non_decreasing(values: np.ndarray) -> np.ndarray:
    """The nearest non-decreasing numbers in the least-squares sense: isotonic regression, by pooling of neighbours."""
    pools: list[tuple[float, int]] = []  # (mean, size)
    for value in values.tolist():
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        pools.append((mean, size))
    return np.array([mean for mean, size in pools for _ in range(size)])
