"""Tables of the page: needle comparison, benchmarks, runs, settings that differ, sources of a corpus.

Choice: a sheet holds plain values; the page and a CSV file show the same ones. Several runs share one comparison. A
model that two runs have evaluated alike stands there once; models of one label that differ get their run's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lr2train.evaluation.results import from_json
from lr2train.evaluation.tables import all_tables
from lr2train.reporting.inputs import Json, ReportInputs
from lr2train.reporting.numbers import amount, duration, percent, perplexity

MEASURES: tuple[tuple[str, str, str, Callable[..., Any], Callable[[float], str]], ...] = (
    (
        "accuracy",
        "Needle accuracy",
        "share of documents that greedy decoding answers exactly; higher is better",
        max,
        percent,
    ),
    (
        "answer_perplexity",
        "Answer perplexity",
        "over the answer's tokens; 1 is certainty, lower is better",
        min,
        perplexity,
    ),
    (
        "text_perplexity",
        "Text perplexity",
        "over every token of held-out documents; lower is better",
        min,
        perplexity,
    ),
)
WINDOWS = ("short", "long")


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: of its CSV file.
        title, note: what the cells are, and what the reader must know.
        head: one title for each column.
        rows: the first cell of each names the row; None is an empty cell.
        better: max or min marks the best float of each column; None marks nothing.
        show: a float as text.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    better: Callable[..., Any] | None = None
    show: Callable[[float], str] = "{:.2f}".format

    def cells(self) -> Iterator[list[tuple[str, bool]]]:
        """(text, whether it is the best of its column) for each cell, row by row."""
        columns = [[x for x in column if isinstance(x, float) and math.isfinite(x)] for column in zip(*self.rows)]  # noqa: B905
        best = [self.better(column) if self.better and len(column) > 1 else None for column in columns]
        for row in self.rows:
            yield [(self._text(x), isinstance(x, float) and x == top) for x, top in zip(row, best, strict=True)]

    def _text(self, value: Any) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else self.show(value)
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def all_sheets(runs: Sequence[ReportInputs], evaluation: Json | None) -> dict[str, list[Any]]:
    """Every table of the page, by section; those of ``corpora`` with their folder and manifest."""
    return {
        "runs": run_table(runs),
        "settings": settings(runs),
        "comparison": comparison(evaluation),
        "benchmarks": benchmarks(evaluation),
        "corpora": corpora(runs),
    }


def flat(sheets: Mapping[str, Sequence[Any]]) -> list[Sheet]:
    """The tables alone."""
    own = [sheet for section, every in sheets.items() if section != "corpora" for sheet in every]
    return [*own, *(sheet for _, _, tables in sheets["corpora"] for sheet in tables)]


def evaluation_of(runs: Sequence[ReportInputs]) -> Json | None:
    """``evaluate.json`` of one run; of several runs, their rows and tables joined.

    Returns:
        ``original_window_tokens, target_window_tokens, lengths_tokens, rows, tables``.
    """
    found = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if len(found) < 2:
        return found[0][1] if found else None
    labels = _labels(found)
    rows, scores = {}, {}
    for name, one in found:
        rows |= {labels[name, row["label"]]: row for row in one["rows"] if labels[name, row["label"]] not in rows}
        for score in from_json(one.get("scores", [])):
            label = labels[name, score.model]
            scores.setdefault((label, score.task, score.length_tokens), replace(score, model=label))
    tables = all_tables([*scores.values()], list(dict.fromkeys(label for label, _, _ in scores)))
    lengths = sorted({length for _, one in found for length in one["lengths_tokens"]})
    joined = [{**row, "label": label} for label, row in rows.items()]
    return {**found[0][1], "rows": joined, "lengths_tokens": lengths, "tables": [one.to_json() for one in tables]}


def _labels(found: Sequence[tuple[str, Json]]) -> dict[tuple[str, str], str]:
    """(run, label) -> label in the comparison."""
    known: dict[tuple[str, str], Any] = {}
    for name, one in found:
        for label in [*(row["label"] for row in one["rows"]), *(score["model"] for score in one.get("scores", []))]:
            known[name, label] = one.get("models", {}).get(label, name)  # a fingerprint of the model and its questions
    alike = {label: {known[key] for key in known if key[1] == label} for _, label in known}
    return {(name, label): label if len(alike[label]) == 1 else f"{name}: {label}" for name, label in known}


def at_length(row: Json, length: int) -> Json:
    """A row's figures at one length; empty where they were not measured."""
    return next((cell for cell in row["by_length"] if cell["length_tokens"] == length), {})


