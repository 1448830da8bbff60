"""Stage 1 of ``prepare``: the token stores of every source.

Choice: finished work is reused where everything that decided it (config, files, tokenizer) is the same, so a killed run
goes on where it was. Text comes before needles, because needles hide in text. Cost: the steps know each other's results
by fingerprints alone. Stage 2 (``data.plan``) reads what the stores hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lr2train.config import DataConfig
from lr2train.data import integrity
from lr2train.data.corpus import TOKENIZER, source_folder
from lr2train.data.ingest import sources, tokenizer_backend
from lr2train.data.ingest.deduplicate import mark_duplicates
from lr2train.data.ingest.find_files import SourceInput
from lr2train.data.ingest.manifest_writer import ManifestWriter
from lr2train.data.ingest.needle_source import TextStores, ensure_needles
from lr2train.data.ingest.text_source import REJECTS, TextSource, first_example
from lr2train.data.ingest.tokenize_split import SplitTask, SplitTokenizer, TokenizeSettings
from lr2train.data.ingest.workers import WorkerPool
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import write_text

Log = Callable[[str], None]
SourceInputs = dict[str, SourceInput]
"""The input of every source of text, by the source's name."""


def list_inputs(data: DataConfig) -> SourceInputs:
    """List the input of every source of text.

    Raises:
        UserError: a path that does not exist, an unknown option, nothing to read, or too much that cannot be opened.
    """
    texts = [source for source in data.sources if source.kind != sources.NEEDLES]
    return {source.name: sources.list_input(source, data.shard_bytes) for source in texts}


def ensure_stores(
    folder: Path,
    data: DataConfig,
    inputs: SourceInputs,
    tokenizer: Tokenizer,
    original_window_tokens: int,
    seed: int,
    log: Log,
) -> list[dict[str, Any]]:
    """Make the token stores of all sources, as far as they are not there.

    Args:
        folder: the run folder.
        data: the sources.
        inputs: of the sources of text.
        tokenizer: the corpus' tokenizer.
        original_window_tokens: L0.
        seed: of the needles.
        log: takes lines for a person.

    Returns:
        The counts of each source's stores, in the order of ``data.sources``.

    Raises:
        UserError: a source gives no document or too many broken records, its settings have changed, or a store is
            damaged.
    """
    made = _ensure_text(folder, data, inputs, tokenizer, original_window_tokens, log)
    _collect_rejects(folder, list(made))
    for name, found in mark_duplicates(folder, list(made), data.deduplicate).items():
        made[name]["duplicates"] = found
        example = first_example(found["examples"])
        log(f"{name}: {found['documents']} documents with {found['tokens']} tokens are left out as duplicates{example}")
    fingerprints = [(name, one["fingerprint"], one["sha256"], one.get("duplicates")) for name, one in made.items()]
    texts = TextStores(list(made), fingerprints)
    for source in data.sources:
        if source.kind == sources.NEEDLES:
            made[source.name] = ensure_needles(folder, source, data, tokenizer, texts, seed, log)
    return [_with_duplicates(made[source.name]) for source in data.sources]


def _ensure_text(
    folder: Path, data: DataConfig, inputs: SourceInputs, tokenizer: Tokenizer, original_window_tokens: int, log: Log
) -> dict[str, dict[str, Any]]:
    """Make the stores of the sources of text, one source after another, each by all worker processes."""
    settings = TokenizeSettings(
        folder=folder,
        tokenizer=folder / TOKENIZER,
        backend=tokenizer_backend.choose_backend(tokenizer, data.tokenizer_backend, log),
        strict=data.tokenizer_backend == tokenizer_backend.GIGATOKEN,
        holdout=data.holdout,
        original_window_tokens=original_window_tokens,
        decontaminate=data.decontaminate,
    )
    most_splits = max(len(source_input.splits) for source_input in inputs.values())
    n_workers = min(data.workers or os.cpu_count() or 1, most_splits)
    workers = WorkerPool[SplitTask](partial(SplitTokenizer, settings), n_workers, _task_name)
    with workers, ManifestWriter() as manifests:
        texts = [
            TextSource(folder, source, settings, tokenizer, inputs[source.name], manifests, log)
            for source in data.sources
            if source.kind != sources.NEEDLES
        ]
        integrity.verify_stores(folder, [prefix for text in texts for prefix in text.finished_stores])
        return {text.name: text.ensure(workers) for text in texts}


def _task_name(task: SplitTask) -> str:
    return f"input split {task.split.name} of data.sources.{task.source.name}"


def _collect_rejects(folder: Path, names: Sequence[str]) -> None:
    """Gather the examples of all sources' broken records in one file."""
    files = [file for name in names if (file := source_folder(folder, name) / REJECTS).exists()]
    target = folder / REJECTS
    if files:
        write_text(target, "".join(file.read_text() for file in files))
    else:
        target.unlink(missing_ok=True)


def _with_duplicates(summary: dict[str, Any]) -> dict[str, Any]:
    """A source whose fingerprint covers the marks of its duplicates, which decide the segment table as tokens do."""
    if "duplicates" not in summary:
        return summary
    return {**summary, "fingerprint": fingerprint_of([summary["fingerprint"], summary["duplicates"]])}
