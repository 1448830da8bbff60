"""lm-eval's benchmarks on our model: MMLU, HellaSwag, GSM8K, the leaderboards, and task files of the user.

Choice: lm-eval makes the prompts and grades the answers. ``Answers`` answers: so windows, batches, ranks, the journal
and failures are those of all benchmarks. Every rank runs lm-eval over all documents, and ``Answers`` spreads the
requests over the ranks. Cost: every rank holds all documents.

lm-eval is optional. Import this file only where a task needs lm-eval.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lr2train import ranks
from lr2train.config import UserError
from lr2train.evaluation.answers import Answers
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.parallel import control

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as missing:
    if missing.name != "lm_eval":
        raise
    raise UserError(
        "eval.tasks names a task of lm-eval, which is not installed; install lm-eval with "
        "`pip install -r requirements-eval.txt`"
    ) from missing

from lm_eval.api.group import Group
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate

from lr2train.evaluation.harness_model import Asked, HarnessModel
from lr2train.evaluation.harness_tasks import MEAN_OF_TASKS, Loaded, lm_eval_as_data, load_on_all_ranks

# lm-eval's metrics from 0 to 1; tables show them in percent.
FRACTIONS = {
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "exact", "em", "f1", "prompt_level_strict_acc",
    "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc",
}  # fmt: skip
BOOTSTRAP_RESAMPLES = 1000  # for the standard error of a metric without a formula; lm-eval's command line takes 100 000


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        value: as lm-eval gives it.
        stderr: its standard error; None where lm-eval has none.
        higher_is_better: None where lm-eval does not say.
    """

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class TaskResult:
    """What lm-eval found for a task, or for a group of tasks.

    Attributes:
        name: as tables show it: lm-eval's name, and ``@`` with the number of few-shot examples where it was given.
        main: the metric that stands in tables: the one that was asked for; else ``acc_norm`` where there is one, as on
            the Open LLM Leaderboard; else the first metric under its first filter. Empty where every sample failed.
        metrics: by lm-eval's name; of a filter other than "none": ``metric,filter``. A group has, beside lm-eval's mean
            over its samples, the mean over its tasks: ``acc_mean_of_tasks`` for ``acc``.
        n_samples: samples that were graded.
        n_failed: samples without an answer; no metric counts them.
        n_truncated: samples that lost their beginning, as they did not fit the window.
        n_fewshot: examples in each prompt; None where the tasks of a group differ.
        seconds: a sample took on the mean.
        records: one for each sample, plain JSON values; of a group: of all its tasks.
        parts: the tasks of a group.
    """

    name: str
    main: str
    metrics: Mapping[str, Metric]
    n_samples: int
    n_failed: int
    n_truncated: int
    n_fewshot: int | None
    seconds: float = 0.0
    records: tuple[dict[str, Any], ...] = ()
    parts: tuple[TaskResult, ...] = ()

    @property
    def measures(self) -> dict[str, float]:
        """The metrics, the main one first; lm-eval's fractions in percent."""
        names = sorted(self.metrics, key=lambda name: name != self.main)
        return {name: self.metrics[name].value * (100 if _is_fraction(name) else 1) for name in names}

    @property
    def score(self) -> float:
        """The main metric, as in ``measures``; nan where every sample failed."""
        return self.measures[self.main] if self.main else math.nan

    @property
    def percent(self) -> bool:
        """Whether the score is a percentage."""
        return not self.main or _is_fraction(self.main)


def _is_fraction(metric: str) -> bool:
    return metric.split(",")[0].removesuffix(MEAN_OF_TASKS) in FRACTIONS


def load_tasks(
    names: Sequence[str],
    task_path: str | Path | None = None,
    allow_download: bool = False,
    log: Callable[[str], None] = lambda line: None,
    others: Sequence[str] = (),
) -> list[Loaded]:
    """The tasks, for ``run_tasks``, with their documents. Every rank calls it with the same arguments.

    Args:
        names: of tasks, groups and tags of lm-eval or of ``task_path``. ``mmlu@5`` sets the number of few-shot
            examples; without ``@`` the task's own number holds. ``mmlu@5:acc_mean_of_tasks`` also says which metric
            stands in tables.
        task_path: ``eval.task_path``.
        allow_download: ``model.allow_download``: whether a data set may be fetched.
        log: takes one line about a number of examples that has no effect.
        others: names of our own tasks, which an unknown name may mean.

    Raises:
        UserError: a name is unknown; a task file names code or cannot be read; a data set is not there and must not be
            fetched; a task needs images or runs code that a model wrote.
    """
    with lm_eval_as_data(allow_download):
        return load_on_all_ranks(names, task_path, allow_download, log, others)


