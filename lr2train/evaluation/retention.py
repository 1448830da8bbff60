"""What a model with a longer window keeps on short benchmarks (paper, Table 4): scores, and shares of a base's scores.

Choice: the first model is the base, usually the model before its window was extended. A share is in percent of the
base's score; the average is the plain mean over the tasks, as in the paper. Cost: a model without the score of a task
has no average either, because a mean over fewer tasks cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def rows(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """A line of CSV for each cell; a missing number is empty."""
    return [
        {"model": one.model, "task": one.task, "score": _digits(one.score), "share_of_base": _digits(one.share)}
        for one in found
    ]


def to_json(found: Sequence[Cell]) -> dict[str, Any]:
    """As plain JSON values, a missing number as None.

    The keys are ``base``, a label, and ``models``: model -> task -> ``score`` and ``share_of_base``.
    """
    models: dict[str, dict[str, Any]] = {}
    for one in found:
        models.setdefault(one.model, {})[one.task] = {
            "score": _or_none(one.score),
            "share_of_base": _or_none(one.share),
        }
    return {"base": found[0].model if found else None, "models": models}


def text(found: Sequence[Cell]) -> str:
    """Two tables, scores and shares, a line a model."""
    if not found:
        return ""
    base = found[0].model
    scores = _table("score, percent", found, {(one.model, one.task): one.score for one in found})
    shares = _table(f"share of {base}, percent", found, {(one.model, one.task): one.share for one in found})
    return f"{scores}\n\n{shares}"


def _with_average(of_model: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    scores = [of_model.get(task, math.nan) for task in tasks]
    average = math.fsum(scores) / len(scores) if scores else math.nan
    return {AVERAGE: average, **dict(zip(tasks, scores, strict=True))}


def _share(score: float, base: float) -> float:
    return 100 * score / base if base else math.nan


def _table(title: str, found: Sequence[Cell], values: Mapping[tuple[str, str], float]) -> str:
    models = list(dict.fromkeys(one.model for one in found))
    tasks = list(dict.fromkeys(one.task for one in found))
    lines = [[title, *tasks], *([model, *(_digits(values[model, task]) or "-" for task in tasks)] for model in models)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _digits(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
