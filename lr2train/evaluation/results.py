"""What an evaluation writes: every sample as a JSON line, every score as a row of a CSV and a JSON file.

Choice: a score is a mean over the samples that were answered; how many failed stands beside. Cost: a task of which half
failed has a score like any other, so tables mark it.
"""

from __future__ import annotations

import csv
import io as text_io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lr2train import io
from lr2train.evaluation.request import Answer, Sample, Task


@dataclass(frozen=True)
class TaskScore:
    """The scores of one model on one task at one length.

    Attributes:
        model: label of the model.
        task: name of the task.
        length_tokens: 0 where the task has no lengths.
        measures: name -> mean over the answered samples; the first one stands in tables.
        samples: answered samples.
        failed: samples without an answer.
        seconds: a sample took on the mean.
        percent: whether the first measure is a percentage; metrics such as bleu or a perplexity are not.
    """

    model: str
    task: str
    length_tokens: int
    measures: Mapping[str, float]
    samples: int
    failed: int
    seconds: float
    percent: bool = True

    @property
    def main(self) -> float:
        """The first measure; nan where no sample was answered."""
        return next(iter(self.measures.values()), math.nan)


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^a-z0-9_.-]+", "_", label.lower())


def graded(task: Task, sample: Sample, answer: Answer) -> dict[str, float]:
    """The grades of one sample; empty where there is no answer."""
    return {} if answer.error is not None else task.grade(sample, answer)


def scores_of(
    model: str, task: Task, answered: Sequence[tuple[Sample, Answer]], grades: Sequence[Mapping[str, float]]
) -> list[TaskScore]:
    """The scores of a task, one for each length."""
    by_length: dict[int, list[tuple[Answer, Mapping[str, float]]]] = defaultdict(list)
    for (sample, answer), grade in zip(answered, grades, strict=True):
        by_length[sample.length_tokens].append((answer, grade))
    return [_score(model, task, length, by_length[length]) for length in sorted(by_length)]


def _score(model: str, task: Task, length: int, found: Sequence[tuple[Answer, Mapping[str, float]]]) -> TaskScore:
    good = [(answer, grade) for answer, grade in found if answer.error is None]
    n = len(good)
    means = {name: math.fsum(grade[name] for _, grade in good) / n if n else math.nan for name in task.measures}
    seconds = math.fsum(answer.seconds for answer, _ in good) / n if n else math.nan
    return TaskScore(model, task.name, length, means, n, len(found) - n, round(seconds, 4))


def write_samples(file: Path, answered: Iterable[tuple[Sample, Answer]], grades: Iterable[Mapping[str, float]]) -> None:
    """One JSON line for each sample: what was asked, what was said, the grades."""
    lines = (_line(sample, answer, grade) for (sample, answer), grade in zip(answered, grades, strict=True))
    io.write_text(file, "".join(lines))


def _line(sample: Sample, answer: Answer, grade: Mapping[str, float]) -> str:
    said = {key: value for key, value in asdict(answer).items() if value not in ("", (), None, 0)}
    line = {
        "task": sample.task,
        "length_tokens": sample.length_tokens,
        "number": sample.number,
        "prompt_tokens": len(sample.request.tokens),
        "answers": list(sample.answers),
        **sample.facts,
        **said,
        **grade,
    }
    return json.dumps(io.finite(line), allow_nan=False, ensure_ascii=False) + "\n"


def csv_of(scores: Sequence[TaskScore]) -> str:
    """All scores, one measure a line."""
    out = text_io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "task", "length_tokens", "measure", "value", "samples", "failed", "seconds_a_sample"])
    for one in scores:
        for name, value in one.measures.items():
            writer.writerow(
                [
                    one.model,
                    one.task,
                    one.length_tokens or "",
                    name,
                    f"{value:.6g}",
                    one.samples,
                    one.failed,
                    one.seconds,
                ]
            )
    return out.getvalue()


def from_json(values: Iterable[Mapping[str, Any]]) -> list[TaskScore]:
    """The scores that ``json_of`` wrote; null is nan again."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return [
        TaskScore(
            **{
                **one,
                "measures": {name: number(value) for name, value in one["measures"].items()},
                "seconds": number(one["seconds"]),
            }
        )
        for one in values
    ]


def json_of(scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """All scores as JSON values."""
    return [io.finite(asdict(one)) for one in scores]
