"""evaluate: needle retrieval and perplexity by length, before and after, beside other methods.

    python -m lr2train.evaluate run=tiny_4k                                    a finished training run
    python -m lr2train.evaluate name=other model.path=… rope.factors=… data.path=runs/corpus     any model folder

Writes ``evaluate.json`` into the run's folder, and each row of the comparison under ``evaluation/`` as soon as it is done: interrupted, the same command
goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lr2train import run
from lr2train.config import Config, UserError, main
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, needle_set, text_set
from lr2train.evaluation import niah, perplexity
from lr2train.evaluation.subject import Subject, open_model
from lr2train.model import load
from lr2train.parallel import processes
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS, build


def evaluate(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``evaluate.json`` holds.

    Raises:
        UserError: bad input.
    """
    config, subjects = inputs(config)
    folder = Path(config.runs_folder) / str(config.run or config.name)
    job = run.Run(folder, "evaluate")
    lengths = _lengths(config, subjects)
    corpus = Corpus.open(Path(str(config.data.path)))
    needles = [document for length in lengths for document in _needles(config, corpus, length)]
    texts = [text for length in lengths for text in text_set(corpus, config.eval.text_documents, length, run.stream(config.eval.seed, "evaluate", "text", length))]
    device = processes.start(config)
    rows = []
    for subject in subjects:
        rows.append(_evaluated(subject, config, needles, texts, str(device), job))
        job.log(_summary(rows[-1]))
    spectrum = subjects[-1].factors.spectrum
    prompt = _write_prompt(config, corpus, spectrum.window_tokens, job)
    result = {"original_window_tokens": spectrum.window_tokens, "prompt": prompt, "target_window_tokens": subjects[-1].factors.target_window_tokens, "lengths_tokens": lengths, "rows": rows}
    job.write_json("evaluate.json", result)
    print(table(result))
    processes.stop()
    return result


def inputs(config: Config) -> tuple[Config, list[Subject]]:
    """The config completed from the run's own, and what is compared: the untrained model under each method, and the trained one last.

    Raises:
        UserError: neither a finished run nor a model is named.
    """
    if config.run is None:
        if config.model.path is None or config.data.path is None:
            raise UserError("run is empty; set run=<name of a finished training run>, or model.path, rope and data.path for a model of your own")
        return config, _before(config, load.folder_of(config.model))
    trained = run.read_json(Path(config.runs_folder) / config.run / "train.json")
    folder = Path(config.runs_folder) / config.run
    factors = Factors.load(folder / "factors.json")
    config = replace(config, data=replace(config.data, path=config.data.path or trained["corpus"]))
    before = []
    if trained["base"] is not None:
        model = replace(config.model, path=trained["base"])
        before = _methods(config, load.folder_of(model), factors) + [Subject(f"{factors.method} untrained", load.folder_of(model), factors, True)]
    extended = factors.target_window_tokens > factors.spectrum.window_tokens
    return config, [*before, Subject(f"{factors.method} trained" if extended else "base", folder / "model", factors, True)]


def _before(config: Config, folder: Path) -> list[Subject]:
    factors = build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))
    return [*_methods(config, folder, factors), Subject(factors.method, folder, factors, True)]


def _methods(config: Config, folder: Path, factors: Factors) -> list[Subject]:
    unknown = [name for name in config.eval.methods if name not in METHODS]
    if unknown:
        raise UserError(f"eval.methods names {unknown[0]}, which is not one of {', '.join(METHODS)}; remove it from eval.methods")
    target = factors.target_window_tokens
    return [Subject(f"{name} untrained", folder, METHODS[name](factors.spectrum, target), False) for name in config.eval.methods if name != factors.method]


def _lengths(config: Config, subjects: list[Subject]) -> list[int]:
    target = subjects[-1].factors.target_window_tokens
    lengths = [length for length in config.eval.lengths_tokens if length <= target]
    if not lengths:
        raise UserError(f"eval.lengths_tokens={config.eval.lengths_tokens} are all beyond the target window of {target}; add a length of at most {target}")
    return lengths


