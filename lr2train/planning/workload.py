"""How much there is to train on: segments by window, steps, tokens.

Choice: the best known count wins: the prepared corpus, else the token budgets, else the curriculum's stages. Where none of them is known
the plan says so and gives the cost of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lr2train.config import Config, LongAttention
from lr2train.data.batch import LONG, SHORT
from lr2train.data.corpus import MANIFEST
from lr2train.io import read_json


@dataclass(frozen=True)
class WorkloadPart:
    """Segments of one kind.

    Attributes:
        window: short | long.
        segments: how many of an epoch; only their share counts where ``Workload.steps`` was set by hand.
        span_tokens: how far a token may attend back, at most.
    """

    window: str
    segments: int
    span_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is to be trained.

    Attributes:
        parts: by window.
        steps: optimizer steps; None where nothing says how many.
        origin: where the numbers come from, for a person.
        assumptions: what was taken for granted.
    """

    parts: tuple[WorkloadPart, ...]
    steps: int | None
    origin: str
    assumptions: tuple[str, ...]

    def share(self, part: WorkloadPart) -> float:
        """Of all segments, 0 … 1."""
        return part.segments / sum(one.segments for one in self.parts)


def workload_of(config: Config, window_tokens: int, dp_size: int) -> Workload:
    """The work of a config for a model of ``window_tokens`` on ``dp_size`` data-parallel ranks."""
    parts, origin = _parts(config, window_tokens)
    planned = _steps(parts, config, dp_size) if origin else None
    steps = config.optim.steps or planned
    if config.optim.steps:
        origin = f"optim.steps; mix by {origin}" if origin else "optim.steps"
    return Workload(parts, steps, origin or "unknown", tuple(_assumptions(config, parts, origin, window_tokens)))


def segments_of(tokens: int, segment_tokens: int) -> int:
    """Segments that a budget of tokens fills, without padding."""
    return -(-tokens // segment_tokens)


def _parts(config: Config, window_tokens: int) -> tuple[tuple[WorkloadPart, ...], str]:
    data, total = config.data, config.optim.segments_per_step
    if data.kind == "curriculum" and data.stages:
        return tuple(WorkloadPart(SHORT, stage.steps * total, stage.length_tokens) for stage in data.stages), "data.stages"
    counts, origin = _segments(config)
    parts = tuple(
        WorkloadPart(window, counts[window], window_tokens if window == SHORT else data.segment_tokens)
        for window in (SHORT, LONG)
        if counts[window]
    )
    return parts or (WorkloadPart(LONG, total, data.segment_tokens),), origin


def _segments(config: Config) -> tuple[dict[str, int], str]:
    data = config.data
    manifest = Path(data.path or "") / MANIFEST
    if data.path is not None and manifest.is_file():
        return {window: plan["segments"] for window, plan in read_json(manifest)["windows"].items()}, f"{manifest}"
    if data.short_tokens or data.long_tokens:
        return {
            SHORT: segments_of(data.short_tokens, data.segment_tokens),
            LONG: segments_of(data.long_tokens, data.segment_tokens),
        }, "data.short_tokens and data.long_tokens"
    return {SHORT: 0, LONG: 0}, ""


def _steps(parts: tuple[WorkloadPart, ...], config: Config, dp_size: int) -> int:
    """As the loader counts: every window is rounded up to whole groups, all of them to whole steps."""
    group = config.data.group_segments or dp_size
    groups = sum(-(-part.segments // group) for part in parts)
    return -(-groups // (config.optim.segments_per_step // group))


def _assumptions(config: Config, parts: tuple[WorkloadPart, ...], origin: str, window_tokens: int) -> list[str]:
    lines = []
    if origin.startswith("data.short_tokens"):
        lines.append("segments are filled to the last token (the packer's padding is below a percent on ordinary text)")
    if not origin:
        lines.append(
            "neither a corpus, nor budgets, nor stages say how many segments there are: every segment is counted as long, which "
            "is the most expensive case"
        )
    if any(part.window == SHORT for part in parts) and origin != "data.stages":
        lines.append(f"documents of short segments are all {window_tokens:,} tokens long, the most that they can be")
    if config.data.long_attention is LongAttention.document and any(part.window == LONG for part in parts):
        lines.append(
            "data.long_attention=document: documents of long segments are counted as long as the segment, the most that they can be"
        )
    return lines
