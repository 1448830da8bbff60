"""Evolution with a surrogate: what every evaluation tells of all candidates decides who is made, who is looked at again, and who stays.

Choice: one Gaussian process over everything evaluated so far,

    log(loss + FLOOR) of candidate c on document d  =  mean + f(x_c) + u_c + b_d + noise,

with f smooth in the candidate's factors (their logarithms, root mean square over dimensions) and its attention factor, u_c the candidate's own, b_d how
hard the document is. So a candidate that saw one document is compared with another that saw another one, neighbours vouch for each other,
and of many mutations only those that promise something are evaluated (Jin, "Surrogate-assisted evolutionary computation", 2011; documents as blocks
as in F-race). A generation's budget goes to each child once, then to whoever may yet be among the best (the lowest estimate minus its deviation).
Cost: ``loss`` is an estimate, and a few covariance matrices are inverted per generation, of at most ``MOST`` evaluations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.evolution.fitness import Fitness
from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, ranked
from lr2train.evolution.race import Scored
from lr2train.parallel import control
from lr2train.run import stream

FLOOR = 0.01  # nats: answers known better than this are all alike
MOST = 1500  # evaluations that the process looks at, the latest: a matrix of so many takes a tenth of a second
_UNSCREENED = 0.25  # of the children are evaluated whatever the process thinks of them
_LENGTHS = (0.09, 0.18, 0.36)  # root mean square log-ratio of factors over which losses are alike; the likelihood chooses
_ATTENTION_LENGTHS = (0.05, 0.15)
_NOISE_SHARES = (0.25, 0.5)  # of the variance that documents and candidates do not explain
_OWN, _DOCUMENT = 0.05, 0.5  # variances of u_c and b_d, as shares of all
_DIGITS = 9  # estimates are compared so far: less than what another processor's last bit can move


def evolve_surrogate(space: Space, observations: Observations, seed: int) -> Iterator[Generation]:
    """Yield generation 0 and ``generations`` more, of as many children as ``loop.evolve`` makes.

    ``Generation.population`` is this generation's children and its parents, by estimated loss; nobody is ``dropped``.
    """
    settings = space.settings
    seen: set[str] = set()
    parents: list[Candidate] = []
    for index in range(settings.generations + 1):
        rng = stream(seed, "search", index)
        children = _promising(space, observations, parents, seen, rng) if parents else space.initial(rng)
        seen.update(child.key for child in children)
        turn = itertools.cycle(rng.permutation(settings.documents).tolist())
        observations.observe([(child, next(turn)) for child in children])
        observations.observe_promising([*children, *parents], round((settings.looks - 1) * len(children)), settings.documents, rng)
        population = ranked(observations.estimates([*children, *parents]))
        parents = [one.candidate for one in population[: settings.top_k]]
        yield Generation(index, population, (), len(seen))


def _promising(
    space: Space, observations: Observations, parents: Sequence[Candidate], seen: set[str], rng: np.random.Generator
) -> list[Candidate]:
    """Children of the parents: of ``search.proposals`` for every place those with the lowest estimates, and a share as they come."""
    places = space.settings.population - len(parents)
    proposed = space.fill([], list(parents), places * space.settings.proposals, rng, frozenset(seen))
    free = math.ceil(_UNSCREENED * places)
    best = observations.by_lower_bound(proposed[free:], deviations=0.5)
    return [*proposed[:free], *best[: places - free]]


class Observations:
    """All evaluations so far and what they say of candidates. Decisions are rank 0's: another processor's last bits must not divide the ranks."""

    def __init__(self, space: Space, fitness: Fitness) -> None:
        self.space, self._fitness = space, fitness
        self._met: dict[str, list[int]] = {}
        self._observed: list[tuple[Candidate, int, float]] = []
        self._process: GaussianProcess | None = None

    def observe(self, pairs: Sequence[tuple[Candidate, int]]) -> None:
        """Evaluate (candidate, document) pairs, spread over the ranks."""
        self._fitness.settle(lambda losses: [losses(candidate, document) for candidate, document in pairs])
        for candidate, document in pairs:
            self._met.setdefault(candidate.key, []).append(document)
            self._observed.append((candidate, document, self._fitness.loss(candidate, [document])))
        self._process = None

    def observe_promising(self, field: Sequence[Candidate], n: int, documents: int, rng: np.random.Generator) -> None:
        """``n`` evaluations of the most promising of the field, each on one of the first ``documents`` that it has not met."""
        while n > 0 and (pairs := self._unmet(field, min(n, max(2, len(field) // 8)), documents, rng)):
            self.observe(pairs)
            n -= len(pairs)

    def final(self, finalists: Sequence[Candidate]) -> list[Scored]:
        """The finalists, best first, once the most promising of them were evaluated on all documents, the further ones among them.

        It takes ``SearchConfig.final_looks`` evaluations.
        """
        settings = self.space.settings
        rng = stream(settings.seed, "search", "final")
        self.observe_promising(finalists, settings.final_looks(len(self._observed)), len(self._fitness.documents), rng)
        return list(ranked(self.estimates(finalists)))

    def estimates(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Each with its estimated loss over all documents, nats."""
        means, _ = self._predicted(candidates)
        return [
            Scored(one, max(math.exp(mean) - FLOOR, 0.0), len(self._met.get(one.key, ())))
            for one, mean in zip(candidates, means, strict=True)
        ]

    def by_lower_bound(self, candidates: Sequence[Candidate], deviations: float) -> list[Candidate]:
        """Lowest estimate minus so many standard deviations first; ties by key."""
        means, spreads = self._predicted(candidates)
        promise = {one.key: mean - deviations * spread for one, mean, spread in zip(candidates, means, spreads, strict=True)}
        return sorted(candidates, key=lambda one: (round(promise[one.key], _DIGITS), one.key))

    def _unmet(self, field: Sequence[Candidate], n: int, documents: int, rng: np.random.Generator) -> list[tuple[Candidate, int]]:
        pairs = []
        for one in self.by_lower_bound(field, deviations=1.0):
            left = sorted(set(range(documents)) - set(self._met.get(one.key, ())))
            if left and len(pairs) < n:
                pairs.append((one, left[rng.integers(len(left))]))
        return pairs

    def _predicted(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        """Means and standard deviations, as rank 0 has them."""
        return control.from_rank_0(self._of_process(candidates) if control.rank() == 0 else ([], []))

    def _of_process(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        if self._process is None:
            recent = self._observed[-MOST:]
            known = {candidate.key: candidate for candidate, _, _ in recent}
            rows = {key: row for row, key in enumerate(known)}
            self._process = GaussianProcess(
                self._features(list(known.values())),
                np.array([rows[candidate.key] for candidate, _, _ in recent]),
                np.array([document for _, document, _ in recent]),
                np.log(np.array([loss for _, _, loss in recent]) + FLOOR),
                rows,
            )
        means, spreads = self._process.predict(self._features(candidates), [one.key for one in candidates])
        return np.round(means, _DIGITS).tolist(), spreads.tolist()

    def _features(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[candidates, D + 1]: log factors over sqrt(D), so that a distance is their root mean square; the attention factor."""
        factors, n_dims = [self.space.factors(one) for one in candidates], self.space.spectrum.n_dims
        logs = np.log([one.rescale for one in factors]).reshape(-1, n_dims) / math.sqrt(n_dims)  # a space that is used up proposes nobody
        return np.column_stack([logs, [one.attention_factor for one in factors]])


@dataclass(frozen=True)
class _Hyperparameters:
    length: float
    attention_length: float
    noise_share: float


class GaussianProcess:
    """The Gaussian process of the module's formula; its shape is the likeliest of a small grid (Rasmussen and Williams 2006, algorithm 2.1).

    Args:
        features: [candidates, F + 1], the last of them the attention factor.
        candidate, document: int [evaluations].
        values: float [evaluations], log(loss + FLOOR).
        rows: row of ``features`` by the candidate's key.
    """

    def __init__(self, features: np.ndarray, candidate: np.ndarray, document: np.ndarray, values: np.ndarray, rows: dict[str, int]) -> None:
        self._features, self._candidate, self._rows = features, candidate, rows
        self._mean, self._variance = float(values.mean()), max(float(values.var()), 1e-6)
        same_document = document[:, None] == document[None]
        grid = (_Hyperparameters(*choice) for choice in itertools.product(_LENGTHS, _ATTENTION_LENGTHS, _NOISE_SHARES))
        fits = ((shape, *self._fit(shape, same_document, values - self._mean)) for shape in grid)
        self._shape, _, self._inverse, self._weights = max(fits, key=lambda fit: fit[1])

    def predict(self, features: np.ndarray, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of ``log(loss + FLOOR)`` on a document of mean hardness, each [candidates]."""
        cross = self._smooth(features, self._features, self._shape)
        for row, key in enumerate(keys):
            if key in self._rows:
                cross[row, self._rows[key]] += self._variance * _OWN
        cross = cross[:, self._candidate] + self._variance
        prior = self._variance * (1.0 - self._shape.noise_share + _OWN + 1.0)
        left = prior - ((cross @ self._inverse) ** 2).sum(1)
        return self._mean + cross @ self._weights, np.sqrt(np.maximum(left, 0.0))

    def _fit(self, shape: _Hyperparameters, same_document: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """(log likelihood, transposed inverse of the Cholesky factor, weights). The constant 1 in the covariance leaves the mean open."""
        between = self._smooth(self._features, self._features, shape) + self._variance * _OWN * np.eye(len(self._features))
        covariance = between[np.ix_(self._candidate, self._candidate)]
        covariance += self._variance * (_DOCUMENT * same_document + 1.0 + shape.noise_share * np.eye(len(values)))
        factor = np.linalg.cholesky(covariance)
        inverse = np.linalg.inv(factor)
        whitened = inverse @ values
        likelihood = -0.5 * whitened @ whitened - np.log(np.diag(factor)).sum()
        return float(likelihood), inverse.T, inverse.T @ whitened

    def _smooth(self, a: np.ndarray, b: np.ndarray, shape: _Hyperparameters) -> np.ndarray:
        """Covariance of f: a Gaussian of the distance in factors and attention factor."""
        scale = np.array([shape.length] * (a.shape[1] - 1) + [shape.attention_length])
        a, b = a / scale, b / scale
        distance = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T, 0.0)
        return self._variance * (1.0 - shape.noise_share) * np.exp(-0.5 * distance)
