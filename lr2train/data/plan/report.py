"""The report of a mix: target and planned tokens by source, bucket and window, padding, repeats, lost tokens.

Choice: planned tokens are counted anew from the segment tables, which training reads, not taken from the code that
composed them. Cost: a pass over all document spans. The result is ``plan.json`` and, as text, ``plan.txt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lr2train.config import DataConfig, OverLong
from lr2train.data.batch import LONG, WINDOWS
from lr2train.data.plan.buckets import ENDLESS, Bucket, Cell
from lr2train.data.plan.compose import Mixture
from lr2train.data.plan.segment_table import SegmentTable

_NO_BUCKET = -1
_OCTAVES, _PER_OCTAVE = 24, 4  # the histogram of document lengths has four bins an octave
_BARS = 40  # at most, in the histogram of documents a segment


def report_of(
    data: DataConfig, lengths: Sequence[np.ndarray], usable: Sequence[np.ndarray | None], mixture: Mixture
) -> dict[str, Any]:
    """Plain JSON values about a mixture.

    Args:
        data, lengths, usable: arguments of :func:`lr2train.data.plan.compose.compose_segments`.
        mixture: its result.

    Returns:
        ``windows`` (segments, planned_tokens, padding_share, documents_per_segment, sources), ``lost_tokens`` (tail,
        truncated, dropped), ``cells``, ``by_source``, ``by_bucket``, ``by_window`` (target_tokens, planned_tokens,
        error = planned / target - 1), ``outside`` (documents in no bucket), ``left_out`` (as duplicates and by
        ``keep_below``) and ``histograms``.
    """
    names, buckets, tables = [source.name for source in data.sources], mixture.buckets, mixture.tables
    planned = sum(_planned_tokens(one, lengths, mixture.cells) for one in tables.values())
    assert isinstance(planned, np.ndarray)
    rows = [
        _cell_row(
            name,
            lengths[source],
            bucket,
            mixture.cells[source][at],
            int(mixture.targets[source, at]),
            mixture.drawn[source][at],
            int(planned[source, at]),
        )
        for source, name in enumerate(names)
        for at, bucket in enumerate(buckets)
    ]
    ranges = {
        one.name: {"above_tokens": one.above_tokens, "to_tokens": None if one.to_tokens == ENDLESS else one.to_tokens}
        for one in buckets
    }
    return {
        "windows": {
            window: _window(tables[window], [row for row in rows if row["window"] == window], names)
            for window in WINDOWS
        },
        "lost_tokens": {
            cause: sum(row[f"{cause}_tokens"] for row in rows) for cause in ("tail", "truncated", "dropped")
        },
        "cells": [row for row in rows if row["documents"] or row["target_tokens"]],
        "by_source": [_sum("source", name, rows) for name in names],
        "by_bucket": [{**_sum("bucket", one.name, rows), "window": one.window, **ranges[one.name]} for one in buckets],
        "by_window": [_sum("window", window, rows) for window in WINDOWS],
        **_unplanned(data, lengths, usable, mixture),
        "histograms": {"lengths": _length_histograms(names, lengths, tables)},
    }


def _planned_tokens(table: SegmentTable, lengths: Sequence[np.ndarray], cells: Sequence[Sequence[Cell]]) -> np.ndarray:
    """int64 [sources, buckets]: tokens in the segments of one window."""
    n_buckets = len(cells[0]) if cells else 0
    planned = np.zeros((len(cells), n_buckets), np.int64)
    tokens = table.stop - table.start
    for source, row in enumerate(cells):
        bucket_of = np.full(len(lengths[source]), _NO_BUCKET, np.int16)
        for at, cell in enumerate(row):
            bucket_of[cell.document] = at
        mine = np.flatnonzero(table.source == source)
        planned[source] = np.bincount(bucket_of[table.document[mine]], weights=tokens[mine], minlength=n_buckets)
    return planned


def _cell_row(
    name: str, lengths: np.ndarray, bucket: Bucket, cell: Cell, target: int, rows: np.ndarray, planned: int
) -> dict[str, Any]:
    drawn_tokens = int(cell.length[rows].sum(dtype=np.int64))
    cut = bucket.over_limit is OverLong.truncate
    return {
        "source": name,
        "bucket": bucket.name,
        "window": bucket.window,
        "documents": len(cell),
        "tokens": cell.tokens,
        "target_tokens": target,
        "planned_tokens": planned,
        "error": _error(planned, target),
        "drawn_documents": len(rows),
        "repeats": round(drawn_tokens / cell.tokens, 4) if cell.tokens else 0.0,
        "tail_tokens": drawn_tokens - planned,
        "truncated_tokens": int(lengths[cell.document[rows]].sum(dtype=np.int64)) - drawn_tokens if cut else 0,
        "dropped_tokens": cell.dropped_tokens,
    }


def _error(planned: int, target: int) -> float:
    return round(planned / target - 1.0, 7) if target else 0.0


def _sum(what: str, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row[what] == name]
    target, planned = (sum(row[key] for row in mine) for key in ("target_tokens", "planned_tokens"))
    return {what: name, "target_tokens": target, "planned_tokens": planned, "error": _error(planned, target)}


def _window(table: SegmentTable, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    by_source = {
        name: {
            key: sum(row[key] for row in rows if row["source"] == name)
            for key in ("documents", "tokens", "planned_tokens")
        }
        for name in names
    }
    each = np.bincount(table.segment, minlength=table.n_segments)
    return {
        "segments": table.n_segments,
        "planned_tokens": table.tokens,
        "padding_share": round(table.padding_share, 6),
        "documents_per_segment": _summary(each),
        "sources": by_source,
    }


def _summary(counts: np.ndarray) -> dict[str, Any]:
    """Mean, extremes and histogram of whole numbers."""
    if not len(counts):
        return {"mean": 0.0, "least": 0, "most": 0, "edges": [], "segments": []}
    least, most = int(counts.min()), int(counts.max())
    step = -(-(most - least + 1) // _BARS)
    edges = np.arange(least, most + step + 1, step)
    heights = np.histogram(counts, edges)[0]
    return {
        "mean": round(float(counts.mean()), 3),
        "least": least,
        "most": most,
        "edges": edges.tolist(),
        "segments": heights.tolist(),
    }


def _unplanned(
    data: DataConfig, lengths: Sequence[np.ndarray], usable: Sequence[np.ndarray | None], mixture: Mixture
) -> dict[str, Any]:
    """``outside``: usable documents in no bucket of their source. ``left_out``: all others that were not taken."""
    outside, left_out = [0, 0], [0, 0]
    for source, of_source, mask, row in zip(data.sources, lengths, usable, mixture.cells, strict=True):
        inside, taken = np.zeros(len(of_source), bool), np.zeros(len(of_source), bool)
        for bucket, cell in zip(mixture.buckets, row, strict=True):
            inside |= bucket.serves(source) & bucket.holds(of_source)
            taken[cell.document] = True
        free = ~inside if mask is None else ~inside & mask
        for counts, chosen in ((outside, free), (left_out, ~taken & ~free)):
            counts[0] += int(chosen.sum())
            counts[1] += int(of_source[chosen].sum(dtype=np.int64))
        # Documents over the limit are lost tokens (``dropped``), so they do not count here.
        left_out[0] -= sum(cell.dropped_documents for cell in row)
        left_out[1] -= sum(cell.dropped_tokens for cell in row)
    return {
        "outside": dict(zip(("documents", "tokens"), outside, strict=True)),
        "left_out": dict(zip(("documents", "tokens"), left_out, strict=True)),
    }


def _length_histograms(
    names: Sequence[str], lengths: Sequence[np.ndarray], tables: dict[str, SegmentTable]
) -> dict[str, Any]:
    """Tokens by document length, stored and planned; bin i begins above 2 ** (i / per_octave)."""
    n_bins, found = _OCTAVES * _PER_OCTAVE, {}
    for source, (name, of_source) in enumerate(zip(names, lengths, strict=True)):
        bin_of = (np.ceil(np.log2(np.maximum(of_source, 1), dtype=np.float32) * _PER_OCTAVE).astype(np.int16) - 1).clip(
            0, n_bins - 1
        )
        planned = np.zeros(n_bins)
        for one in tables.values():
            mine = np.flatnonzero(one.source == source)
            planned += np.bincount(bin_of[one.document[mine]], weights=(one.stop - one.start)[mine], minlength=n_bins)
        there = np.bincount(bin_of, weights=of_source, minlength=n_bins)
        found[name] = {"tokens": there.astype(np.int64).tolist(), "planned_tokens": planned.astype(np.int64).tolist()}
    return {"per_octave": _PER_OCTAVE, "sources": found}


def as_text(report: dict[str, Any]) -> str:
    """A report for a person: cells, then sources, buckets and windows, then segments and lost tokens."""
    lines = [_line("source", "bucket", "documents", "has tokens", "target", "planned", "error", "repeats")]
    for row in report["cells"]:
        has = (f"{row['documents']:,}", f"{row['tokens']:,}")
        lines.append(_line(row["source"], row["bucket"], *has, *_marginal(row), f"{row['repeats']:.2f}"))
    same = [row["bucket"] for row in report["by_bucket"]] == [row["window"] for row in report["by_window"]]
    for what in ("source", "bucket") if same else ("source", "bucket", "window"):
        lines.append("")
        for row in report[f"by_{what}"]:
            names = (row["source"], "all") if what == "source" else ("all", row[what])
            lines.append(_line(*names, "", "", *_marginal(row), ""))
    lines.append("")
    for window, one in report["windows"].items():
        each = one["documents_per_segment"]
        kind = "document spans" if window == LONG else "documents"
        lines.append(
            f"{window}: {one['segments']:,} segments, {one['padding_share']:.3%} padding, {each['mean']:.1f} {kind} "
            f"each ({each['least']} … {each['most']})"
        )
    causes = {
        "tail": "after the last full long segment",
        "truncated": "over the limit",
        "dropped": "of documents over the limit",
    }
    lost = ", ".join(f"{report['lost_tokens'][cause]:,} {words}" for cause, words in causes.items())
    outside, left_out = report["outside"], report["left_out"]
    lines.append(f"lost tokens: {lost}")
    lines.append(
        f"not planned: {outside['documents']:,} documents in no bucket ({outside['tokens']:,} tokens), "
        f"{left_out['documents']:,} left out as duplicates or by keep_below ({left_out['tokens']:,} tokens)"
    )
    return "\n".join(lines)


def _marginal(row: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"{row['target_tokens']:,}",
        f"{row['planned_tokens']:,}",
        f"{row['error']:+.3%}" if row["target_tokens"] else "",
    )


def _line(source: str, bucket: str, *figures: str) -> str:
    widths = (12, 16, 16, 16, 10, 8)
    return (
        f"{source:<19} {bucket:<13} "
        + "".join(f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
    ).rstrip()
