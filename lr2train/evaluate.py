"""evaluate: needle maps, perplexity, RULER, retrieval and short tasks, for one model or several models side by side.

    lr2train evaluate run=tiny_4k                                   needles, before and after training
    lr2train evaluate run=tiny_4k eval=ruler                        suites: needles ruler retrieval short paper quick
    lr2train evaluate 'run=[/models/llama3,first]' eval=short       runs, folders, hub ids; the first is the base
    lr2train evaluate name=other model.path=… rope.factors=… data.path=runs/corpus     no run: a model under factors

Under a launcher (deepspeed, torchrun) the samples are spread over the ranks. A run is evaluated with the dtype, corpus
and needles of its training, unless the command sets others.

Results of one run go to the run's folder. All other results go to ``runs/<name>``: several models, a model folder, or a
read-only run. The files are ``evaluate.json``, and under ``evaluation/`` table.txt, scores.csv, needles.png with
needles.csv, and one folder per model with every sample. The same command resumes an interrupted evaluation: an answer
in the journal is not computed again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import needle_set
from lr2train.evaluation import figures, needles, results, tables, trained_run
from lr2train.evaluation.answers import LOCKSTEP, Answers
from lr2train.evaluation.models import Compared, compared, lengths_of
from lr2train.evaluation.request import Answer, Sample, Task
from lr2train.evaluation.subject import Subject, install
from lr2train.evaluation.tasks import Suite
from lr2train.evaluation.window_model import WindowModel
from lr2train.model import load
from lr2train.parallel import control, processes
from lr2train.parallel.failure import told_to_all
from lr2train.reporting.needle_map import needle_map
from lr2train.training.metrics import Dashboard, closing, dashboards

if TYPE_CHECKING:
    from lr2train.evaluation.harness import TaskResult as HarnessResult


_BY_LENGTH = ("length_tokens", "accuracy", "answer_perplexity", "text_perplexity")


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        scores: of all tasks.
        answered: task -> samples with their answers, failed ones left out; for the figures of needles and texts.
    """

    subject: Subject
    scores: list[results.TaskScore] = field(default_factory=list)
    answered: dict[str, list[tuple[Sample, Answer]]] = field(default_factory=dict)


