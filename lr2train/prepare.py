"""prepare: documents -> token stores -> planned segments.

    python -m lr2train.prepare experiment=tiny_4k name=corpus

Writes ``runs/<name>/``: tokenizer/, store/, segments.*.npy, corpus.json (see lr2train.data.corpus), plan.json, plan.txt, pictures/ and
prepare.json. Killed at any time, the same command goes on at the shard where it was. With other limits, weights or budgets it plans anew from
the tokens that are there; what would make other tokens of a source is refused (lr2train.data.ingest.textsource).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lr2train import io, run
from lr2train.cli.door import main
from lr2train.config import Config, ModelConfig, UserError
from lr2train.data import building, integrity
from lr2train.data.plan import stage
from lr2train.reporting.mix import ensure_mix_pictures
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import refuse_target

GROUPS = ("seed", "data")


def prepare(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``prepare.json`` holds.

    Raises:
        UserError: sources, tokenizer or windows that cannot be prepared, another job is at the same folder, or several ranks were started.
        OSError: the system refuses to read or to write a file; ``filename`` says which.
    """
    run.refuse_ranks("prepare")
    config = replace(config, data=building.settled(config.data))
    original_window_tokens = original_window(config.model)
    refuse_target(config.rope.target_window_tokens, original_window_tokens)
    building.check(config.data, original_window_tokens)
    job = run.open_run(config, "prepare", GROUPS, follows=True)
    started = time.monotonic()
    listed = building.list_sources(config.data)
    lock = job.lock()
    with lock or contextlib.nullcontext():
        if lock is not None:
            integrity.sweep(job.folder)
        for change in job.changes():
            job.log(f"changed since the last time: {change}")
        result = _prepare(config, original_window_tokens, listed, job)
        result["seconds"] = round(time.monotonic() - started, 2)
        job.write_json("prepare.json", result)
    print(table(result), flush=True)
    return result


def _prepare(config: Config, original_window_tokens: int, listed: building.Listed, job: run.Run) -> dict[str, Any]:
    """Stages 1 and 2 in a folder that is ours; the config is noted last, because a budget that cannot be filled must not replace one that could."""
    integrity.refuse_damage(job.folder)
    unread = building.unread(listed)
    for line in building.say_unread(unread):
        job.log(line)
    tokenizer = building.ensure_tokenizer(job.folder, config.data, listed, job.log)
    stores = building.ensure_stores(job.folder, config.data, listed, tokenizer, original_window_tokens, config.seed, job.log)
    manifest = stage.ensure_segment_tables(job.folder, config.data, stores, original_window_tokens, config.seed, job.log)
    integrity.write_checksums(job.folder)
    job.claim({})
    return {**manifest, "not_read": unread, "folder": str(job.folder)}


def original_window(model: ModelConfig) -> int:
    """L0: as set, else as the model's config has it.

    Raises:
        UserError: the model's config is not at hand, or broken.
    """
    if model.original_window_tokens is not None:
        return model.original_window_tokens
    file = Path(model.path or "") / "config.json"
    if model.path is not None and file.is_file():
        return rope_hf.spectrum_of(io.read_json(file)).window_tokens
    if model.path is None and model.architecture:
        return rope_hf.spectrum_of(dict(model.architecture)).window_tokens
    raise UserError(f"model.path={model.path} has no config.json to read the original window from; set model.original_window_tokens")


def table(result: dict[str, Any]) -> str:
    """The counts for a person: the mix that was planned, what was held out and what was broken."""
    mix = (Path(result["folder"]) / stage.PLAN_TEXT).read_text().rstrip()
    held = sum(source["holdout_documents"] for source in result["sources"])
    broken, lost = (sum(source.get(key, 0) for source in result["sources"]) for key in ("broken", "lost_bytes"))
    records = f"broken records: {broken:,}{f' with {lost:,} bytes' if broken else ''}"
    not_read = building.say_unread(result["not_read"])
    return "\n".join([mix, f"held out: {held:,} documents; {records}", *not_read, f"corpus: {result['folder']}"])


def prepare_and_draw(config: Config) -> None:
    """The verb as a person runs it: with pictures of the plan."""
    ensure_mix_pictures(Path(prepare(config)["folder"]))


if __name__ == "__main__":
    main("prepare", prepare_and_draw)
