"""CMA-ES over five parameters, on the same fitness as the paper's algorithm.

Choice: a point holds the critical index, three heights of the tail and the attention factor, not a factor for each
dimension. The tail rises linearly between its heights. The package ``cmaes`` samples such points and adapts its
distribution to their ranking; "with margin" (Hamano et al. 2022) keeps it from collapsing onto one critical index,
which is an integer. Cost: tails with steps are out of reach.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, ScoreCandidates, ranked
from lr2train.evolution.race import Scored, by_place
from lr2train.run import stream

SIGMA = 0.3  # standard deviation of the first samples, as a share of each range: they cover the space


def evolve_cmaes(space: Space, score: ScoreCandidates, seed: int) -> Iterator[Generation]:
    """Yield ``search.generations`` + 1 generations of ``population - top_k`` samples.

    These are as many as ``loop.evolve`` makes children. Arguments and results are those of ``loop.evolve``;
    ``Generation.population`` holds the ``top_k`` best so far and this generation's samples.
    """
    from cmaes import CMAwM

    assert not space.all_dims, "refused by Space"
    settings, n_indices = space.settings, len(space.critical_indices)
    bounds = np.array([[0.0, 1.0]] * 4 + [[0.0, max(n_indices - 1, 1)]])
    steps = np.array([0.0] * 4 + [1.0])  # 0: continuous; 1: whole numbers
    optimizer = CMAwM(
        mean=bounds.mean(1), sigma=SIGMA, bounds=bounds, steps=steps, cov=np.diag((bounds[:, 1] - bounds[:, 0]) ** 2),
        population_size=settings.population - settings.top_k, seed=int(stream(seed, "cmaes").integers(2**31)),
    )  # fmt: skip
    best: tuple[Scored, ...] = ()
    seen: set[str] = set()
    for index in range(settings.generations + 1):
        asked = [optimizer.ask() for _ in range(optimizer.population_size)]
        samples = [candidate_of(space, point) for point, _ in asked]
        known = {one.candidate.key: one for one in best}
        new = list({sample.key: sample for sample in samples if sample.key not in known}.values())
        scored = [*score(new, [one.candidate for one in best]), *best]
        # CMA-ES uses the ranking alone, so a place stands for the loss: dropped candidates can be ranked too.
        place = {one.candidate.key: number for number, one in enumerate(by_place(scored))}
        optimizer.tell([(told, float(place[sample.key])) for (_, told), sample in zip(asked, samples, strict=True)])
        seen.update(place)
        population = ranked([one for one in scored if not one.dropped])
        best = population[: settings.top_k]
        yield Generation(index, population, ranked([one for one in scored if one.dropped]), len(seen))


def candidate_of(space: Space, point: np.ndarray) -> Candidate:
    """The candidate of a point of five numbers.

    Args:
        space: bounds and grid.
        point: three shares in [0, 1] for the tail's heights at its start, middle and end, each of the range that is
            left above the height before; a share in [0, 1] for the attention factor; the number of the critical index
            in ``space.critical_indices``.
    """
    low, high = space.bounds
    heights = [low]
    for share in point[:3]:
        heights.append(heights[-1] + float(np.clip(share, 0.0, 1.0)) * (high - heights[-1]))
    index = space.critical_indices[int(np.clip(round(point[4]), 0, len(space.critical_indices) - 1))]
    tail = np.interp(np.linspace(0.0, 2.0, space.spectrum.n_dims - index), [0.0, 1.0, 2.0], heights[1:])
    return Candidate(
        index, tuple(space.on_grid(value) for value in tail.tolist()), space.attention_factor_at(float(point[3]))
    )
