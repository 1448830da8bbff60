"""Surrogate-assisted evolution: a Gaussian process over all evaluations chooses children, documents and parents.

The model. For candidate c on document d:

    log(loss + FLOOR)  =  mean + f(x_c) + u_c + b_d + noise

f is smooth in x_c: the logarithms of the rescale factors (root mean square over dimensions) and the attention factor.
u_c belongs to the candidate alone, b_d to the document (its difficulty).

Choice: documents are random effects, like the blocks of F-race, so candidates that were scored on different documents
can be compared. Neighbouring candidates share what is known of either. Many mutations are proposed, and only the
promising ones are evaluated (Jin, "Surrogate-assisted evolutionary computation", 2011). Each child is evaluated once;
the rest of a generation's budget goes to the candidates with the lowest confidence bounds. Cost: a reported loss is an
estimate, and every round of evaluations factorises a few covariance matrices of at most ``MOST`` rows. Generations go
to ``search``, as those of ``loop.evolve`` do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lr2train import ranks
from lr2train.evolution.fitness import Fitness
from lr2train.evolution.genome import Candidate, Space
from lr2train.evolution.loop import Generation, ranked
from lr2train.evolution.race import Scored
from lr2train.parallel import control
from lr2train.run import stream

FLOOR = 0.01  # nats; losses below it count as equal
MOST = 1500  # the latest evaluations enter the process: a Cholesky factor of this size takes a tenth of a second
# Share of the children that are evaluated whatever their estimates: the process may be wrong.
_UNSCREENED = 0.25
# Grids of hyperparameters; the likelihood chooses.
_LENGTHS = (0.09, 0.18, 0.36)  # length scale: root mean square log-ratio of the factors
_ATTENTION_LENGTHS = (0.05, 0.15)  # length scale of the attention factor
_NOISE_SHARES = (0.25, 0.5)  # share of the total variance that is noise
_OWN, _DOCUMENT = 0.05, 0.5  # variances of u_c and b_d, as shares of the total variance
# Decimals to which estimates are rounded before they are compared: another processor changes only later decimals.
_DIGITS = 9
_BLOCK = 64  # rows of a forward substitution at one time


def evolve_surrogate(space: Space, observations: Observations, seed: int) -> Iterator[Generation]:
    """Yield generation 0 and ``search.generations`` more, with as many children as ``loop.evolve`` makes.

    ``Generation.population`` holds the generation's children and its parents, by estimated loss; no candidate is
    ``dropped``.
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
        observations.observe_promising(
            [*children, *parents], round((settings.looks - 1) * len(children)), settings.documents, rng
        )
        population = ranked(observations.estimates([*children, *parents]))
        parents = [one.candidate for one in population[: settings.top_k]]
        yield Generation(index, population, (), len(seen))


def _promising(
    space: Space, observations: Observations, parents: Sequence[Candidate], seen: set[str], rng: np.random.Generator
) -> list[Candidate]:
    """Children of the parents, chosen among ``search.proposals`` mutations a place.

    A quarter is taken as it was drawn, the others by the lowest confidence bound.
    """
    places = space.settings.population - len(parents)
    proposed = space.fill([], list(parents), places * space.settings.proposals, rng, frozenset(seen))
    free = math.ceil(_UNSCREENED * places)
    best = observations.by_lower_bound(proposed[free:], deviations=0.5)
    return [*proposed[:free], *best[: places - free]]


