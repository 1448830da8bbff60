"""The tables of an evaluation: needles, RULER, retrieval and short tasks, as the paper prints them.

Choice: a table is plain values; text, the report page and JSON show the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lr2train.evaluation import infinitebench, loft, longbench, needles, retention
from lr2train.evaluation.results import TaskScore
from lr2train.evaluation.ruler import NAMES as RULER
from lr2train.evaluation.ruler import tables as ruler_tables

Value = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table whose empty cells are None.

    Attributes:
        title: what the cells are.
        head: one title for each column.
        rows: the first cell of each names the row.
        note: what the reader must know, such as tasks that are missing; empty if nothing.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""

    def text(self) -> str:
        """The table with two decimals under its title, then its note."""
        lines = [self.head, *(tuple(map(_cell, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        return "\n".join([self.title, *shown, *([self.note] if self.note else [])])

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _cell(cell: Value) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def all_tables(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Every table that the scores fill, but that of the needles.

    Args:
        scores: of all models and tasks.
        models: labels, in the order of the rows; the first is the base.
    """
    made = [*_perplexity(scores, models), *_ruler(scores, models), *_retrieval(scores, models)]
    made += [*_plugins(scores, models), *_short(scores, models)]
    if failed := _failed(scores):
        made.append(failed)
    return made


