"""evaluate: needle retrieval and perplexity by length, before and after, beside other methods.

    python -m lr2train.evaluate run=tiny_4k                                    a finished training run
    python -m lr2train.evaluate name=other model.path=… rope.factors=… data.path=runs/corpus     any model folder

A run is measured as it was trained (its dtype, corpus and needles) unless told otherwise. Writes ``evaluate.json`` into the run's folder,
each row of the comparison under ``evaluation/`` as soon as it is done (interrupted, the same command goes on), and the printed table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lr2train import io, run
from lr2train.cli.door import main
from lr2train.config import Config, RopeConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, needle_set, text_set
from lr2train.evaluation import niah, perplexity, trained_run
from lr2train.evaluation.subject import Subject, open_model
from lr2train.model import load
from lr2train.model.score import Score
from lr2train.parallel import control, processes
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build


def evaluate(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``evaluate.json`` holds.

    Raises:
        UserError: bad input.
    """
    run.refuse_ranks("evaluate")
    config, subjects = inputs(config)
    job = run.Run(Path(config.runs_folder) / str(config.run or config.name), "evaluate")
    corpus, factors = Corpus.open(config.data.path), subjects[-1].factors
    corpus.refuse_other_tokenizer(load.config_of(load.ModelConfig(path=str(subjects[-1].folder))).vocab_size, subjects[-1].folder)
    lengths = _lengths(config, factors.target_window_tokens)
    needles, texts = _documents(config, corpus, lengths)
    device = processes.start(config)
    lock = control.on_rank_0(job.lock)  # also found here: a folder that may not be written
    corpus.verify(full=config.data.verify)
    rows = []
    for subject in subjects:
        settings = _settings(subject, config, corpus, lengths)
        rows.append(_evaluated(subject, settings, job, lambda subject=subject: _row(subject, config, needles, texts, str(device))))
        job.log(_summary(rows[-1]))
    windows = {"original_window_tokens": factors.spectrum.window_tokens, "target_window_tokens": factors.target_window_tokens}
    prompt = _write_prompt(config, corpus, factors.spectrum.window_tokens, job)
    result = {**windows, "prompt": prompt, "lengths_tokens": lengths, "rows": rows, "provenance": run.provenance()}
    job.write_json("evaluate.json", result)
    io.write_text(job.folder / "evaluation" / "table.txt", table(result) + "\n")
    print(table(result))
    processes.stop()
    if lock is not None:
        lock.close()
    return result


def inputs(config: Config) -> tuple[Config, list[Subject]]:
    """The config completed from the run's own, and what is compared: the untrained model under each method, and the trained one last.

    Raises:
        UserError: neither a finished run nor a model is named.
    """
    if config.run is None:
        if config.model.path is None or config.data.path is None:
            raise UserError(
                "run is empty; set run=<name of a finished training run>, or model.path, rope and data.path for a model of your own"
            )
        return config, _before(config, load.folder_of(config.model))
    folder = trained_run.run_folder(config)
    io.read_json(folder / "train.json")  # refuses a run that is not finished
    factors = Factors.load(folder / "factors.json")
    config = trained_run.completed(config)
    extended = factors.target_window_tokens > factors.spectrum.window_tokens
    after = Subject(f"{factors.method} trained" if extended else "base", folder / "model", factors, True)
    if config.model.path is None:
        return config, [after]
    base = load.folder_of(config.model)
    before = Subject(f"{factors.method} untrained", base, factors, True, config.model.overrides)
    return config, [*_methods(config, base, factors), before, after]


def _before(config: Config, folder: Path) -> list[Subject]:
    factors = build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))
    return [*_methods(config, folder, factors), Subject(factors.method, folder, factors, True, config.model.overrides)]


def _methods(config: Config, folder: Path, factors: Factors) -> list[Subject]:
    names = [name for name in config.eval.methods if name != factors.method]
    return [Subject(f"{name} untrained", folder, _method(name, factors), False, config.model.overrides) for name in names]


def _method(name: str, factors: Factors) -> Factors:
    """Another method's factors for the same windows."""
    try:
        return build(RopeConfig(target_window_tokens=factors.target_window_tokens, method=name), factors.spectrum)
    except UserError as error:
        raise UserError(
            f"eval.methods names {name}, which cannot be built from the windows alone ({error}); remove it from eval.methods"
        ) from error


def _lengths(config: Config, target: int) -> list[int]:
    lengths = sorted({length for length in config.eval.lengths_tokens if length <= target})
    if not lengths:
        raise UserError(
            f"eval.lengths_tokens={config.eval.lengths_tokens} are all beyond the target window of {target}; add a shorter length"
        )
    return lengths


def _documents(config: Config, corpus: Corpus, lengths: list[int]) -> tuple[list[NeedleDocument], list[np.ndarray]]:
    """Needle documents and plain text of every length; the same for every subject, whatever other lengths there are."""
    settings, needles, texts = config.eval, [], []
    if not settings.depths or settings.text_documents < 1:
        raise UserError(
            f"eval.depths={settings.depths} and eval.text_documents={settings.text_documents} leave nothing to measure; set at least one of each"
        )
    if not all(0.0 <= depth <= 1.0 for depth in settings.depths):
        raise UserError(f"eval.depths={settings.depths} are not all between 0 (start) and 1 (end); set eval.depths inside these limits")
    for length in lengths:
        rng = run.stream(settings.seed, "evaluate", "needles", length)
        needles += needle_set(corpus, config.data.needles, settings.samples, length, settings.depths, rng, distractors=settings.distractors)
        texts += text_set(corpus, settings.text_documents, length, run.stream(settings.seed, "evaluate", "text", length))
    return needles, texts


