"""Scores of the rows, from what `evaluate` wrote, and their statistics.

A score of a document is 0 … 100. A row has scores [seed, document] at each length; all rows of a cell answer the same
documents, so differences are paired. The seeds and the documents are two crossed samples:

    se^2 = sum over tasks of v_t / (T^2 n_t)  +  v_seed / S  -  sum over tasks of r_t / (T^2 n_t S)

with T tasks, n_t documents of task t, S seeds; v_t the variance of document means, v_seed of seed means, r_t the
residual mean square of the two-way layout, which the first two parts both contain (Searle, Casella and McCulloch,
Variance Components, 1992, section 4.4: expected mean squares). The standard error is at least that of each part alone.

Two standard errors say less where they come from three seeds. So a difference is called one where Student's t is as
sure as two standard errors with many degrees of freedom are (97.7 % on one side). Degrees of freedom: Satterthwaite
(1946), over the three parts, rounded down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np

from lr2train import io
from lr2train.evaluation.needles import TEXT
from lr2train.evaluation.results import folder_name
from lr2train.evolution.final import student_t

SURE = NormalDist().cdf(2.0)  # the chance at which a difference is called one
_MANY = 1000  # degrees of freedom at which Student's t is the normal distribution
Scores = dict[str, dict[int, np.ndarray]]
"""Task -> length -> float64 [documents], in the order of their numbers."""
Stratum = tuple[str, int]
"""Task and length."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, documents and seeds.

    Attributes:
        mean: in points.
        se: standard error over seeds and documents.
        spread: standard deviation of the seeds' means; nan with one seed.
        degrees: of freedom of the standard error.
        by_document: (task, length) -> mean over the seeds of each document, float64 [document]; cells answer the same
            documents of a task at a length.
    """

    mean: float
    se: float
    spread: float = math.nan
    degrees: float = math.inf
    by_document: Mapping[Stratum, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sign(self) -> str:
        """ ">", "<", or "~" where the error leaves the sign open."""
        if not math.isfinite(self.mean) or self.mean == 0.0:
            return "~"
        if self.se > 0.0:
            degrees = max(1, int(min(self.degrees, _MANY) + 1e-9))  # 2 less a rounding error is 2
            if student_t(abs(self.mean) / self.se, degrees) <= SURE:
                return "~"
        return ">" if self.mean > 0 else "<"


def scores_in(folder: Path, model: str = "") -> dict[str, Scores]:
    """Label of a model -> its scores, from the ``evaluate.json`` and the samples in a run folder.

    Args:
        folder: of the run.
        model: only labels that end so.
    """
    result, found = io.read_json(folder / "evaluate.json"), {}
    for score in result["scores"]:
        label, task, measures = score["model"], score["task"], list(score["measures"])
        if not label.endswith(model) or not measures:
            continue
        scores: Scores = found.setdefault(label, {})
        if task not in scores:
            file = folder / "evaluation" / folder_name(label) / f"{task}.jsonl"
            scores[task] = _samples(file, measures[0])
    return found


def _samples(file: Path, measure: str) -> dict[int, np.ndarray]:
    by_length: dict[int, dict[int, float]] = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        value = line.get(measure)
        by_length.setdefault(line["length_tokens"], {})[line["number"]] = math.nan if value is None else float(value)
    return {length: np.array([values[number] for number in sorted(values)]) for length, values in by_length.items()}


def at(seeds: Sequence[Scores], lengths: Sequence[int]) -> dict[Stratum, np.ndarray]:
    """The scores of a row over some lengths: for each task (but plain text) and length, float64 [seed, document]."""
    tasks = sorted({task for scores in seeds for task in scores} - {TEXT})
    stacked: dict[Stratum, np.ndarray] = {}
    for task in tasks:
        for length in lengths:
            each = [scores.get(task, {}).get(length) for scores in seeds]
            if all(one is not None for one in each) and each:
                stacked[task, length] = np.stack([one for one in each if one is not None])
    return stacked


def estimate(scores: Mapping[Stratum, np.ndarray]) -> Estimate:
    """Mean over strata, each float64 [seed, document]; the strata count alike."""
    if not scores:
        return Estimate(math.nan, math.nan)
    strata = list(scores.values())
    n, seeds = len(strata), strata[0].shape[0]
    of_seed = np.mean([one.mean(axis=1) for one in strata], axis=0)
    by_document = {stratum: one.mean(axis=0) for stratum, one in scores.items()}
    # parts of the squared error, each with its degrees of freedom
    of_documents = [(_variance(one) / len(one) / n**2, len(one) - 1) for one in by_document.values()]
    square, parts, spread = sum(part for part, _ in of_documents), of_documents, math.nan
    if seeds > 1:
        by_seed, spread = _variance(of_seed) / seeds, math.sqrt(_variance(of_seed))
        residuals = [(_residual(one) / one.size / n**2, (seeds - 1) * (one.shape[1] - 1)) for one in strata]
        square = max(square + by_seed - sum(part for part, _ in residuals), square, by_seed)
        parts = [*of_documents, (by_seed, seeds - 1), *residuals]
    degrees = max(satterthwaite(square, parts), float(seeds > 1) * (seeds - 1))  # the seeds' part alone has so many
    return Estimate(float(of_seed.mean()), math.sqrt(square), spread, degrees, by_document)


def scaled(one: Estimate, scale: float, mean: float) -> Estimate:
    """``mean`` with the errors of an estimate times ``scale``."""
    by_document = {stratum: scale * values for stratum, values in one.by_document.items()}
    return Estimate(mean, scale * one.se, scale * one.spread, one.degrees, by_document)


def satterthwaite(square: float, parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a squared error that is a sum or difference of (part, its degrees of freedom)."""
    below = sum(part**2 / degrees for part, degrees in parts if degrees)
    return square**2 / below if below else math.inf


