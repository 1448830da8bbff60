"""Gradient descent on factors and attention factor, one track for each critical index.

The needle loss is differentiable in every free value of a candidate. Tracks start from the middle of the bounds. In a
round, each live track is scored on the same documents with its slopes and makes one step of Adam (Kingma and Ba 2015);
then it is projected onto the search space: a non-decreasing tail within the bounds. The tracks with the highest losses
of the latest rounds are dropped, until ``top_k`` are left.

Choice: every coordinate is a share of its range (the tail's in logarithms), so one step size fits all of them. A track
keeps exact values and is scored at the nearest candidate of the grid. So its evaluations go to the journal of all
algorithms, and a killed search resumes from there. Cost: a forward and a backward pass count as three
document-forwards. A descent stays in the basin of its start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lr2train.config import SearchConfig
from lr2train.evolution.fitness import Slope
from lr2train.evolution.genome import ALL, Candidate, Space
from lr2train.evolution.loop import Generation, ranked
from lr2train.evolution.race import CandidateScorer, Scored
from lr2train.run import stream

_BETAS = 0.8, 0.95  # of Adam's moments: a track makes about ten steps
_EPSILON = 1e-8
_LAST_STEP = 0.1  # the last step's size, as a share of the first one's (cosine in between)
_LATEST = 3  # rounds over whose losses tracks are compared: earlier points are far from the present one


@dataclass
class _Track:
    """The way of one critical index through the space.

    Attributes:
        values: float64 [n + 1], shares 0 … 1 of their ranges: the tail's logarithms, then the attention factor.
        losses: mean loss of each round so far, nats a token.
    """

    critical_index: int
    values: np.ndarray
    losses: list[float] = field(default_factory=list)
    documents: int = 0

    def __post_init__(self) -> None:
        self._moments = np.zeros((2, len(self.values)))

    def step(self, slope: np.ndarray, size: float) -> None:
        """One step of Adam against ``slope``, projected onto non-decreasing tails within the bounds."""
        number = len(self.losses)
        for moment, beta, new in zip(self._moments, _BETAS, (slope, slope**2), strict=True):
            moment += (1.0 - beta) * (new - moment)
        first, second = (moment / (1.0 - beta**number) for moment, beta in zip(self._moments, _BETAS, strict=True))
        moved = self.values - size * first / (np.sqrt(second) + _EPSILON)
        self.values = np.clip(np.append(non_decreasing(moved[:-1]), moved[-1]), 0.0, 1.0)

    @property
    def latest(self) -> float:
        """What tracks are compared by."""
        return float(np.mean(self.losses[-_LATEST:]))


def descend(space: Space, scorer: CandidateScorer, seed: int) -> Iterator[Generation]:
    """Yield the start and ``search.generations`` further rounds.

    ``Generation.population`` holds the live tracks at the points that the round scored, by their loss over the latest
    rounds; ``dropped`` those that end with this round.
    """
    settings, fitness = space.settings, scorer.fitness
    tracks = [_Track(index, _middle(space, index)) for index in _starts(space)]
    n_starts = len(tracks)
    seen: set[str] = set()
    order = stream(seed, "search", "descent").permutation(settings.documents).tolist()
    for number in range(settings.generations + 1):
        documents = _documents(order, number, settings.step_documents)
        points = [_candidate(space, track) for track in tracks]
        slopes = fitness.slopes([(point, document) for point in points for document in documents])
        seen.update(point.key for point in points)
        size = _step_size(settings, number)
        for place, track in enumerate(tracks):
            part = slopes[place * len(documents) : (place + 1) * len(documents)]
            track.losses.append(sum(one.loss for one in part) / len(part))
            track.documents += len(documents)
            track.step(_chained(space, track, part), size)
        scored = {
            track.critical_index: Scored(point, track.latest, track.documents)
            for track, point in zip(tracks, points, strict=True)
        }
        tracks.sort(key=lambda track: (track.latest, track.critical_index))
        live = tracks[: settings.live_tracks(n_starts, number + 1)]
        out = [scored[track.critical_index] for track in tracks[len(live) :]]
        yield Generation(number, ranked([scored[track.critical_index] for track in live]), ranked(out), len(seen))
        tracks = live


def _starts(space: Space) -> Sequence[int]:
    """Each critical index, or ``population`` of them, spread evenly."""
    indices = np.array(space.critical_indices)
    n = min(space.settings.population, len(indices))
    return [int(indices[place]) for place in np.linspace(0, len(indices) - 1, n).round().astype(int)]


def _middle(space: Space, critical_index: int) -> np.ndarray:
    """A constant tail and an attention factor in the middle of their ranges."""
    return np.full(space.spectrum.n_dims - critical_index + 1, 0.5)


def _candidate(space: Space, track: _Track) -> Candidate:
    low, high = space.bounds
    tail = tuple(space.on_grid(low * (high / low) ** share) for share in track.values[:-1].tolist())
    return Candidate(track.critical_index, tail, space.attention_factor_at(float(track.values[-1])))


def _chained(space: Space, track: _Track, slopes: Sequence[Slope]) -> np.ndarray:
    """The mean slope in the track's coordinates [n + 1].

    Factors below the critical index follow from the tail's first one: log lambda_i = (i / rcd) log lambda_rcd.
    """
    low, high = space.bounds
    index, settings = track.critical_index, space.settings
    by_factor = np.mean([one.log_rescale for one in slopes], axis=0)
    tail = by_factor[index:].copy()
    if index != ALL:
        tail[0] += by_factor[:index] @ np.arange(index) / index
    factor_range = settings.attention_factor_high - settings.attention_factor_low
    factor = factor_range * np.mean([one.attention_factor for one in slopes])
    return np.append(math.log(high / low) * tail, factor if settings.search_attention_factor else 0.0)


def _documents(order: Sequence[int], number: int, size: int) -> list[int]:
    """The documents of a round, the same for all tracks: in turn."""
    return [order[place % len(order)] for place in range(number * size, (number + 1) * size)]


def _step_size(settings: SearchConfig, number: int) -> float:
    share = number / max(1, settings.generations)
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