def run_tasks(
    tasks: Sequence[Loaded],
    answers: Answers,
    tokenizer: PromptTokenizer,
    longest_tokens: int,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[TaskResult]:
    """What one model says to the tasks; the same results on every rank. Every rank calls it with the same arguments.

    Args:
        tasks: from ``load_tasks``; may be run with one model after the other.
        answers: of the model.
        tokenizer: of the model.
        longest_tokens: of the longest text that the model is asked about.
        limit: ``eval.limit``, samples of each task.
        chat_template: whether prompts are chats in the tokenizer's template.
        log: takes one line about a setting that has no effect, or about truncated prompts.

    Returns:
        For each name its result; for a group without a metric of its own, and for a tag: the results of its tasks.

    Raises:
        UserError: a template fails on a document, or the tokenizer has no chat template.
    """
    if chat_template and not getattr(tokenizer.hf, "chat_template", None):
        raise UserError("the tokenizer has no chat template; evaluate without one")
    results: list[TaskResult] = []
    for loaded in tasks:
        lm = HarnessModel(answers, tokenizer, longest_tokens, log=log)
        mine: list[TaskResult] = []
        with lm_eval_as_data(loaded.allow_download):
            control.together(partial(_run, mine, loaded, lm, limit, chat_template))
        results += control.from_rank_0(mine)
    for result in results:
        if result.n_truncated:
            log(
                f"{result.name}: {result.n_truncated} samples were beyond the window of {longest_tokens} tokens and "
                "lost their beginning"
            )
    return results


def _run(results: list[TaskResult], loaded: Loaded, lm: HarnessModel, limit: int | None, chat_template: bool) -> None:
    """Add the results behind one name."""
    lm.label = loaded.named(loaded.task)
    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        with loaded.generators.used(), _one_process(), _without_failed(loaded, lm.asked):
            found: Any = evaluate(
                lm,
                loaded.tasks,
                limit=limit,
                log_samples=True,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                bootstrap_iters=BOOTSTRAP_RESAMPLES if ranks.rank() == 0 else 0,
            )
    except (jinja2.TemplateError, SyntaxError) as error:  # lm-eval tried the first document alone when it was loaded
        raise UserError(
            f"a template of the task {loaded.task} fails ({' '.join(str(error).split())[:200]}); correct its task file"
        ) from error
    groups: Mapping[str, Group] = loaded.tasks.get("groups") or {}
    leaves = {name: _leaf(name, loaded, found, lm.asked) for name in loaded.tasks["tasks"]}
    group = groups.get(loaded.task)
    results += list(leaves.values()) if group is None else _of_group(group, loaded, found, leaves)


@contextlib.contextmanager
def _without_failed(loaded: Loaded, asked: Mapping[tuple[str, int], Asked]) -> Iterator[None]:
    """Documents that have no answer are not graded: lm-eval would grade them as wrong, or even as right.

    lm-eval goes through a task's documents before it asks, when none has failed, and again when it grades.
    """
    tasks = loaded.tasks["tasks"].values()
    for task in tasks:
        task.doc_iterator = partial(_answered, task.doc_iterator, task.task_name, asked)
    try:
        yield
    finally:
        for task in tasks:
            del task.doc_iterator  # of the object; its class has another


def _answered(
    documents: Callable[..., Iterator[tuple[int, Any]]], task: str, asked: Mapping[tuple[str, int], Asked], **how: Any
) -> Iterator[tuple[int, Any]]:
    for number, document in documents(**how):
        if asked.get((task, number), Asked()).error is None:
            yield number, document


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval would fork a pool of processes for standard errors, beside threads of the device and of the ranks."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _of_group(group: Any, loaded: Loaded, found: Any, leaves: Mapping[str, TaskResult]) -> list[TaskResult]:
    """A group's result; where it has no metric of its own, those of its members."""
    if not group.aggregate_metric_list:
        members = (
            _of_group(one, loaded, found, leaves) if isinstance(one, Group) else [leaves[one.task_name]]
            for one in group
        )
        return [result for member in members for result in member]
    parts = tuple(leaves[task.task_name] for task in group.get_all_tasks())
    higher = {key: metric.higher_is_better for part in parts for key, metric in part.metrics.items()}
    metrics = _metrics(found["results"][group.name], {key.split(",")[0]: value for key, value in higher.items()})
    metrics |= _means_of_tasks(metrics, parts)
    shots = {part.n_fewshot for part in parts}
    return [
        TaskResult(
            loaded.named(group.name),
            _main(metrics, loaded),
            metrics,
            n_samples=sum(part.n_samples for part in parts),
            n_failed=sum(part.n_failed for part in parts),
            n_truncated=sum(part.n_truncated for part in parts),
            n_fewshot=shots.pop() if len(shots) == 1 else None,
            seconds=_mean([part.seconds for part in parts], [part.n_samples for part in parts]),
            records=tuple(record for part in parts for record in part.records),
            parts=parts,
        )
    ]


def _means_of_tasks(metrics: Mapping[str, Metric], parts: Sequence[TaskResult]) -> dict[str, Metric]:
    """The metrics of a group with every task counted alike, whatever its number of samples."""
    means = {}
    for key, metric in metrics.items():
        of_parts = [part.metrics[key] for part in parts if key in part.metrics]
        errors = [one.stderr for one in of_parts if one.stderr is not None]
        name, comma, kind = key.partition(",")
        means[f"{name}{MEAN_OF_TASKS}{comma}{kind}"] = Metric(
            math.fsum(one.value for one in of_parts) / len(of_parts),
            math.sqrt(math.fsum(one**2 for one in errors)) / len(errors) if len(errors) == len(of_parts) else None,
            metric.higher_is_better,
        )
    return means


def _leaf(name: str, loaded: Loaded, found: Any, asked: Mapping[tuple[str, int], Asked]) -> TaskResult:
    mine = {number: one for (task, number), one in asked.items() if task == name}
    records = {number: _record(name, number, one) for number, one in sorted(mine.items())}
    for sample in found["samples"][name]:
        _grade(records[sample["doc_id"]], sample)
    metrics = _metrics(found["results"][name], found["higher_is_better"].get(name) or {})
    failed = sum(one.error is not None for one in mine.values())
    return TaskResult(
        loaded.named(name),
        _main(metrics, loaded),
        metrics,
        n_samples=len(mine) - failed,
        n_failed=failed,
        n_truncated=sum(one.truncated for one in mine.values()),
        n_fewshot=found["n-shot"].get(name),
        seconds=_mean([one.seconds for one in mine.values() if one.error is None]),
        records=tuple(records.values()),
    )


def _mean(values: Sequence[float], counts: Sequence[int] = ()) -> float:
    counts = counts or [1] * len(values)
    total = sum(counts)
    return math.fsum(value * count for value, count in zip(values, counts, strict=True)) / total if total else 0.0


def _record(name: str, number: int, asked: Asked) -> dict[str, Any]:
    record: dict[str, Any] = {"task": name, "number": number, "tokens": asked.tokens, "window": asked.window}
    return record | {"truncated": asked.truncated, "error": asked.error}


def _grade(record: dict[str, Any], sample: Mapping[str, Any]) -> None:
    """Add what lm-eval noted for one filter: the right answer, the model's, and the grades."""
    said = [answer[0] for answer in sample["resps"]]
    record["target"] = _plain(sample["target"])
    record["answer"] = [one if isinstance(one, str | float) else one[0] for one in said]
    grades = record.setdefault("grades", {})
    for metric in sample["metrics"]:
        grades[_key(f"{metric},{sample['filter']}")] = _plain(sample[metric])


def _metrics(found: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> dict[str, Metric]:
    metrics = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        stderr = found.get(f"{metric}_stderr,{kind}")
        error = float(stderr) if isinstance(stderr, int | float) else None
        metrics[_key(key)] = Metric(float(value), error, higher_is_better.get(metric))
    return metrics


def _main(metrics: Mapping[str, Metric], loaded: Loaded) -> str:
    wanted = loaded.metric or "acc_norm"
    fitting = (key for key in metrics if key == wanted or key.startswith(f"{wanted},"))
    return next(fitting, next(iter(metrics), ""))


def _key(key: str) -> str:
    """Without lm-eval's filter "none"."""
    return key.removesuffix(",none")


def _plain(value: Any) -> Any:
    """As a plain JSON value."""
    if isinstance(value, bool | np.bool_ | np.number):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | None) else str(value)
