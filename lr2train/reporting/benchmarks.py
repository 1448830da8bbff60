"""The report's section on benchmarks: RULER, retrieval and short tasks, as tables."""

from __future__ import annotations

import math

from lr2train.reporting.inputs import Json, ReportInputs
from lr2train.reporting.page import Missing, heading, table, text


def benchmarks(inputs: ReportInputs) -> str | Missing:
    """Every table of the evaluation."""
    tables = (inputs.evaluation or {}).get("tables") or []
    if not tables:
        return Missing(
            "No benchmark has been run.",
            f"lr2train evaluate run={inputs.folder.resolve().name} eval=ruler",
        )
    sentence = "Scores are percent, higher is better. The best figure of each column is green."
    return heading("Benchmarks", sentence) + "".join(map(_table, tables))


def _table(one: Json) -> str:
    best = [_best(column) for column in zip(*one["rows"], strict=True)]
    rows = [
        [text(str(row[0])), *(_figure(value, top) for value, top in zip(row[1:], best[1:], strict=True))]
        for row in one["rows"]
    ]
    note = f"<p>{text(one['note'])}</p>" if one["note"] else ""
    return table(text(one["title"]), [text(head) for head in one["head"]], rows) + note


def _best(column: tuple) -> float | None:
    """The greatest figure of a column with more than one."""
    figures = [value for value in column if isinstance(value, float) and not math.isnan(value)]
    return max(figures) if len(figures) > 1 else None


def _figure(value: str | int | float | None, best: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    shown = f"{value:.2f}" if isinstance(value, float) else text(str(value))
    return f"<td{' class=best' * (best is not None and value == best)}>{shown}</td>"
