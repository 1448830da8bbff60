"""prepare: tokenize documents and pack them into segments (training sequences).

    lr2train prepare experiment=tiny_4k name=corpus

Steps: check the config, list the input, make the tokenizer, tokenise (stage 1, ``data.ingest``), plan the segments
(stage 2, ``data.plan``). Writes ``runs/<name>/`` with tokenizer/, store/, segments.*.npy, corpus.json
(``data.corpus``), plan.json, plan.txt, pictures/ and prepare.json.

After a kill at any time, the same command resumes at the unfinished input splits. With other limits, weights
or budgets it plans again from the existing tokens. A change that would change the tokens of a source is an error
(``data.ingest.text_source``).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lr2train import io, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, DataConfig, ModelConfig, UserError
from lr2train.data import integrity
from lr2train.data.ingest import sources
from lr2train.data.ingest.corpus_tokenizer import ensure_tokenizer
from lr2train.data.ingest.find_files import not_read_lines, not_read_report
from lr2train.data.ingest.needle_source import check_needle_source
from lr2train.data.ingest.token_stores import SourceInputs, ensure_stores, list_inputs
from lr2train.data.needles import check_needles
from lr2train.data.plan import compose, mix, stage
from lr2train.reporting.pictures import ensure_mix_pictures
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import refuse_target

GROUPS = ("seed", "data")


def prepare(config: Config) -> dict[str, Any]:
    """Run the verb.

    Returns:
        The contents of ``prepare.json``.

    Raises:
        UserError: several ranks were started; sources, tokenizer or windows cannot be prepared; or another job uses the
            folder.
        OSError: the system refuses to read or write a file; ``filename`` says which.
    """
    ranks.refuse_ranks("prepare")
    config = replace(config, data=with_absolute_paths(config.data))
    original_window_tokens = original_window(config.model)
    refuse_target(config.rope.target_window_tokens, original_window_tokens)
    check_data(config.data, original_window_tokens)
    job = run.open_run(config, "prepare", GROUPS, follows=True)
    started = time.monotonic()
    inputs = list_inputs(config.data)
    lock = job.lock()
    with lock or contextlib.nullcontext():
        if lock is not None:
            integrity.sweep(job.folder)
        for change in job.changes():
            job.log(f"changed since the last time: {change}")
        result = _prepare(config, original_window_tokens, inputs, job)
        result["seconds"] = round(time.monotonic() - started, 2)
        job.write_json("prepare.json", result)
    print(table(result), flush=True)
    return result


def _prepare(config: Config, original_window_tokens: int, inputs: SourceInputs, job: run.Run) -> dict[str, Any]:
    """Stages 1 and 2 in a locked folder."""
    integrity.refuse_damage(job.folder)
    not_read = not_read_report(inputs)
    for line in not_read_lines(not_read):
        job.log(line)
    tokenizer = ensure_tokenizer(job.folder, config.data, inputs, job.log)
    stores = ensure_stores(job.folder, config.data, inputs, tokenizer, original_window_tokens, config.seed, job.log)
    manifest = stage.ensure_segment_tables(
        job.folder, config.data, stores, original_window_tokens, config.seed, job.log
    )
    integrity.write_checksums(job.folder)
    job.claim({})  # notes the config, last: a budget that cannot be filled must not replace the one of a finished plan
    return {**manifest, "not_read": not_read, "folder": str(job.folder)}


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """A config whose paths mean the same in every working directory."""
    files = [os.path.abspath(file) for file in data.decontaminate.files]
    return replace(
        data,
        sources=[sources.with_absolute_path(source) for source in data.sources],
        tokenizer=None if data.tokenizer is None else os.path.abspath(data.tokenizer),
        decontaminate=replace(data.decontaminate, files=files),
    )


def check_data(data: DataConfig, original_window_tokens: int) -> None:
    """Refuse a config that cannot be prepared, before anything is read.

    Raises:
        UserError: no source of text, a bad name, a value outside its limits, or windows that do not fit each other.
    """
    _check_names(data)
    if all(source.kind == sources.NEEDLES for source in data.sources):
        raise UserError("data.sources has needles only, which hide in the text of other sources; add a source of text")
    if data.segment_tokens < original_window_tokens:
        raise UserError(
            f"data.segment_tokens={data.segment_tokens} is below the original window of {original_window_tokens}; set "
            f"data.segment_tokens to {original_window_tokens} or more"
        )
    check_needles(data.needles)
    for source in data.sources:
        if source.kind == sources.NEEDLES:
            check_needle_source(source, data)
        else:
            sources.check_source(source)
    for window, budget in mix.budgets(data).items():
        if budget and not any(window in source.windows for source in data.sources):
            key = f"data.{window}_tokens"
            raise UserError(f"{key}={budget}, and no source has {window} among its windows; set {key} to 0")
    compose.check(data, original_window_tokens)


def _check_names(data: DataConfig) -> None:
    names = [source.name for source in data.sources]
    if not names:
        raise UserError("data.sources is empty; add a source such as {name: stdlib, kind: stdlib}")
    for name in names:
        if names.count(name) > 1:
            count = names.count(name)
            raise UserError(f"data.sources has the name {name!r} {count} times; give each source a name of its own")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"data.sources has the name {name!r}, and a folder is named after it; make it of letters, digits, "
                "- and _ alone, such as web-text"
            )


def original_window(model: ModelConfig) -> int:
    """The original window L0: ``model.original_window_tokens``, else the window of the model's own config under
    ``model.overrides``.

    Raises:
        UserError: the model's config is missing or broken.
    """
    if model.original_window_tokens is not None:
        return model.original_window_tokens
    file = Path(model.path or "") / "config.json"
    if model.path is not None and file.is_file():
        return rope_hf.spectrum_of({**io.read_json(file), **model.overrides}).window_tokens
    if model.path is None and model.architecture:
        return rope_hf.spectrum_of({**model.architecture, **model.overrides}).window_tokens
    raise UserError(
        f"model.path={model.path} has no config.json to read the original window from; set "
        "model.original_window_tokens to the window that the model was pretrained with"
    )


def table(result: dict[str, Any]) -> str:
    """A summary for a person: the planned mix, and what was held out, broken and not read."""
    mix = (Path(result["folder"]) / stage.PLAN_TEXT).read_text().rstrip()
    held = sum(source["holdout_documents"] for source in result["sources"])
    broken, lost = (sum(source.get(key, 0) for source in result["sources"]) for key in ("broken", "lost_bytes"))
    records = f"broken records: {broken:,}{f' with {lost:,} bytes' if broken else ''}"
    not_read = not_read_lines(result["not_read"])
    return "\n".join([mix, f"held out: {held:,} documents; {records}", *not_read, f"corpus: {result['folder']}"])


def from_the_command_line(config: Config) -> None:
    """Run the verb from the command line: with pictures of the mix."""
    ensure_mix_pictures(Path(prepare(config)["folder"]))


if __name__ == "__main__":
    main("prepare", from_the_command_line)