def comparison(evaluation: Json | None) -> list[Sheet]:
    """Needle accuracy, answer perplexity and text perplexity: a row for each model, a column for each length."""
    if not evaluation or not evaluation["rows"]:
        return []
    lengths = evaluation["lengths_tokens"]
    head = ["model", *(f"{length:,}" for length in lengths), "attention factor"]
    return [
        Sheet(
            key,
            f"{title}: {what}",
            head,
            [
                [row["label"], *(at_length(row, one).get(key) for one in lengths), f"{row['attention_factor']:.3f}"]
                for row in evaluation["rows"]
            ],
            better=better,
            show=show,
        )
        for key, title, what, better, show in MEASURES
    ]


def benchmarks(evaluation: Json | None) -> list[Sheet]:
    """Every table of the evaluation: RULER as the paper's Tables 2 and 8, retrieval, short tasks and what is kept."""
    tables = (evaluation or {}).get("tables") or []
    return [
        Sheet(
            f"table_{number}_{'_'.join(one['title'].lower().split(',')[0].split()[:4])}",
            one["title"],
            [one["head"][0] or "model", *one["head"][1:]],
            one["rows"],
            one["note"],
            better=None if one["head"][0] == "length" else max,  # by task: its rows are lengths of one model
        )
        for number, one in enumerate(tables, 1)
    ]


def run_table(runs: Sequence[ReportInputs]) -> list[Sheet]:
    """A row for each run of a comparison."""
    if len(runs) < 2:
        return []
    head = ["run", "method", "rcd", "attention factor", "steps", "tokens", "loss", "time", "ranks", "memory, GiB"]
    rows = []
    for run in runs:
        train, factors = run.train or {}, run.factors
        losses = [line["loss"] for line in run.metrics if line.get("loss") is not None]
        rows.append(
            [
                run.name,
                factors.method if factors else None,
                run.critical_index,
                f"{factors.attention_factor:g}" if factors else None,
                run.metrics[-1]["step"] if run.metrics else None,
                amount(run.metrics[-1]["tokens_seen"], 3) if run.metrics else None,
                perplexity(losses[-1]) if losses else None,
                duration(train["seconds"]) if "seconds" in train else None,
                train.get("world"),
                f"{run.metrics[-1]['peak_gib']:.2f}" if run.metrics else None,
            ]
        )
    return [Sheet("runs", "Runs", head, rows)]


def settings(runs: Sequence[ReportInputs]) -> list[Sheet]:
    """The config keys whose values differ between runs; none for a single run."""
    flat = [dict(_flat(run.config or run.search_config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key) for one in flat)] for key in keys if len({one.get(key) for one in flat}) > 1]
    return [Sheet("settings", "Settings that differ", ["key", *(run.name for run in runs)], rows)] if rows else []


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif prefix:
        yield prefix, values if isinstance(values, str) else json.dumps(values)


def corpora(runs: Sequence[ReportInputs]) -> list[tuple[Path, Json, list[Sheet]]]:
    """(folder, manifest, tables) of each corpus."""
    found = {run.corpus_folder.resolve(): run for run in runs if run.corpus_folder and run.corpus}
    return [
        (run.corpus_folder, run.corpus, _corpus(run.corpus, "" if len(found) == 1 else f"_{number}"))
        for number, run in enumerate(found.values(), 1)
        if run.corpus_folder and run.corpus
    ]


def _corpus(one: Json, suffix: str) -> list[Sheet]:
    head = ["source", "documents", "tokens", "held-out documents", *(f"planned tokens, {w}" for w in WINDOWS), "broken"]
    sources = [
        [
            source["name"],
            *(source[key] for key in ("documents", "tokens", "holdout_documents")),
            *(_planned(one["windows"][window]["sources"].get(source["name"], {})) for window in WINDOWS),
            source.get("broken", 0),
        ]
        for source in one["sources"]
    ]
    plans = [(window, one["windows"][window]) for window in WINDOWS]
    windows = [[w, plan["segments"], plan["planned_tokens"], f"{plan['padding_share']:.2%}"] for w, plan in plans]
    return [
        Sheet(f"sources{suffix}", "Sources", head, sources, "In brackets: passes over the source's documents."),
        Sheet(
            f"planned{suffix}",
            f"Segments of {one['segment_tokens']:,} tokens",
            ["window", "segments", "tokens", "padding"],
            windows,
        ),
    ]


def _planned(counts: Json) -> str:
    """Planned tokens, and passes over the tokens that exist."""
    planned, there = counts.get("planned_tokens", 0), counts.get("tokens", 0)
    return f"{planned:,}" + (f" ({planned / there:.2g}×)" if there else "")
