"""The plan of a corpus: documents' lengths -> segments, and the manifest that makes the folder a corpus.

Choice: the plan reads lengths alone, so another mix, another L0 or another segment length never tokenises again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import DataConfig, UserError
from lr2train.data import buckets, packing
from lr2train.data.batch import LONG, SHORT
from lr2train.data.corpus import FORMAT, MANIFEST, PLAN, store_prefix
from lr2train.run import fingerprint as fingerprint_of
from lr2train.run import read_json, stream, write_json

Log = Callable[[str], None]
_MANY_PASSES = 4  # over the same text are about as good as new text, more are not (Muennighoff et al., 2023)


def budgets(data: DataConfig) -> dict[str, int]:
    """Tokens to plan by window; 0 is every document once."""
    return {SHORT: data.short_tokens, LONG: data.long_tokens}


def ensure_plan(
    folder: Path, data: DataConfig, made: Sequence[dict[str, Any]], original_window_tokens: int, seed: int, log: Log
) -> dict[str, Any]:
    """Plan the segments and write the manifest; returns the manifest.

    Raises:
        UserError: the documents do not fill a single segment, or a window with a budget has none.
    """
    knobs = [
        data.segment_tokens,
        data.short_tokens,
        data.long_tokens,
        data.over_long.name,
        data.align_sp,
        [[source.weight, sorted(source.windows)] for source in data.sources],
    ]
    fingerprint = fingerprint_of(
        [FORMAT, original_window_tokens, seed, knobs, [(one["fingerprint"], one["sha256"], one["holdout_sha256"]) for one in made]]
    )
    manifest_file = folder / MANIFEST
    if manifest_file.exists() and (folder / PLAN).exists() and read_json(manifest_file).get("fingerprint") == fingerprint:
        log("plan: done before")
        return read_json(manifest_file)
    manifest_file.unlink(missing_ok=True)
    started = time.monotonic()
    counts, plan = plan_segments(folder, data, original_window_tokens, seed)
    _write_plan(folder / PLAN, plan)
    head = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "original_window_tokens": original_window_tokens,
        "segment_tokens": data.segment_tokens,
    }
    write_json(manifest_file, {**head, "sources": list(made), **counts})
    if data.holdout == 1:
        log("plan: everything is held out; the corpus serves searches and evaluations, and no training")
    for window in (SHORT, LONG):
        if not plan[window].n_segments and data.holdout < 1:
            log(f"plan: no {window} segment, because documents of that window fill none; training will see the other window alone")
        for name, one in counts["windows"][window]["sources"].items():
            if one["planned_tokens"] > _MANY_PASSES * one["tokens"]:
                times = one["planned_tokens"] / one["tokens"]
                log(
                    f"plan: {window} documents of {name} come {times:.1f} times each, because {one['planned_tokens']} tokens are asked of its "
                    f"{one['tokens']}; raise its limits, or lower its weight or data.{window}_tokens"
                )
    for line in _missing(data, counts["windows"]):
        log(line)
    if not any(one["holdout_documents"] for one in made):
        log("nothing is held out, so the search and the evaluation will have no text; prepare more documents, or a greater data.holdout")
    log(
        f"plan: {counts['windows'][SHORT]['segments']} short and {counts['windows'][LONG]['segments']} long segments in "
        f"{time.monotonic() - started:.1f} s"
    )
    return read_json(manifest_file)


def _missing(data: DataConfig, windows: dict[str, Any]) -> Iterator[str]:
    """A line for each source that has no document of a window in which its weight counts: the others take its share."""
    for window, budget in budgets(data).items():
        counting = [source for source in data.sources if window in source.windows and source.weight > 0]
        total = sum(source.weight for source in counting)
        for source in counting:
            if budget and not windows[window]["sources"][source.name]["documents"]:
                yield (
                    f"plan: {source.name} has no {window} document, so the other sources take its share of {source.weight / total * budget:.0f} "
                    f"tokens; raise its limits, or leave {window} out of its windows"
                )


def plan_segments(
    folder: Path, data: DataConfig, original_window_tokens: int, seed: int
) -> tuple[dict[str, Any], dict[str, packing.Pieces]]:
    """The pieces of both windows, and what to say of them."""
    lengths = [np.load(store_prefix(folder, f"{source.name}.lengths.npy"), mmap_mode="r") for source in data.sources]
    available = _available(data, lengths, original_window_tokens)
    weights = [source.weight for source in data.sources]
    pieces = packing.pack_short(
        buckets.draw(available[SHORT], weights, data.short_tokens, stream(seed, "plan", SHORT)), data.segment_tokens, data.align_sp
    )
    stretched, lost = packing.pack_long(
        buckets.draw(available[LONG], weights, data.long_tokens, stream(seed, "plan", LONG)), data.segment_tokens, data.over_long
    )
    plan = {SHORT: pieces, LONG: stretched}
    if not pieces.n_segments + stretched.n_segments and data.holdout < 1:
        raise UserError(
            f"{sum(map(len, lengths))} documents do not fill one segment of data.segment_tokens={data.segment_tokens}; add text or set a "
            "smaller data.segment_tokens"
        )
    windows = {window: _window_counts(plan[window], available[window], [source.name for source in data.sources]) for window in plan}
    return {"windows": windows, "lost_tokens": asdict(lost)}, plan


def _available(data: DataConfig, lengths: Sequence[np.ndarray], original_window_tokens: int) -> dict[str, list[buckets.Selection]]:
    """The documents of each source by window, for the windows that the source is meant for.

    Raises:
        UserError: a window with a budget has none.
    """
    by_window = zip((SHORT, LONG), buckets.sort_by_window(lengths, original_window_tokens), strict=True)
    available = {
        window: [one if window in source.windows else one.take(np.arange(0)) for one, source in zip(selections, data.sources, strict=True)]
        for window, selections in by_window
    }
    for window, budget in budgets(data).items():
        if budget and not sum(map(len, available[window])):
            raise UserError(
                f"data.{window}_tokens={budget} cannot be filled, because there is no {window} document (the border is the original window of "
                f"{original_window_tokens} tokens): all {budget} are missing; add such documents, or set data.{window}_tokens=0"
            )
    return available


def _window_counts(pieces: packing.Pieces, available: Sequence[buckets.Selection], names: Sequence[str]) -> dict[str, Any]:
    planned = np.bincount(pieces.source, weights=pieces.stop - pieces.start, minlength=len(names)).astype(int)
    by_source = {
        name: {"documents": len(one), "tokens": one.tokens, "planned_tokens": int(tokens)}
        for name, one, tokens in zip(names, available, planned, strict=True)
    }
    return {
        "segments": pieces.n_segments,
        "planned_tokens": pieces.tokens,
        "padding_share": round(pieces.padding_share, 6),
        "sources": by_source,
    }


def _write_plan(path: Path, plan: dict[str, packing.Pieces]) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez(file, **{f"{window}_{column}": getattr(pieces, column) for window, pieces in plan.items() for column in packing.COLUMNS})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
