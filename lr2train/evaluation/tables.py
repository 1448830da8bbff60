"""The tables of an evaluation as text: needles, RULER, retrieval and short tasks, as the paper prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lr2train.evaluation import needles
from lr2train.evaluation.results import TaskScore, cell, grid


def all_tables(result: dict[str, Any], scores: Sequence[TaskScore], models: Sequence[str]) -> str:
    """Every table that the scores fill, one blank line between two.

    Args:
        result: windows, lengths and needle rows, as in ``evaluate.json``.
        scores: of all models and tasks.
        models: labels, in the order of the rows.
    """
    others = [one for one in scores if one.task not in (needles.NEEDLES, needles.TEXT)]
    parts = [
        needle_table(result) if result["rows"] else "",
        by_length(others, models),
        by_task([one for one in others if not one.length_tokens], models),
    ]
    text = "\n\n".join(part for part in parts if part)
    if any(one.failed for one in scores):
        text += "\n\n* some samples failed; scores are of the others. scores.csv counts them."
    return text or "nothing was measured"


def needle_table(result: dict[str, Any]) -> str:
    """The needle comparison: a row for each model and method; the attention factor, then a column for each length.

    A cell holds needle accuracy, answer perplexity and text perplexity.
    """
    width = max(len(row["label"]) for row in result["rows"]) + 2
    lines = [
        "needle accuracy | answer ppl | text ppl",
        " " * width + f"{'attention factor':>18}" + "".join(f"{length:>24}" for length in result["lengths_tokens"]),
    ]
    for row in result["rows"]:
        at = {one["length_tokens"]: one for one in row["by_length"]}
        cells = (_needle_cell(at.get(length)) for length in result["lengths_tokens"])
        lines.append(
            f"{row['label']:<{width}}{row['attention_factor']:>18.3f}" + "".join(f"{cell:>24}" for cell in cells)
        )
    return "\n".join(lines)


def _needle_cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "-"
    return f"{one['accuracy']:.0%} | {_short(one['answer_perplexity'])} | {_short(one['text_perplexity'])}"


def _short(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def by_length(scores: Sequence[TaskScore], models: Sequence[str]) -> str:
    """Tasks with lengths: a table for each task, models down, lengths across."""
    parts = []
    for task in dict.fromkeys(one.task for one in scores if one.length_tokens):
        of_task = {(one.model, one.length_tokens): one for one in scores if one.task == task}
        lengths = sorted({length for _, length in of_task})
        rows = [(model, [cell(of_task.get((model, length))) for length in lengths]) for model in models]
        parts.append(grid(task, [f"{length}" for length in lengths], rows))
    return "\n\n".join(parts)


def by_task(scores: Sequence[TaskScore], models: Sequence[str]) -> str:
    """Tasks without lengths: models down, tasks across (paper, Tables 3 and 4)."""
    if not scores:
        return ""
    found = {(one.model, one.task): one for one in scores}
    tasks = list(dict.fromkeys(one.task for one in scores))
    return grid("score", tasks, [(model, [cell(found.get((model, task))) for task in tasks]) for model in models])
