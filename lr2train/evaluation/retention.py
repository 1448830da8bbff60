"""What a model with a longer window keeps on short benchmarks (paper, Table 4): scores, and shares of a base's scores.

Choice: the first model is the base, usually the model before its window was extended. A share is in percent of the
base's score; the average is the plain mean over the tasks, as in the paper. Cost: a model without the score of a task
has no average either, because a mean over fewer tasks cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """One score of one model.

    Attributes:
        model: label of the model.
        task: name of the task, or ``AVERAGE``.
        score: percent; nan where it is missing.
        share: of the base's score, percent; nan where one of both is missing, or the base has 0.
    """

    model: str
    task: str
    score: float
    share: float


def cells(scores: Mapping[str, Mapping[str, float]]) -> list[Cell]:
    """All cells, model by model, the average first.

    Args:
        scores: model -> task -> score in percent. The first model is the base. A task that only some models have has
            nan for the others.
    """
    if not scores:
        return []
    tasks = list(dict.fromkeys(task for of_model in scores.values() for task in of_model))
    whole = {model: _with_average(of_model, tasks) for model, of_model in scores.items()}
    base = next(iter(whole.values()))
    return [
        Cell(model, task, score, _share(score, base[task]))
        for model, of_model in whole.items()
        for task, score in of_model.items()
    ]


def _with_average(of_model: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    scores = [of_model.get(task, math.nan) for task in tasks]
    average = math.fsum(scores) / len(scores) if scores else math.nan
    return {AVERAGE: average, **dict(zip(tasks, scores, strict=True))}


def _share(score: float, base: float) -> float:
    return 100 * score / base if base else math.nan
