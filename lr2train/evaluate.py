"""evaluate: needle accuracy and perplexity by length, before and after training, compared with other methods.

    lr2train evaluate run=tiny_4k                                    a finished training run
    lr2train evaluate name=other model.path=… rope.factors=… data.path=runs/corpus     any model folder

A run is evaluated with the dtype, corpus and needles of its training, unless the command names others. Writes into the
run's folder: ``evaluate.json``, the printed table, and each row of the comparison under ``evaluation/`` as soon as it
is done. The same command resumes an interrupted evaluation.
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

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, RopeConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, needle_set, text_set
from lr2train.evaluation import figures, trained_run
from lr2train.evaluation.subject import Subject, open_model
from lr2train.model import load
from lr2train.model.score import Score
from lr2train.parallel import control, processes
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build


def evaluate(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``evaluate.json``.

    Raises:
        UserError: bad input.
    """
    ranks.refuse_ranks("evaluate")
    config, subjects = inputs(config)
    job = run.Run(Path(config.runs_folder) / str(config.run or config.name), "evaluate")
    corpus, factors = Corpus.open(config.data.path), subjects[-1].factors
    corpus.refuse_other_tokenizer(
        load.config_of(load.ModelConfig(path=str(subjects[-1].folder))).vocab_size, subjects[-1].folder
    )
    lengths = _lengths(config, factors.target_window_tokens)
    needles, texts = _documents(config, corpus, lengths)
    device = processes.start(config)
    lock = control.on_rank_0(job.lock)  # also refuses a folder that may not be written, before the work
    corpus.verify(full=config.data.verify)
    rows = []
    for subject in subjects:
        settings = _settings(subject, config, corpus, lengths)
        rows.append(
            _evaluated(
                subject, settings, job, lambda subject=subject: _row(subject, config, needles, texts, str(device))
            )
        )
        job.log(_summary(rows[-1]))
    windows = {
        "original_window_tokens": factors.spectrum.window_tokens,
        "target_window_tokens": factors.target_window_tokens,
    }
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
    """The config, completed from the run's own, and the models to compare.

    These are the untrained model under each method of ``eval.methods``, the untrained model under the run's factors,
    and the trained model last.

    Raises:
        UserError: neither a finished run nor a model is named.
    """
    if config.run is None:
        if config.model.path is None or config.data.path is None:
            raise UserError(
                "run is empty; set run=<name of a finished training run>, or model.path, rope and data.path for a "
                "model of your own"
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
    return [
        Subject(f"{name} untrained", folder, _method(name, factors), False, config.model.overrides) for name in names
    ]


def _method(name: str, factors: Factors) -> Factors:
    """Another method's factors for the same windows."""
    try:
        return build(RopeConfig(target_window_tokens=factors.target_window_tokens, method=name), factors.spectrum)
    except UserError as error:
        raise UserError(
            f"eval.methods names {name}, which cannot be built from the windows alone ({error}); remove it from "
            "eval.methods"
        ) from error


def _lengths(config: Config, target: int) -> list[int]:
    lengths = sorted({length for length in config.eval.lengths_tokens if length <= target})
    if not lengths:
        raise UserError(
            f"eval.lengths_tokens={config.eval.lengths_tokens} are all beyond the target window of {target}; add a "
            "shorter length"
        )
    return lengths


def _documents(config: Config, corpus: Corpus, lengths: list[int]) -> tuple[list[NeedleDocument], list[np.ndarray]]:
    """Needle documents and plain texts of every length, the same for every model; each length has a random stream of
    its own.
    """
    settings, needles, texts = config.eval, [], []
    if not settings.depths or settings.text_documents < 1:
        raise UserError(
            f"eval.depths={settings.depths} and eval.text_documents={settings.text_documents} leave nothing to "
            "measure; set at least one of each"
        )
    if not all(0.0 <= depth <= 1.0 for depth in settings.depths):
        raise UserError(
            f"eval.depths={settings.depths} are not all between 0 (start) and 1 (end); set eval.depths inside these "
            "limits"
        )
    for length in lengths:
        rng = run.stream(settings.seed, "evaluate", "needles", length)
        needles += needle_set(
            corpus,
            config.data.needles,
            settings.samples,
            length,
            settings.depths,
            rng,
            distractors=settings.distractors,
        )
        texts += text_set(
            corpus, settings.text_documents, length, run.stream(settings.seed, "evaluate", "text", length)
        )
    return needles, texts


def _write_prompt(config: Config, corpus: Corpus, original_window_tokens: int, job: run.Run) -> dict[str, str]:
    """Write a needle document that ends before its answer, for ``generate``: the answer crosses the original window's
    end.
    """
    rng = run.stream(config.eval.seed, "evaluate", "prompt")
    needle = needle_set(corpus, config.data.needles, 1, original_window_tokens + 2, [0.0], rng)[0]
    tokens = needle.tokens[: needle.answer_spans[0][0]]
    borders = 0 if corpus.tokenizer.bos is None else 1  # without BOS: the tokenizer puts it before a prompt itself
    file = job.folder / "evaluation" / "prompt.txt"
    io.write_text(file, corpus.tokenizer.decode(tokens[borders:]))
    return {"file": str(file), "answer": needle.answers[0]}


def _settings(subject: Subject, config: Config, corpus: Corpus, lengths: list[int]) -> dict[str, Any]:
    """Everything that decides a row's figures, as JSON returns it. Other rows of the comparison do not."""
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
    return json.loads(json.dumps(settings))  # tuples become lists, as in the file that is compared


def _evaluated(
    subject: Subject, settings: dict[str, Any], job: run.Run, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """One row; read back where an earlier call has measured it under the same settings and the file is whole."""
    file = job.folder / "evaluation" / f"{re.sub(r'[^a-z0-9_]+', '_', subject.label)}.json"
    if file.exists():
        try:
            old = io.sealed(file, remedy="this row is measured again")
        except UserError as damage:
            job.log(str(damage))
        else:
            if old["settings"] == settings:
                return old["row"]
    row = measure()
    io.seal(file, {"settings": settings, "row": row})
    return row


def _row(
    subject: Subject, config: Config, needles: list[NeedleDocument], texts: list[np.ndarray], device: str
) -> dict[str, Any]:
    model, table = open_model(subject, config.model.dtype, device)

    def scores() -> Iterator[Score]:
        yield from (subject.score(model, table, one.tokens, one.answer_spans) for one in needles)
        yield from (subject.score_text(model, table, tokens) for tokens in texts)

    scored = list(progress.track(scores(), len(needles) + len(texts), subject.label))
    _refuse_not_finite(subject, scored, config.model.dtype)
    of_needles = list(zip(needles, scored[: len(needles)], strict=True))
    of_texts = list(zip(texts, scored[len(needles) :], strict=True))
    return {
        "label": subject.label,
        "attention_factor": subject.factors.attention_factor,
        "cells": figures.cells(of_needles),
        "by_length": figures.by_length(
            [(len(document.tokens), one) for document, one in of_needles],
            [(len(tokens), one) for tokens, one in of_texts],
        ),
    }


def _refuse_not_finite(subject: Subject, scores: Sequence[Score], dtype: str) -> None:
    bad = sum(not math.isfinite(score.nll) for score in scores)
    if bad:
        remedy = "set model.dtype=float32" if dtype != "float32" else "set model.path to an intact copy of the model"
        raise UserError(
            f"{subject.label}: the losses of {bad} of {len(scores)} documents are not finite (model.dtype={dtype}); "
            f"{remedy}"
        )


def _summary(row: dict[str, Any]) -> str:
    lengths = (
        f"{one['length_tokens']}: {one['accuracy']:.0%} (answer ppl {one['answer_perplexity']:.2f})"
        for one in row["by_length"]
    )
    return f"{row['label']}: {', '.join(lengths)}"


def table(result: dict[str, Any]) -> str:
    """The comparison as text: a row for each model and method; the attention factor, then a column for each length.

    A cell holds needle accuracy, answer perplexity and text perplexity.
    """
    width = max(len(row["label"]) for row in result["rows"]) + 2
    lines = [
        "needle accuracy | answer ppl | text ppl",
        " " * width + f"{'attention factor':>18}" + "".join(f"{length:>24}" for length in result["lengths_tokens"]),
    ]
    for row in result["rows"]:
        cells = (
            f"{one['accuracy']:.0%} | {_short(one['answer_perplexity'])} | {_short(one['text_perplexity'])}"
            for one in row["by_length"]
        )
        lines.append(
            f"{row['label']:<{width}}{row['attention_factor']:>18.3f}" + "".join(f"{cell:>24}" for cell in cells)
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


if __name__ == "__main__":
    main("evaluate", evaluate)
