"""lm-eval's tasks through our object and through lm-eval's own Hugging Face object (``HFLM``), number by number.

    python -m tools.bench.harness --model FOLDER --task-path FOLDER --tasks local_gsm8k local_mmlu@0 [--limit N]

Both run in float32 on the CPU. HFLM has the model as plain transformers loads it, and batches of one; ours has batches
of ``--batch-tokens``. The last lines read
``name: value``. Exits with 1 where a bound is missed. The times are of one run each, one after the other: they tell a
factor, not a percentage. Of a folder with two windows, transformers takes its table by the tokens so far, ours by the
whole length; so compare there with prompts that are all beyond the original window, or take a folder with one window.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.bench.figures import Figure, conclude

MOST_LOGLIKELIHOOD_ERROR = 1e-3  # float32: products of batches of another shape are summed in another order


def compare(
    folder: Path, task_path: Path, names: Sequence[str], limit: int | None, batch_tokens: int = 16384
) -> Iterator[Figure]:
    """All tasks through both objects; prints each metric and yields the figures with their bounds."""
    import torch
    from transformers import AutoModelForCausalLM

    from lr2train.evaluation import harness

    model, rotary, subject, tokenizer, stop_ids = _opened(folder)
    longest = subject.target_window_tokens
    with tempfile.TemporaryDirectory() as scratch:
        answers = _answers(subject, model, rotary, tokenizer, stop_ids, batch_tokens, Path(scratch) / "answers.jsonl")
        start = time.monotonic()
        ours = harness.run_tasks(harness.load_tasks(names, task_path), answers, tokenizer, longest, limit=limit)
        seconds = time.monotonic() - start
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.monotonic()
    theirs = hflm_results(plain, tokenizer.hf, longest, names, task_path, limit)
    theirs_s = time.monotonic() - start
    yield from _figures(ours, theirs)
    yield Figure("ours_seconds", seconds)
    yield Figure("hflm_seconds", theirs_s)


def _opened(folder: Path) -> tuple[Any, ...]:
    from lr2train.evaluation import subject as subjects
    from lr2train.evaluation.tokens import PromptTokenizer
    from lr2train.model import load

    subject = subjects.as_published("ours", folder, {})
    model, tokenizer = load.load_whole(folder), PromptTokenizer.of(folder)
    return model, subjects.install(subject, model), subject, tokenizer, load.stop_ids_of(folder, tokenizer.hf)


def _answers(
    subject: Any, model: Any, rotary: Any, tokenizer: Any, stop_ids: set[int], batch_tokens: int, file: Path
) -> Any:
    from lr2train.evaluation.answers import Answers
    from lr2train.evaluation.window_model import WindowModel

    made = WindowModel(subject, model, rotary, tokenizer, stop_ids, batch_tokens=batch_tokens)
    return Answers(lambda: made, subject.identity("float32"), file, subject.target_window_tokens, print)


def hflm_results(
    model: Any, hf_tokenizer: Any, longest: int, names: Sequence[str], task_path: Path, limit: int | None
) -> list[dict[str, Any]]:
    """What lm-eval finds with HFLM over a model of transformers, one dictionary a name."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    lm = hflm_class()(pretrained=model, tokenizer=hf_tokenizer, batch_size=1, max_length=longest)
    found = []
    for name in names:
        task, _, shots = name.partition("@")
        found.append(
            simple_evaluate(
                lm,
                tasks=[task],
                num_fewshot=int(shots) if shots else None,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
            )
        )
    return found


def hflm_class() -> Any:
    """lm-eval's ``HFLM``.

    Its file imports four names of accelerate, which it uses only where HFLM itself loads a model onto devices. Here it
    is given one. So where accelerate is not installed, names that raise stand in for the import.
    """
    with _accelerate():
        from lm_eval.models.huggingface import HFLM

        return HFLM


@contextlib.contextmanager
def _accelerate() -> Iterator[None]:
    if importlib.util.find_spec("accelerate") or "lm_eval.models.huggingface" in sys.modules:
        yield
        return

    def missing(*_: Any, **__: Any) -> Any:
        raise ModuleNotFoundError("accelerate is not installed")

    names = ("accelerate", "accelerate.utils")
    for name in names:
        sys.modules[name] = ModuleType(name)
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
        setattr(sys.modules["accelerate"], name, missing)
    setattr(sys.modules["accelerate.utils"], "get_max_memory", missing)  # noqa: B010
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _figures(ours: Sequence[Any], theirs: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    errors, texts, other, metric_errors = [0.0], 0, 0, [0.0]
    for mine, found in zip(ours, theirs, strict=True):
        task = next(iter(found["samples"]))
        for key, metric in mine.metrics.items():
            value = found["results"][task][key if "," in key else f"{key},none"]
            print(f"{mine.name}: {key}: ours {metric.value:.6f}, HFLM {value:.6f}", flush=True)
            metric_errors.append(abs(metric.value - value))
        print(f"{mine.name}: {mine.n_samples} samples, {mine.n_failed} failed, {mine.n_truncated} truncated")
        said = {sample["doc_id"]: [resps[0] for resps in sample["resps"]] for sample in found["samples"][task]}
        for record in mine.records:
            for a, b in itertools.zip_longest(record["answer"], said[record["number"]]):
                if isinstance(b, str):
                    texts, other = texts + 1, other + (a != b)
                else:
                    errors.append(abs(a - (b[0] if isinstance(b, tuple | list) else b)))
    yield Figure("loglikelihoods", len(errors) - 1)
    yield Figure("largest_loglikelihood_error", max(errors, key=_nan_is_largest), at_most=MOST_LOGLIKELIHOOD_ERROR)
    yield Figure("texts", texts)
    yield Figure("texts_that_differ", other, at_most=0)
    yield Figure("largest_metric_error", max(metric_errors, key=_nan_is_largest), at_most=1e-9)


def _nan_is_largest(error: float) -> float:
    return math.inf if math.isnan(error) else error


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task-path", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    given = parser.parse_args()
    return conclude(compare(given.model, given.task_path, given.tasks, given.limit, given.batch_tokens))


if __name__ == "__main__":
    sys.exit(main())