def _needles(config: Config, corpus: Corpus, length: int) -> list[NeedleDocument]:
    return needle_set(corpus, config.data.needles, config.eval.samples, length, config.eval.depths, run.stream(config.eval.seed, "evaluate", "needles", length))


def _write_prompt(config: Config, corpus: Corpus, original_window_tokens: int, job: run.Run) -> dict[str, str]:
    """A needle document cut before its answer, which lies across the original window's end: what `generate` shows the switch with."""
    needle = needle_set(corpus, config.data.needles, 1, original_window_tokens + 2, [0.0], run.stream(config.eval.seed, "evaluate", "prompt"))[0]
    tokens = needle.tokens[: needle.answer_spans[0][0]]
    borders = 0 if corpus.tokenizer.bos is None else 1  # the tokenizer puts BOS before a prompt by itself
    file = job.folder / "evaluation" / "prompt.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(corpus.tokenizer.decode(tokens[borders:]))
    return {"file": str(file), "answer": needle.answers[0]}


def _evaluated(subject: Subject, config: Config, needles: list[NeedleDocument], texts: list[Any], device: str, job: run.Run) -> dict[str, Any]:
    """One row; read back where a former call has done it under the same settings."""
    settings = {"eval": asdict(config.eval), "needles": asdict(config.data.needles), "corpus": str(config.data.path), "factors": subject.factors.to_json(), "model": str(subject.folder)}
    file = job.folder / "evaluation" / f"{re.sub(r'[^a-z0-9_]+', '_', subject.label)}.json"
    if file.exists() and (old := run.read_json(file))["settings"] == run.json.loads(run.json.dumps(settings)):
        return old["row"]
    row = _row(subject, config, needles, texts, device)
    run.write_json(file, {"settings": settings, "row": row})
    return row


def _row(subject: Subject, config: Config, needles: list[NeedleDocument], texts: list[Any], device: str) -> dict[str, Any]:
    model, table = open_model(subject, config.model.dtype, device)

    def everything() -> Iterator[tuple[Any, Any]]:
        yield from niah.scores(model, table, subject, needles)
        yield from perplexity.scores(model, table, subject, texts)

    scored = list(run.progress(everything(), len(needles) + len(texts), subject.label))
    of_needles = [(document, one) for document, one in scored[: len(needles)]]
    lengths = sorted({len(document.tokens) for document in needles})
    return {
        "label": subject.label,
        "attention_factor": subject.factors.attention_factor,
        "cells": niah.cells(of_needles),
        "by_length": [
            {
                "length_tokens": length,
                "accuracy": niah.accuracy([one for document, one in of_needles if len(document.tokens) == length]),
                "answer_perplexity": niah.perplexity([one for document, one in of_needles if len(document.tokens) == length]),
                "text_perplexity": niah.perplexity([one for size, one in scored[len(needles) :] if size == length]),
            }
            for length in lengths
        ],
    }


def _summary(row: dict[str, Any]) -> str:
    return f"{row['label']}: " + ", ".join(f"{c['length_tokens']}: {c['accuracy']:.0%} (answer ppl {c['answer_perplexity']:.2f})" for c in row["by_length"])


def table(result: dict[str, Any]) -> str:
    """The comparison as text: a row a model and method, a column a length; needle accuracy / answer perplexity / text perplexity."""
    lengths = result["lengths_tokens"]
    width = max(len(row["label"]) for row in result["rows"]) + 2
    lines = [f"{'needle accuracy | answer ppl | text ppl':<{width + 2}}" , " " * width + "  att.f." + "".join(f"{length:>24}" for length in lengths)]
    for row in result["rows"]:
        by_length = {cell["length_tokens"]: cell for cell in row["by_length"]}
        figures = [f"{by_length[n]['accuracy']:.0%} | {_short(by_length[n]['answer_perplexity'])} | {_short(by_length[n]['text_perplexity'])}" for n in lengths]
        lines.append(f"{row['label']:<{width}}{row['attention_factor']:>8.3f}" + "".join(f"{figure:>24}" for figure in figures))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


if __name__ == "__main__":
    main("evaluate", evaluate)
