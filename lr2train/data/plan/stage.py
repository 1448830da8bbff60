"""Stage 2 of ``prepare``: segment tables on disk, their report, and last the manifest that makes the folder a corpus.

Choice: stage 2 reads document lengths alone, so another mix, another L0 or another segment length never tokenises
again. Its files are reused where their fingerprint and checksums hold. Cost: both are computed at each start, from all
settings that decide the place of a token.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import DataConfig, UserError, WeightsOf, to_dict
from lr2train.data.batch import SHORT, WINDOWS
from lr2train.data.corpus import FORMAT, MANIFEST, reopen, source_store
from lr2train.data.plan import packing, segment_table
from lr2train.data.plan.compose import Mixture, compose_segments
from lr2train.data.plan.mix import budgets
from lr2train.data.plan.report import as_text, report_of
from lr2train.data.store import sealed
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import seal, write_json, write_text

Log = Callable[[str], None]
PLAN_JSON, PLAN_TEXT = "plan.json", "plan.txt"
_WORTH_SAYING = 0.005  # share of its target by which a source or a bucket may miss the target without a log line
_MUCH_PADDING = 0.02  # share of padding in short segments that is worth a log line
_FEW_HELD_OUT = 8  # documents; fewer are worth a log line


def ensure_segment_tables(
    folder: Path, data: DataConfig, made: Sequence[dict[str, Any]], original_window_tokens: int, seed: int, log: Log
) -> dict[str, Any]:
    """Write segment tables, report and manifest, unless they are there and nothing that decides them has changed.

    Args:
        folder: of the corpus, with finished stores.
        data: the mix and the segment length.
        made: summary of each source by stage 1.
        original_window_tokens: L0.
        seed: decides all draws and orders.
        log: takes lines for a person.

    Returns:
        The manifest.

    Raises:
        UserError: the documents do not fill a single segment, or a budget cannot be filled.
    """
    stores = [source_store(folder, source.name) for source in data.sources]
    usable = [store.usable for store in stores]
    fingerprint = _fingerprint(data, made, usable, original_window_tokens, seed)
    found = _finished(folder, fingerprint)
    if found is not None:
        log("segments: made before")
        return found
    started = time.monotonic()
    lengths = [store.lengths for store in stores]
    mixture = compose_segments(data, lengths, usable, original_window_tokens, seed)
    if not sum(table.n_segments for table in mixture.tables.values()) and data.holdout < 1:
        raise UserError(
            f"{sum(map(len, lengths))} documents do not fill one segment of data.segment_tokens={data.segment_tokens}; "
            "add text or set a smaller data.segment_tokens"
        )
    report = report_of(data, lengths, usable, mixture)
    head = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "original_window_tokens": original_window_tokens,
        "segment_tokens": data.segment_tokens,
        "sources": list(made),
    }
    reopen(folder)  # only now: a budget that cannot be filled must not cost a finished corpus
    _write(folder, head, mixture, report)
    for line in _remarks(data, made, report):
        log(line)
    counts = " and ".join(f"{report['windows'][window]['segments']} {window}" for window in WINDOWS)
    log(f"segments: {counts} in {time.monotonic() - started:.1f} s")
    return sealed(folder / MANIFEST)


def _write(folder: Path, head: dict[str, Any], mixture: Mixture, report: dict[str, Any]) -> None:
    """The segment tables, the report, and the manifest last."""
    files = {
        window: segment_table.write(segment_table.file_of(folder, window), table)
        for window, table in mixture.tables.items()
    }
    write_json(folder / PLAN_JSON, report)
    write_text(folder / PLAN_TEXT, as_text(report) + "\n")
    mix = {key: report[key] for key in ("cells", "by_source", "by_bucket", "by_window")}
    seal(
        folder / MANIFEST,
        {**head, "windows": report["windows"], "lost_tokens": report["lost_tokens"], "mix": mix, "plan": files},
    )


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of finished segment tables of this fingerprint; None where there are none.

    Raises:
        UserError: a table differs from the one that was written.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = sealed(folder / MANIFEST)
    files = [
        folder / PLAN_JSON,
        folder / PLAN_TEXT,
        *(segment_table.file_of(folder, window) for window in manifest["plan"]),
    ]
    if manifest.get("fingerprint") != fingerprint or not all(file.exists() for file in files):
        return None
    for window, about in manifest["plan"].items():
        segment_table.verify(segment_table.file_of(folder, window), about)
    return manifest


def _fingerprint(
    data: DataConfig,
    made: Sequence[dict[str, Any]],
    usable: Sequence[np.ndarray | None],
    original_window_tokens: int,
    seed: int,
) -> str:
    """Stands for all settings and tokens that decide which token stands where."""
    plain = to_dict(data)
    keys = (
        "segment_tokens", "short_tokens", "long_tokens", "buckets", "weights_of", "max_repeats", "keep_below",
        "keep_below_tokens", "over_long",
    )  # fmt: skip
    settings = [*(plain[key] for key in keys), packing.sequence_shards(data.align_sp), segment_table.FORMAT]
    of_sources = [[source.weight, sorted(source.windows)] for source in data.sources]
    masks = [None if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() for mask in usable]
    tokens = [(one["name"], one["fingerprint"], one["sha256"], one["holdout_sha256"]) for one in made]
    return fingerprint_of([FORMAT, original_window_tokens, seed, settings, of_sources, masks, tokens])


def _remarks(data: DataConfig, made: Sequence[dict[str, Any]], report: dict[str, Any]) -> Iterator[str]:
    """Log lines about results that a person may not expect."""
    if data.holdout == 1:
        yield "segments: all documents are held out; the corpus serves searches and evaluations, but no training"
    elif not (held := sum(one["holdout_documents"] for one in made)):
        yield "nothing is held out, so search and evaluate have no text; prepare more documents, or raise data.holdout"
    elif held < _FEW_HELD_OUT:
        yield (
            f"held out: only {held} {'document' if held == 1 else 'documents'}; all text of search, validation and "
            "evaluation comes from there, so their figures say little; prepare more documents, or raise data.holdout"
        )
    for window in WINDOWS:
        if not report["windows"][window]["segments"] and data.holdout < 1:
            yield f"no {window} segment: its documents fill none; training will see the other window alone"
    yield from _absent(data, report)
    for what in ("source", "bucket"):
        for one in report[f"by_{what}"]:
            if one["target_tokens"] and abs(one["error"]) > _WORTH_SAYING and data.holdout < 1:
                yield (
                    f"mix: {what} {one[what]} has {one['planned_tokens']} of {one['target_tokens']} tokens "
                    f"({one['error']:+.2%}), because documents and segments come whole, and there are few"
                )
    padding, shards = report["windows"][SHORT]["padding_share"], packing.sequence_shards(data.align_sp)
    if padding > _MUCH_PADDING:
        yield (
            f"segments: {padding:.1%} of the short ones is padding, because few documents fill the room that others "
            f"leave in a sequence shard of {data.segment_tokens // shards} tokens; add shorter "
            f"documents{f', or set data.align_sp below {shards}' if shards > 1 else ''}"
        )
    outside = report["outside"]
    if outside["documents"]:
        yield (
            f"mix: {outside['documents']} documents with {outside['tokens']} tokens lie in no bucket and are not "
            "planned; widen data.buckets to plan them"
        )


def _absent(data: DataConfig, report: dict[str, Any]) -> Iterator[str]:
    """A log line for each source that has a weight in a bucket and no document: the other sources take its share."""
    listed = {bucket.window for bucket in data.buckets if bucket.sources}
    there = {(row["source"], row["bucket"]) for row in report["cells"] if row["documents"]}
    for bucket in report["by_bucket"]:
        name, window, budget = bucket["bucket"], bucket["window"], bucket["target_tokens"]
        if not budgets(data)[window] or window in listed or data.weights_of is not WeightsOf.bucket:
            continue
        counting = [source for source in data.sources if window in source.windows and source.weight > 0]
        total = sum(source.weight for source in counting)
        for source in counting:
            if (source.name, name) not in there:
                yield (
                    f"mix: {source.name} has no {window} document{'' if name == window else f' of bucket {name}'}, so "
                    f"the other sources take its share of {source.weight / total * budget:.0f} tokens; raise its "
                    f"limits, leave {window} out of its windows, or give every bucket weights of single sources "
                    "(data.buckets.*.sources)"
                )
