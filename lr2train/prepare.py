"""prepare: documents -> token stores -> planned segments.

    python -m lr2train.prepare experiment=tiny_4k name=corpus

Writes ``runs/<name>/``: tokenizer/, store/, segments.npz, corpus.json (see lr2train.data.corpus) and prepare.json. Killed at any time, the
same command goes on at the source where it was.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lr2train import run
from lr2train.config import Config, ModelConfig, UserError, main
from lr2train.data import building, segmenting
from lr2train.data.batch import WINDOWS
from lr2train.rope import hf as rope_hf

GROUPS = ("seed", "data")


def prepare(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``prepare.json`` holds.

    Raises:
        UserError: sources, tokenizer or windows that cannot be prepared.
    """
    original_window_tokens = original_window(config.model)
    building.check(config.data, original_window_tokens)
    job = run.open_run(config, "prepare", GROUPS)
    started = time.monotonic()
    tokenizer = building.ensure_tokenizer(job.folder, config.data, job.log)
    stores = building.ensure_stores(job.folder, config.data, tokenizer, original_window_tokens, config.seed, job.log)
    manifest = segmenting.ensure_plan(job.folder, config.data, stores, original_window_tokens, config.seed, job.log)
    lock = job.claim({})  # only now: a budget that cannot be filled must not reserve the name
    result = {**manifest, "folder": str(job.folder), "seconds": round(time.monotonic() - started, 2)}
    job.write_json("prepare.json", result)
    print(table(result), flush=True)
    if lock is not None:
        lock.close()
    return result


def original_window(model: ModelConfig) -> int:
    """L0: as set, else as the model's config has it.

    Raises:
        UserError: the model's config is not at hand, or broken.
    """
    if model.original_window_tokens is not None:
        return model.original_window_tokens
    file = Path(model.path or "") / "config.json"
    if model.path is not None and file.is_file():
        return rope_hf.spectrum_of(run.read_json(file)).window_tokens
    if model.path is None and model.architecture:
        return rope_hf.spectrum_of(dict(model.architecture)).window_tokens
    raise UserError(f"model.path={model.path} has no config.json to read the original window from; set model.original_window_tokens")


def table(result: dict[str, Any]) -> str:
    """The counts for a person: a line for each source and window."""
    lines = [f"{'source':<16}{'window':<8}{'documents':>11}{'tokens':>15}{'planned':>15}"]
    for window in WINDOWS:
        for name, counts in result["windows"][window]["sources"].items():
            lines.append(f"{name:<16}{window:<8}{counts['documents']:>11,}{counts['tokens']:>15,}{counts['planned_tokens']:>15,}")
    for window in WINDOWS:
        plan = result["windows"][window]
        lines.append(f"{window}: {plan['segments']:,} segments of {result['segment_tokens']:,} tokens, {plan['padding_share']:.2%} padding")
    lost = ", ".join(f"{cause} {tokens:,}" for cause, tokens in result["lost_tokens"].items())
    held = sum(source["holdout_documents"] for source in result["sources"])
    broken = sum(source["broken"] for source in result["sources"])
    return "\n".join(
        [*lines, f"lost tokens: {lost}; held out: {held:,} documents; broken records: {broken:,}", f"corpus: {result['folder']}"]
    )


if __name__ == "__main__":
    main("prepare", prepare)