def _write_prompt(config: Config, corpus: Corpus, original_window_tokens: int, job: run.Run) -> dict[str, str]:
    """A needle document cut before its answer, which lies across the original window's end: what `generate` shows the switch with."""
    rng = run.stream(config.eval.seed, "evaluate", "prompt")
    needle = needle_set(corpus, config.data.needles, 1, original_window_tokens + 2, [0.0], rng)[0]
    tokens = needle.tokens[: needle.answer_spans[0][0]]
    borders = 0 if corpus.tokenizer.bos is None else 1  # the tokenizer puts BOS before a prompt by itself
    file = job.folder / "evaluation" / "prompt.txt"
    io.write_text(file, corpus.tokenizer.decode(tokens[borders:]))
    return {"file": str(file), "answer": needle.answers[0]}


def _settings(subject: Subject, config: Config, corpus: Corpus, lengths: list[int]) -> dict[str, Any]:
    """Everything that decides a row's figures, as JSON gives it back; which other rows there are does not."""
    settings = {
        "eval": {key: value for key, value in asdict(config.eval).items() if key != "methods"},
        "lengths_tokens": lengths,
        "needles": asdict(config.data.needles),
        "corpus": corpus.fingerprint,
        "model": load.folder_fingerprint(subject.folder),
        "dtype": config.model.dtype,
        "overrides": dict(subject.overrides),
        "factors": subject.factors.to_json(),
        "switches": subject.switches,
    }
    return json.loads(json.dumps(settings))


def _evaluated(subject: Subject, settings: dict[str, Any], job: run.Run, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One row; read back where a former call has measured it under the same settings."""
    file = job.folder / "evaluation" / f"{re.sub(r'[^a-z0-9_]+', '_', subject.label)}.json"
    if file.exists() and (old := io.read_json(file))["settings"] == settings:
        return old["row"]
    row = measure()
    io.write_json(file, {"settings": settings, "row": row})
    return row


def _row(subject: Subject, config: Config, needles: list[NeedleDocument], texts: list[np.ndarray], device: str) -> dict[str, Any]:
    model, table = open_model(subject, config.model.dtype, device)

    def everything() -> Iterator[tuple[Any, Score]]:
        yield from niah.scores(model, table, subject, needles)
        yield from perplexity.scores(model, table, subject, texts)

    scored = list(run.progress(everything(), len(needles) + len(texts), subject.label))
    _refuse_non_finite(subject, [one for _, one in scored], config.model.dtype)
    of_needles, of_texts = scored[: len(needles)], scored[len(needles) :]
    return {
        "label": subject.label,
        "attention_factor": subject.factors.attention_factor,
        "cells": niah.cells(of_needles),
        "by_length": _by_length([(len(document.tokens), one) for document, one in of_needles], of_texts),
    }


def _refuse_non_finite(subject: Subject, scores: Sequence[Score], dtype: str) -> None:
    """A mean over such losses would be no figure, and a table that hides them a lie."""
    bad = sum(not math.isfinite(score.nll) for score in scores)
    if bad:
        remedy = "set model.dtype=float32" if dtype != "float32" else "choose a model whose weights are sound"
        raise UserError(f"{subject.label}: the losses of {bad} of {len(scores)} documents are not finite (model.dtype={dtype}); {remedy}")


def _by_length(of_needles: Sequence[tuple[int, Score]], of_texts: Sequence[tuple[int, Score]]) -> list[dict[str, Any]]:
    """Figures of all depths together, from (length, score) pairs."""
    rows = []
    for length in sorted({length for length, _ in of_needles}):
        answers = [one for size, one in of_needles if size == length]
        text = [one for size, one in of_texts if size == length]
        rows.append(
            {
                "length_tokens": length,
                "accuracy": niah.accuracy(answers),
                "answer_perplexity": niah.perplexity(answers),
                "text_perplexity": niah.perplexity(text),
            }
        )
    return rows


def _summary(row: dict[str, Any]) -> str:
    figures = (f"{one['length_tokens']}: {one['accuracy']:.0%} (answer ppl {one['answer_perplexity']:.2f})" for one in row["by_length"])
    return f"{row['label']}: {', '.join(figures)}"


def table(result: dict[str, Any]) -> str:
    """The comparison as text: a row a model and method, a column a length; needle accuracy / answer perplexity / text perplexity."""
    width = max(len(row["label"]) for row in result["rows"]) + 2
    lines = [
        "needle accuracy | answer ppl | text ppl",
        " " * width + "  att.f." + "".join(f"{length:>24}" for length in result["lengths_tokens"]),
    ]
    for row in result["rows"]:
        figures = (
            f"{one['accuracy']:.0%} | {_short(one['answer_perplexity'])} | {_short(one['text_perplexity'])}" for one in row["by_length"]
        )
        lines.append(f"{row['label']:<{width}}{row['attention_factor']:>8.3f}" + "".join(f"{figure:>24}" for figure in figures))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


if __name__ == "__main__":
    main("evaluate", evaluate)