class Observations:
    """All evaluations so far, and the estimates that follow from them.

    Rank 0 computes the estimates for all ranks: another processor's last bits would lead the ranks to different
    decisions.
    """

    def __init__(self, space: Space, fitness: Fitness) -> None:
        self.space, self._fitness = space, fitness
        self._documents_of: dict[str, list[int]] = {}
        self._observed: list[tuple[Candidate, int, float]] = []
        self._process: GaussianProcess | None = None

    def observe(self, pairs: Sequence[tuple[Candidate, int]]) -> None:
        """Evaluate (candidate, document) pairs, spread over the ranks."""
        self._fitness.settle(lambda losses: [losses(candidate, document) for candidate, document in pairs])
        for candidate, document in pairs:
            self._documents_of.setdefault(candidate.key, []).append(document)
            self._observed.append((candidate, document, self._fitness.loss(candidate, [document])))
        self._process = None

    def observe_promising(
        self, candidates: Sequence[Candidate], n: int, documents: int, rng: np.random.Generator
    ) -> None:
        """Spend ``n`` evaluations on the most promising candidates.

        Each is on one of the first ``documents`` documents that is new to the candidate. Bounds are computed anew after
        every eighth of the candidates.
        """
        while n > 0 and (pairs := self._new_pairs(candidates, min(n, max(2, len(candidates) // 8)), documents, rng)):
            self.observe(pairs)
            n -= len(pairs)

    def final(self, finalists: Sequence[Candidate]) -> list[Scored]:
        """The finalists, best first, after ``SearchConfig.final_looks`` more evaluations, on the final's documents
        too.
        """
        settings = self.space.settings
        rng = stream(settings.seed, "search", "final")
        self.observe_promising(finalists, settings.final_looks(len(self._observed)), len(self._fitness.documents), rng)
        return list(ranked(self.estimates(finalists)))

    def estimates(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Each candidate with its estimated loss on a document of mean difficulty, nats."""
        means, _ = self._predicted(candidates)
        return [
            Scored(candidate, max(math.exp(mean) - FLOOR, 0.0), len(self._documents_of.get(candidate.key, ())))
            for candidate, mean in zip(candidates, means, strict=True)
        ]

    def by_lower_bound(self, candidates: Sequence[Candidate], deviations: float) -> list[Candidate]:
        """Sorted by the lower confidence bound, the estimate minus ``deviations`` standard deviations; ties by key."""
        means, spreads = self._predicted(candidates)
        bounds = {
            one.key: mean - deviations * spread for one, mean, spread in zip(candidates, means, spreads, strict=True)
        }
        return sorted(candidates, key=lambda one: (round(bounds[one.key], _DIGITS), one.key))

    def _new_pairs(
        self, candidates: Sequence[Candidate], n: int, documents: int, rng: np.random.Generator
    ) -> list[tuple[Candidate, int]]:
        pairs = []
        for candidate in self.by_lower_bound(candidates, deviations=1.0):
            left = sorted(set(range(documents)) - set(self._documents_of.get(candidate.key, ())))
            if left and len(pairs) < n:
                pairs.append((candidate, left[rng.integers(len(left))]))
        return pairs

    def _predicted(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        """Means and standard deviations of log(loss + FLOOR), computed on rank 0."""
        return control.from_rank_0(self._predicted_here(candidates) if ranks.rank() == 0 else ([], []))

    def _predicted_here(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
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
        """[candidates, D + 1]: log factors over sqrt(D), whose distance is a root mean square, and the attention
        factor.
        """
        factors, n_dims = [self.space.factors(one) for one in candidates], self.space.spectrum.n_dims
        logs = np.log([one.rescale for one in factors]).reshape(-1, n_dims) / math.sqrt(n_dims)  # also of no candidates
        return np.column_stack([logs, [one.attention_factor for one in factors]])


@dataclass(frozen=True)
class _Hyperparameters:
    length: float
    attention_length: float
    noise_share: float


class GaussianProcess:
    """The Gaussian process of the module's formula (Rasmussen and Williams 2006, algorithm 2.1).

    The hyperparameters are those of a small grid with the largest likelihood.

    Args:
        features: [candidates, D + 1], log factors over sqrt(D), then the attention factor.
        candidate: int [evaluations], row of ``features``.
        document: int [evaluations].
        values: float [evaluations], log(loss + FLOOR).
        rows: the candidate's key -> its row of ``features``.
    """

    def __init__(
        self,
        features: np.ndarray,
        candidate: np.ndarray,
        document: np.ndarray,
        values: np.ndarray,
        rows: dict[str, int],
    ) -> None:
        self._features, self._candidate, self._rows = features, candidate, rows
        self._mean, self._variance = float(values.mean()), max(float(values.var()), 1e-6)
        # [evaluations, evaluations], the covariance that candidates do not decide: a wide prior of the mean (1), and
        # the documents.
        shared = _DOCUMENT * (document[:, None] == document[None]) + 1.0
        grid = (_Hyperparameters(*choice) for choice in itertools.product(_LENGTHS, _ATTENTION_LENGTHS, _NOISE_SHARES))
        factors = ((hyper, self._factor(hyper, shared)) for hyper in grid)
        self._hyper, factor = max(factors, key=lambda fit: _log_likelihood(fit[1], values - self._mean))
        inverse = np.linalg.inv(factor)  # only of the chosen one: it costs six times as much as the factor
        self._inverse, self._weights = inverse.T, inverse.T @ (inverse @ (values - self._mean))

    def predict(self, features: np.ndarray, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of ``log(loss + FLOOR)`` on a document of mean difficulty, each [candidates]."""
        cross = self._smooth(features, self._features, self._hyper)
        for row, key in enumerate(keys):
            if key in self._rows:
                cross[row, self._rows[key]] += self._variance * _OWN
        cross = cross[:, self._candidate] + self._variance
        prior = self._variance * (1.0 - self._hyper.noise_share + _OWN + 1.0)
        left = prior - ((cross @ self._inverse) ** 2).sum(1)
        return self._mean + cross @ self._weights, np.sqrt(np.maximum(left, 0.0))

    def _factor(self, hyper: _Hyperparameters, shared: np.ndarray) -> np.ndarray:
        """Cholesky factor [evaluations, evaluations] of the covariance."""
        between = self._smooth(self._features, self._features, hyper)  # [candidates, candidates]
        between[np.diag_indices_from(between)] += self._variance * _OWN
        others = shared.copy()
        others[np.diag_indices_from(others)] += hyper.noise_share
        return np.linalg.cholesky(between[np.ix_(self._candidate, self._candidate)] + self._variance * others)

    def _smooth(self, a: np.ndarray, b: np.ndarray, hyper: _Hyperparameters) -> np.ndarray:
        """Covariance of f between the rows of ``a`` and ``b``: squared exponential in factors and attention factor."""
        scale = np.array([hyper.length] * (a.shape[1] - 1) + [hyper.attention_length])
        a, b = a / scale, b / scale
        distance = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T, 0.0)
        return self._variance * (1.0 - hyper.noise_share) * np.exp(-0.5 * distance)


def _log_likelihood(factor: np.ndarray, values: np.ndarray) -> float:
    """Log likelihood of ``values`` [n], but for a constant, from the Cholesky factor [n, n] of their covariance."""
    whitened = values.copy()
    for start in range(0, len(values), _BLOCK):  # forward substitution: solves factor @ whitened = values in O(n^2)
        block = slice(start, start + _BLOCK)
        whitened[block] = np.linalg.solve(factor[block, block], whitened[block])
        whitened[start + _BLOCK :] -= factor[start + _BLOCK :, block] @ whitened[block]
    return float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())
