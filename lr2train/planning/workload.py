"""Training work of a config: segments by window, optimizer steps, tokens.

Choice: counts come from a curriculum's stages, else from the prepared corpus, else from the token budgets. Without any
of the three, the estimate covers one step, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lr2train.attention import hf as attention
from lr2train.config import Config, LongAttention, LongPositions, UserError
from lr2train.data.batch import LONG, SHORT
from lr2train.data.corpus import MANIFEST
from lr2train.io import read_json
from lr2train.model import tiled_mlp


@dataclass(frozen=True)
class WorkloadPart:
    """Segments of one kind.

    Attributes:
        window: short | long.
        segments: in an epoch. With ``optim.steps`` given, only the share of all segments counts.
        span_tokens: the longest document span; a token attends back this far at most.
    """

    window: str
    segments: int
    span_tokens: int


@dataclass(frozen=True)
class Workload:
    """Training work of a run.

    Attributes:
        parts: segments by window, or by curriculum stage.
        steps: optimizer steps; None where they are unknown.
        origin: source of the numbers, to be read by a person.
        assumptions: sentences, to be read by a person.
    """

    parts: tuple[WorkloadPart, ...]
    steps: int | None
    origin: str
    assumptions: tuple[str, ...]

    @property
    def longest_span_tokens(self) -> int:
        """Of the longest document that attends to itself as a whole."""
        return max(part.span_tokens for part in self.parts)

    def share(self, part: WorkloadPart) -> float:
        """Share of all segments, 0 … 1."""
        return part.segments / sum(one.segments for one in self.parts)


def workload_of(config: Config, window_tokens: int, dp_size: int) -> Workload:
    """Work of a config, for a model of original window ``window_tokens`` on ``dp_size`` data-parallel ranks."""
    parts, origin = _parts(config, window_tokens)
    planned = _steps(parts, config, dp_size) if origin else None
    steps = config.optim.steps or planned
    if config.optim.steps:
        origin = f"optim.steps; mix by {origin}" if origin else "optim.steps"
    return Workload(parts, steps, origin or "unknown", tuple(_assumptions(config, parts, origin, window_tokens)))


def refuse_mesh(config: Config) -> None:
    """Refuse a world size that ``parallel.sp`` does not divide.

    Raises:
        UserError: ``parallel.sp`` exceeds ``hardware.gpus``, or does not divide it.
    """
    gpus, sp = config.hardware.gpus, config.parallel.sp
    if sp > gpus:
        shared = math.gcd(gpus, config.data.segment_tokens)  # divides the segment too
        raise UserError(f"parallel.sp={sp} exceeds hardware.gpus={gpus}; set parallel.sp to {shared}")
    if gpus % sp:
        raise UserError(
            f"hardware.gpus={gpus} is not divisible by parallel.sp={sp}; set hardware.gpus to {-(-gpus // sp) * sp}"
        )


def refuse_training(config: Config, hf_config: Any, workload: Workload) -> None:
    """Refuse what training would refuse before it starts, as far as no weights, corpus or ranks are needed.

    Raises:
        UserError: the tiles of the MLP, the attention strategy or jumping positions.
    """
    tiled_mlp.refuse_config(hf_config, config.engine.tile_mlp)
    length, longest = config.data.segment_tokens, workload.longest_span_tokens
    attention.refuse_config(hf_config, config.parallel, length, longest, config.hardware.gpus_per_node)
    if config.data.long_positions == LongPositions.skip:
        attention.refuse_jumps(hf_config, config.rope.target_window_tokens)


def segments_of(tokens: int, segment_tokens: int) -> int:
    """Segments that a token budget fills, without padding."""
    return -(-tokens // segment_tokens)


def _parts(config: Config, window_tokens: int) -> tuple[tuple[WorkloadPart, ...], str]:
    data, total = config.data, config.optim.segments_per_step
    if data.kind == "curriculum" and data.stages:
        return tuple(
            WorkloadPart(SHORT, stage.steps * total, stage.length_tokens) for stage in data.stages
        ), "data.stages"
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
    """As the loader counts: each window is rounded up to whole groups, the sum of groups to whole steps."""
    group = config.data.group_segments or dp_size  # segments of one window that are read together
    groups = sum(-(-part.segments // group) for part in parts)
    return -(-groups // (config.optim.segments_per_step // group))


def _assumptions(config: Config, parts: tuple[WorkloadPart, ...], origin: str, window_tokens: int) -> list[str]:
    lines = []
    if origin.startswith("data.short_tokens"):
        lines.append("segments are full (on ordinary text the packer pads less than 1 %)")
    if not origin:
        lines.append(
            "the number of segments is unknown (no corpus, no token budget, no stages): every segment counts as "
            "long, the "
            "most expensive case"
        )
    if any(part.window == SHORT for part in parts) and origin != "data.stages":
        lines.append(f"documents of short segments are all {window_tokens:,} tokens long, the longest possible")
    if config.data.long_attention is LongAttention.document and any(part.window == LONG for part in parts):
        lines.append(
            "data.long_attention=document: documents of long segments are as long as the segment, the longest possible"
        )
    return lines