def _perplexity(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Perplexity of text by length, where no needle was measured: the needle comparison has it beside."""
    if any(one.task == needles.NEEDLES for one in scores):
        return []
    texts = (one for one in scores if one.task == needles.TEXT)
    found = {(one.model, one.length_tokens): math.exp(min(one.main, 700.0)) for one in texts}
    lengths = sorted({length for _, length in found})
    rows = tuple((model, *(found.get((model, length)) for length in lengths)) for model in models)
    return [Table("Perplexity of held-out text, by length", ("", *map(str, lengths)), rows)] if found else []


def _ruler(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Averages by length (paper, Table 2), then the tasks of each model (paper, Tables 8 and 9)."""
    of_model: dict[str, ruler_tables.Scores] = {
        model: {
            (one.task, one.length_tokens): one.main
            for one in scores
            if one.model == model and one.task in RULER and not math.isnan(one.main)
        }
        for model in models
    }
    of_model = {model: found for model, found in of_model.items() if found}
    if not of_model:
        return []
    average = ruler_tables.by_length(of_model)
    title = f"RULER, average over the tasks; effective: longest with at least {ruler_tables.LLAMA2_7B_AT_4K}"
    tables = [Table(title, average.head, average.rows, average.note)]
    for model, found in of_model.items():
        by_task = ruler_tables.by_task(found)
        tables.append(Table(f"RULER by task, {model}", by_task.head, by_task.rows))
    return tables


def _retrieval(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Retrieval from real documents: each benchmark with its average (paper, Table 3)."""
    tables = []
    for title, names in (("LOFT", loft.NAMES), ("InfiniteBench", infinitebench.NAMES), ("LongBench", longbench.NAMES)):
        found = {(one.model, one.task): one.main for one in scores if one.task in names}
        tasks = [name for name in names if any((model, name) in found for model in models)]
        if tasks:
            short = [name.split("_", 1)[1] for name in tasks]
            rows = tuple(_with_mean(model, [found.get((model, task), math.nan) for task in tasks]) for model in models)
            tables.append(Table(title, ("", "average", *short), rows))
    return tables


def _with_mean(label: str, values: Sequence[float]) -> tuple[Value, ...]:
    return (label, math.fsum(values) / len(values), *values)


_OURS = {*RULER, *loft.NAMES, *infinitebench.NAMES, *longbench.NAMES, needles.NEEDLES, needles.TEXT}


def _plugins(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Tasks of a user's own package that have lengths: a table each."""
    by_length = [one for one in scores if one.task not in _OURS and one.length_tokens]
    tables = []
    for task in dict.fromkeys(one.task for one in by_length):
        own = [one for one in by_length if one.task == task]
        found = {(one.model, one.length_tokens): one.main for one in own}
        lengths = sorted({one.length_tokens for one in own})
        rows = tuple((model, *(found.get((model, length)) for length in lengths)) for model in models)
        title = f"{task}: {next(iter(own[0].measures))} by length"
        tables.append(Table(title, ("", *map(str, lengths)), rows))
    return tables


def _short(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    """Tasks without lengths that are none of ours: scores, and shares of the first model's (paper, Table 4)."""
    short = [one for one in scores if one.task not in _OURS and not one.length_tokens]
    return [*_percentages([one for one in short if one.percent], models), *_other_metrics(short)]


def _percentages(scores: Sequence[TaskScore], models: Sequence[str]) -> list[Table]:
    by_model: dict[str, dict[str, float]] = {model: {} for model in models}
    for one in scores:
        by_model[one.model][one.task] = one.main
    cells = retention.cells({model: found for model, found in by_model.items() if found})
    if not cells:
        return []
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    labels = list(dict.fromkeys(cell.model for cell in cells))
    tables = [Table("Short tasks, percent", ("", *tasks), _rows(cells, labels, tasks, "score"))]
    if len(labels) > 1:
        title = f"Short tasks, percent of the score of {labels[0]}"
        tables.append(Table(title, ("", *tasks), _rows(cells, labels, tasks, "share")))
    return tables


def _other_metrics(scores: Sequence[TaskScore]) -> list[Table]:
    """Scores that are no percentages: a mean over tasks or a share of the base's score would mean nothing."""
    rows = tuple((one.model, one.task, next(iter(one.measures)), one.main) for one in scores if not one.percent)
    return [Table("Short tasks, in lm-eval's own units", ("", "task", "metric", "score"), rows)] if rows else []


def _rows(
    cells: Sequence[retention.Cell], labels: Sequence[str], tasks: Sequence[str], what: str
) -> tuple[tuple[Value, ...], ...]:
    found: Mapping[tuple[str, str], float] = {(cell.model, cell.task): getattr(cell, what) for cell in cells}
    return tuple((label, *(found[label, task] for task in tasks)) for label in labels)


def _failed(scores: Sequence[TaskScore]) -> Table | None:
    """The tasks of which samples failed: their scores are of the others."""
    rows = tuple(
        (one.model, one.task, one.length_tokens or None, one.failed, one.samples) for one in scores if one.failed
    )
    if not rows:
        return None
    return Table(
        "Samples without an answer; scores are of the others", ("", "task", "length", "failed", "answered"), rows
    )


_NEEDLES = (  # key of ``by_length``, title
    ("accuracy", "Needles found, percent of the answers"),
    ("answer_perplexity", "Perplexity of the needles' answers (1 is certainty)"),
    ("text_perplexity", "Perplexity of held-out text"),
)


def needle_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The needle comparison: a table for each figure, a row for each model, a column for each length in tokens.

    Args:
        rows: of ``evaluate.json``.
    """
    lengths = sorted(set().union(*map(_lengths, rows)))
    tables = []
    for key, title in _NEEDLES if rows else ():
        of_model = [(row["label"], {one["length_tokens"]: one for one in row["by_length"]}) for row in rows]
        shown = tuple(
            (label, *(_needle_figure(key, at.get(length, {}).get(key)) for length in lengths)) for label, at in of_model
        )
        note = _standard_error(rows) if key == "accuracy" else ""
        tables.append(Table(title, ("length in tokens", *map(str, lengths)), shown, note))
    return tables


def _needle_figure(key: str, value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    return f"{value:.0%}" if key == "accuracy" else f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def _standard_error(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much chance is in an accuracy. Empty where columns have unlike numbers of documents."""
    counts = {_documents(row, one["length_tokens"]) for row in rows for one in row["by_length"]}
    if len(counts) != 1:
        return ""
    n = counts.pop()
    at_half, at_nine_tenths = 50 / math.sqrt(n), 30 / math.sqrt(n)  # 100 sqrt(p (1 - p) / n)
    return f"{n} documents a cell; standard error of a cell: {at_half:.0f} points at 50%, {at_nine_tenths:.0f} at 90%"


def _documents(row: Mapping[str, Any], length: int) -> int:
    return sum(cell["documents"] for cell in row["cells"] if cell["length_tokens"] == length)


def _lengths(row: Mapping[str, Any]) -> set[int]:
    return {one["length_tokens"] for one in row["by_length"]}


def trained_difference(rows: Sequence[Mapping[str, Any]]) -> str:
    """How two trained models differ at the longest length, and how much of the difference may be chance.

    Both have answered the same documents, and some documents are hard for both. So the standard error is that of the
    mean of their differences, document by document.

    Args:
        rows: of ``evaluate.json``.

    Returns:
        A sentence; empty where the rows do not hold two trained models that met needles of a common length.
    """
    trained = [row for row in rows if row["label"].endswith(" trained")]
    if len(trained) != 2:
        return ""
    first, second = ({one["length_tokens"]: one.get("shares", {}) for one in row["by_length"]} for row in trained)
    both = {length: first[length].keys() & second[length].keys() for length in first.keys() & second.keys()}
    if not both:
        return ""
    length = max((length for length, documents in both.items() if len(documents) > 1), default=None)
    if length is None:
        return (
            f"{trained[0]['label']} and {trained[1]['label']} have not answered the same documents; evaluate both with "
            "the same keys of eval to compare them"
        )
    p, q = (np.array([shares[length][one] for one in sorted(both[length])]) for shares in (first, second))
    error = (p - q).std(ddof=1) / math.sqrt(len(p))
    return (
        f"At {length} tokens {trained[0]['label']} finds {p.mean():.0%} and {trained[1]['label']} {q.mean():.0%}: "
        f"{100 * (p - q).mean():+.1f} points, with a standard error of {100 * error:.1f} over the same "
        f"{len(p)} documents"
    )