def _variance(values: np.ndarray) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0


def _residual(scores: np.ndarray) -> float:
    """Mean square of what neither the seed nor the document explains."""
    left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    degrees = (scores.shape[0] - 1) * (scores.shape[1] - 1)
    return float((left**2).sum() / degrees) if degrees else 0.0


def difference(a: Mapping[Stratum, np.ndarray], b: Mapping[Stratum, np.ndarray]) -> Estimate:
    """a minus b, document by document and seed by seed; both have the same strata."""
    assert a.keys() == b.keys()
    return estimate({stratum: one - b[stratum] for stratum, one in a.items()})


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over cells.

    Cells answer the same documents and so err alike: twice their covariance over documents enters the squared error. A
    negative one is left out, so that chance cannot shrink an error. Seeds count as independent between cells.
    """
    known = [one for one in estimates if math.isfinite(one.mean)]
    if not known:
        return Estimate(math.nan, math.nan)
    n = len(known)
    parts = [((one.se / n) ** 2, one.degrees) for one in known]
    square = sum(part for part, _ in parts)
    degrees = satterthwaite(square, parts)
    square += sum(2 * max(0.0, _covariance(a, b)) / n**2 for a, b in combinations(known, 2))
    return Estimate(
        sum(one.mean for one in known) / n, math.sqrt(square), sum(one.spread for one in known) / n, degrees
    )


def _covariance(a: Estimate, b: Estimate) -> float:
    """Of two means, over the documents that both have."""
    pairs = [(a.by_document[stratum], b.by_document[stratum]) for stratum in a.by_document.keys() & b.by_document]
    common = sum(float(np.cov(x, y)[0, 1]) / len(x) for x, y in pairs if len(x) > 1)
    return common / max(1, len(a.by_document) * len(b.by_document))


def text_loss(seeds: Sequence[Mapping[str, Mapping[int, np.ndarray]]], length: int) -> dict[Stratum, np.ndarray]:
    """Mean loss of plain text (nats a token) of each document at a length, float64 [seed, document]."""
    each = [scores.get(TEXT, {}).get(length) for scores in seeds]
    if not each or any(one is None for one in each):
        return {}
    return {(TEXT, length): np.stack([one for one in each if one is not None])}
