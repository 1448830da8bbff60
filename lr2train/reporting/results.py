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

from lr2train.evaluation.results import folder_name, from_json
from lr2train.evaluation.tables import all_tables
from lr2train.reporting.inputs import Json, ReportInputs
from lr2train.reporting.numbers import amount, duration, percent, perplexity

MEASURES = (  # key, title, which is better, how a figure is shown
    ("accuracy", "Needle accuracy: share of exact answers; higher is better", max, percent),
    ("answer_perplexity", "Answer perplexity: over the answer's tokens; 1 is certainty", min, perplexity),
    ("text_perplexity", "Text perplexity: over every token of held-out documents; lower is better", min, perplexity),
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
        ``original_window_tokens, target_window_tokens, rows, tables``.
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
    joined = [{**row, "label": label} for label, row in rows.items()]
    return {**found[0][1], "rows": joined, "tables": [one.to_json() for one in tables]}


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
    """Needle accuracy, answer perplexity and text perplexity: a row for each model, a column for each length.

    Attention factors stand below the first table: a column of them would not fit a phone.
    """
    models = (evaluation or {}).get("rows") or []
    lengths = sorted({one["length_tokens"] for row in models for one in row["by_length"]})
    head = ["model", *(f"{length:,}" for length in lengths)]
    labels: dict[str, dict[str, None]] = {}
    for row in models:
        method = row["label"].removesuffix(" untrained").removesuffix(" trained")
        labels.setdefault(f"{row['attention_factor']:.4g}", {})[method] = None
    note = "Attention factor: " + "; ".join(f"{factor} for {', '.join(of)}" for factor, of in labels.items()) + "."
    sheets = []
    for key, title, better, show in MEASURES:
        rows = [[row["label"], *(at_length(row, length).get(key) for length in lengths)] for row in models]
        sheets.append(Sheet(key, title, head, rows, note if not sheets else "", better, show))
    return sheets if models else []


def benchmarks(evaluation: Json | None) -> list[Sheet]:
    """Every table of the evaluation: RULER as the paper's Tables 2 and 8, retrieval, short tasks and what is kept."""
    sheets = []
    for number, one in enumerate((evaluation or {}).get("tables") or [], 1):
        name = f"table_{number}_{folder_name(one['title'].split(',')[0])[:30]}"
        better = None if one["head"][0] == "length" else max  # by task: its rows are lengths of one model
        head = [one["head"][0] or "model", *one["head"][1:]]
        sheets.append(Sheet(name, one["title"], head, one["rows"], one["note"], better))
    return sheets


def run_table(runs: Sequence[ReportInputs]) -> list[Sheet]:
    """A row for each run of a comparison."""
    head = ["run", "method", "rcd", "attention factor", "steps", "tokens", "loss", "time", "ranks", "memory, GiB"]
    rows = []
    for run in runs:
        train, factors, last = run.train or {}, run.factors, run.metrics[-1] if run.metrics else {}
        made = [factors.method, run.critical_index, f"{factors.attention_factor:.4g}"] if factors else [None] * 3
        ends = [amount(last["tokens_seen"], 3), perplexity(last["loss"])] if last else [None] * 2
        time = duration(train["seconds"]) if "seconds" in train else None
        rows.append([run.name, *made, last.get("step"), *ends, time, train.get("world"), last.get("peak_gib")])
    return [Sheet("runs", "Training", head, rows)] if len(runs) > 1 else []


def settings(runs: Sequence[ReportInputs]) -> list[Sheet]:
    """The config keys whose values differ between runs; none for a single run."""
    configs = [dict(_flat(run.config or run.search_config)) for run in runs]
    values = {key: [one.get(key) for one in configs] for one in configs for key in one if key != "name"}
    rows = [[key, *row] for key, row in values.items() if len({*row}) > 1]
    return [Sheet("settings", "Settings that differ", ["key", *(run.name for run in runs)], rows)] if rows else []


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif prefix:
        yield prefix, values if isinstance(values, str) else json.dumps(values)


def corpora(runs: Sequence[ReportInputs]) -> list[tuple[Path, Json, list[Sheet]]]:
    """(folder, manifest, tables of sources and of segments) of each corpus."""
    found = {run.corpus_folder.resolve(): run.corpus for run in runs if run.corpus_folder and run.corpus}
    return [(folder, one, _corpus(one, number)) for number, (folder, one) in enumerate(found.items(), 1)]


def _corpus(one: Json, number: int) -> list[Sheet]:
    plans = {window: one["windows"][window] for window in WINDOWS}
    sources = []
    for source in one["sources"]:
        counts = [source[key] for key in ("documents", "tokens", "holdout_documents")]
        planned = [_planned(plan["sources"].get(source["name"], {})) for plan in plans.values()]
        sources.append([source["name"], *counts, *planned, source.get("broken", 0)])
    windows = [
        [w, plan["segments"], plan["planned_tokens"], f"{plan['padding_share']:.2%}"] for w, plan in plans.items()
    ]
    head = ["source", "documents", "tokens", "held-out documents", *(f"planned tokens, {w}" for w in WINDOWS), "broken"]
    title, of_windows = f"Segments of {one['segment_tokens']:,} tokens", ["window", "segments", "tokens", "padding"]
    return [
        Sheet(f"sources_{number}", "Sources", head, sources, "In brackets: passes over the source's documents."),
        Sheet(f"segments_planned_{number}", title, of_windows, windows),
    ]


def _planned(counts: Json) -> str:
    """Planned tokens, and passes over the tokens that exist."""
    planned, there = counts.get("planned_tokens", 0), counts.get("tokens", 0)
    return f"{planned:,}" + (f" ({planned / there:.2g}×)" if there else "")