@told_to_all()
def evaluate(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``evaluate.json``.

    Raises:
        UserError: bad input; raised on every rank.
    """
    models = compared(config)
    config, lengths = models.config, lengths_of(models.config, models)
    job = run.Run(_folder(config), "evaluate")
    suite = Suite(config, lengths, models, job.folder / "evaluation" / "cache")
    suite.refuse_unknown()
    device = processes.start(config)
    lock = control.on_rank_0(job.lock)  # also refuses a folder that may not be written, before the work
    try:
        boards = control.on_rank_0(lambda: dashboards(config, job.folder, "evaluate")) or []
        with closing(boards):
            result = _evaluated(job, models, suite, lengths, device)
            _show(job, result, boards)
    finally:
        if lock is not None:
            lock.close()
    processes.stop()
    return result


def _folder(config: Config) -> Path:
    """The folder of the one run that is evaluated; of several, and of a run that is read-only: ``runs/<name>``."""
    named, other = trained_run.named(config), Path(config.runs_folder) / config.name
    if len(named) != 1 or not trained_run.is_run(config, named[0]):
        return other
    own = trained_run.folder_of(config, named[0])
    if os.access(own, os.W_OK):
        return own
    progress.say("evaluate", f"{own} cannot be written; the results go to {other}")
    return other


def _evaluated(
    job: run.Run, models: Compared, suite: Suite, lengths: Sequence[int], device: torch.device
) -> dict[str, Any]:
    if (corpus := suite.corpus) is not None:
        # once a machine
        full = suite.config.data.verify and int(os.environ.get("LOCAL_RANK", 0)) == 0
        control.together(lambda: corpus.verify(full=full))
    suite.load_harness(job.log)
    # refuses bad input before any model is loaded
    everything = [_made(suite, subject, number == 0) for number, subject in enumerate(models.subjects)]
    suite.refuse_nothing(any(everything))
    measured = [
        _measured(subject, tasks, suite, job, device)
        for subject, tasks in zip(models.subjects, everything, strict=True)
    ]
    return _written(job, models, suite, measured, lengths)


@dataclass
class Asked:
    """A task of one model, with its samples where this rank has made them."""

    task: Task
    samples: Sequence[Sample] | None = None
    total_tokens: int = 0


def _made(suite: Suite, subject: Subject, keep: bool) -> list[Asked]:
    """The tasks of one model; bad input is refused here, before a model is loaded.

    Each task's samples are made by one rank, which also fills the cache on disk for the others. They are kept for the
    first model alone: those of all models may not fit into memory.
    """
    found: list[Asked] = []

    def make() -> dict[int, int]:
        found.extend(map(Asked, suite.tasks(subject)))
        counted = {}
        for number in range(ranks.rank(), len(found), ranks.world()):
            samples = found[number].task.samples()
            counted[number] = sum(sample.request.total_tokens for sample in _to_ask(samples))
            found[number].samples = samples if keep else None
        return counted

    for counted in control.together(make):
        for number, total in counted.items():
            found[number].total_tokens = total
    return found


def _to_ask(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.left_out is None]


def _measured(subject: Subject, tasks: list[Asked], suite: Suite, job: run.Run, device: torch.device) -> Measured:
    """Everything about one model: asked, graded and written."""
    folder = job.folder / "evaluation" / results.folder_name(subject.label)
    control.on_rank_0(lambda: folder.mkdir(parents=True, exist_ok=True))
    answers = Answers(
        lambda: _model(subject, suite, device),
        suite.identity(subject),
        folder / "answers.jsonl",
        subject.target_window_tokens,
        lambda line: job.log(f"{subject.label}: {line}"),
    )
    if answers.recovered:
        job.log(f"{subject.label}: {answers.recovered} answers found in {folder / 'answers.jsonl'}")
    if answers.damaged:
        job.log(f"{subject.label}: {answers.damaged} damaged lines of the journal are computed again")
    answers.expect(sum(one.total_tokens for one in tasks))
    found = Measured(subject)
    for one in tasks:
        _ask(one, answers, found, folder)
        job.log(_summary([score for score in found.scores if score.task == one.task.name]))
    for result in suite.ask_harness(subject, answers, job.log):
        found.scores.append(_of_harness(subject, result))
        lines = "".join(json.dumps(io.finite(record), allow_nan=False) + "\n" for record in result.records)
        name = results.folder_name(result.name)
        control.on_rank_0(lambda name=name, lines=lines: io.write_text(folder / f"{name}.jsonl", lines))
        job.log(_summary(found.scores[-1:]))
    return found


def _of_harness(subject: Subject, one: HarnessResult) -> results.TaskScore:
    """A result of lm-eval among our own scores."""
    counts = one.n_samples, one.n_failed, one.seconds
    return results.TaskScore(subject.label, one.name, 0, one.measures, *counts, percent=one.percent)


def _ask(one: Asked, answers: Answers, found: Measured, folder: Path) -> None:
    task, label = one.task, found.subject.label
    held: list[Sequence[Sample]] = [] if one.samples is None else [one.samples]
    control.together(lambda: None if held else held.append(task.samples()))
    samples = held[0]
    one.samples = None  # a window of 128k tokens a sample: not held longer than needed
    asked = _to_ask(samples)
    said = iter(answers.ask([sample.request for sample in asked], f"{label}: {task.name}"))
    answered = [
        (sample, next(said) if sample.left_out is None else Answer("long", error=sample.left_out)) for sample in samples
    ]
    grades = [results.graded(task, sample, answer) for sample, answer in answered]
    found.scores += results.scores_of(label, task, answered, grades)
    if task.name in (needles.NEEDLES, needles.TEXT):
        found.answered[task.name] = [(sample, answer) for sample, answer in answered if answer.error is None]
    control.on_rank_0(lambda: results.write_samples(folder / f"{task.name}.jsonl", answered, grades))


def _model(subject: Subject, suite: Suite, device: torch.device) -> WindowModel:
    """The loaded model, on every rank."""
    settings, dtype = suite.config.eval, suite.dtype(subject)
    if settings.shard:
        from lr2train.training.deepspeed.scoring import load_sharded  # here: DeepSpeed takes seconds to import

        named = load.ModelConfig(path=str(subject.folder), dtype=dtype, overrides=dict(subject.overrides))
        model = load_sharded(named, device)
    else:
        held: list[Any] = []
        control.together(
            lambda: held.append(load.load_whole(subject.folder, dtype, str(device), subject.overrides))
        )  # a folder that one rank cannot read ends the job on all
        model = held[0]
    return WindowModel(
        subject,
        model,
        install(subject, model),
        suite.tokenizer(subject),
        suite.stop_ids(subject),
        batch_tokens=settings.batch_tokens,
        chunk_tokens=settings.chunk_tokens,
        lockstep=LOCKSTEP if settings.shard else None,
    )


def _summary(scores: Sequence[results.TaskScore]) -> str:
    cells = (
        (f"{one.length_tokens}: " if one.length_tokens else "")
        + ", ".join(f"{name} {value:.2f}" for name, value in one.measures.items())
        + (f" ({one.failed} of {one.samples + one.failed} failed)" if one.failed else "")
        for one in scores
    )
    return f"{scores[0].model}, {scores[0].task}: {'; '.join(cells)}" if scores else "no sample"


# ---- what is written ----


def _written(
    job: run.Run, models: Compared, suite: Suite, measured: Sequence[Measured], lengths: Sequence[int]
) -> dict[str, Any]:
    """Tables and scores on disk, with those of earlier commands; the tables of this one on stdout."""
    scores = [score for one in measured for score in one.scores]
    labels = [subject.label for subject in models.subjects]
    result: dict[str, Any] = {
        "original_window_tokens": models.original_window_tokens,
        "target_window_tokens": models.target_window_tokens,
        "prompt": _write_prompt(suite, models, job),
        "lengths_tokens": list(lengths),
        "rows": [row for one in measured if (row := _row(one))],
    }
    shown = _text_of({**result, "tables": tables.all_tables(scores, labels)})
    identities = {subject.label: io.fingerprint(suite.identity(subject)) for subject in models.subjects}
    result |= {"scores": results.json_of(scores), "models": identities, "provenance": run.provenance()}
    folder = job.folder / "evaluation"

    def write() -> dict[str, Any]:
        """Every file; returns the contents of ``evaluate.json``."""
        whole = _with_earlier(result, job.folder / "evaluate.json")
        known = results.from_json(whole["scores"])
        made = tables.all_tables(known, labels)
        io.write_text(folder / "scores.csv", results.csv_of(known))
        io.write_text(folder / "table.txt", _text_of({**whole, "tables": made}) + "\n")
        if whole["rows"]:
            needle_map(whole["rows"]).write(folder / "needles")
        whole = io.finite({**whole, "tables": [table.to_json() for table in made]})
        job.write_json("evaluate.json", whole)
        print(shown)
        return whole

    return control.from_rank_0(control.on_rank_0(write)) or result


def _show(job: run.Run, result: dict[str, Any], boards: Sequence[Dashboard]) -> None:
    """The tables and the needle map on the dashboards."""
    picture = job.folder / "evaluation" / "needles.png"
    needle_rows = [
        [row["label"], row["attention_factor"], *(one.get(key) for key in _BY_LENGTH)]
        for row in result["rows"]
        for one in row["by_length"]
    ]
    for board in boards:
        if needle_rows:
            board.table("evaluate/needles_by_length", ("model", "attention_factor", *_BY_LENGTH), needle_rows)
        for table in result["tables"]:
            board.table(f"evaluate/{_plain_name(table['title'])}", table["head"], table["rows"])
        if picture.exists():
            board.picture("evaluate/needles", picture)


def _plain_name(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower()).strip("_")


def _text_of(result: dict[str, Any]) -> str:
    """The needle comparison, where there is one, and all tables as text."""
    return "\n\n".join(table.text() for table in [*tables.needle_tables(result["rows"]), *result["tables"]])


def _with_earlier(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The result, with what earlier commands have measured of the same models and this one has not."""
    try:
        old = io.read_json(file) if file.exists() else {}
    except UserError:  # cut short: it is written anew
        old = {}
    same = {label for label, known in old.get("models", {}).items() if result["models"].get(label) == known}
    kept = [
        one
        for one in old.get("scores", [])
        if one["model"] in same
        and not any(all(one[key] == new[key] for key in ("model", "task", "length_tokens")) for new in result["scores"])
    ]
    whole = {**result, "scores": [*kept, *result["scores"]]}
    if not result["rows"] and all(row["label"] in same for row in old.get("rows", [])):
        whole |= {key: old[key] for key in ("rows", "lengths_tokens", "prompt") if key in old}
    return whole


def _row(one: Measured) -> dict[str, Any] | None:
    """A row of the needle comparison; None where no needle was measured."""
    of_needles, of_texts = (one.answered.get(name, []) for name in (needles.NEEDLES, needles.TEXT))
    if not of_needles:
        return None
    return {
        "label": one.subject.label,
        "attention_factor": one.subject.attention_factor,
        "cells": figures.cells(of_needles),
        "by_length": figures.by_length(of_needles, of_texts),
        "by_position": figures.by_position(of_texts),
    }


def _write_prompt(suite: Suite, models: Compared, job: run.Run) -> dict[str, str] | None:
    """Write a needle document that ends before its answer, for ``generate``: the answer crosses the original window's
    end.
    """
    corpus, config = suite.corpus, suite.config
    if not isinstance(corpus, Corpus) or needles.NEEDLES not in suite.names:
        return None
    rng = run.stream(config.eval.seed, "evaluate", "prompt")
    needle = needle_set(corpus, config.data.needles, 1, models.original_window_tokens + 2, [0.0], rng)[0]
    tokens = needle.tokens[: needle.answer_spans[0][0]]
    borders = 0 if corpus.tokenizer.bos is None else 1  # without BOS: the tokenizer puts it before a prompt itself
    file, text = job.folder / "evaluation" / "prompt.txt", corpus.tokenizer.decode(tokens[borders:])
    control.on_rank_0(lambda: io.write_text(file, text))
    return {"file": str(file), "answer": needle.answers[0]}


if __name__ == "__main__":
    main("evaluate", evaluate)
