"""The settings that a resumed run keeps about its data: group size and skipped steps. File: ``train.steps.json``.

Choice: the first start settles ``data.group_segments``, so that a later start on another number of ranks sees the same
segments at the same steps. ``data.skip_steps`` leaves out steps that were seen to harm: nothing is loaded or learned
there. The step counter, the learning rate and the data of all other steps stay the same (as in Megatron and OLMo-core).
The key may change for steps to come. Cost: a skipped step has no line in metrics.jsonl, and a run with skips makes
fewer
updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lr2train.config import DataConfig, UserError
from lr2train.data.feed.order import default_group
from lr2train.io import read_json

FILE = "train.steps.json"


@dataclass(frozen=True)
class StepRanges:
    """Chosen steps: sorted, disjoint ranges (first, last), both included, counted from 1 as in metrics.jsonl."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str], key: str = "data.skip_steps") -> StepRanges:
        """Read the value of ``key``.

        Raises:
            UserError: an entry is neither a step nor a range of steps.
        """
        ranges: list[tuple[int, int]] = []
        for first, last in sorted(_range(text, key) for text in texts):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        return cls(tuple(ranges))

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.ranges)

    def until(self, step: int) -> StepRanges:
        """The chosen steps among the first ``step`` steps."""
        return StepRanges(tuple((first, min(last, step)) for first, last in self.ranges if first <= step))

    @property
    def count(self) -> int:
        """The number of chosen steps."""
        return sum(last - first + 1 for first, last in self.ranges)

    def remaining(self, done: int, total: int) -> list[int]:
        """The steps that are not chosen, from ``done`` to ``total``; counted from 0, as loaders count."""
        edges = [(done, done), *((first - 1, last) for first, last in self.ranges if last > done), (total, total)]
        return [step for (_, end), (begin, _) in pairwise(edges) for step in range(max(end, done), min(begin, total))]

    @property
    def texts(self) -> list[str]:
        """The form that ``parse`` takes."""
        return [f"{first}-{last}" if first < last else f"{first}" for first, last in self.ranges]

    def __str__(self) -> str:
        return ", ".join(self.texts) or "none"


def _range(text: str, key: str) -> tuple[int, int]:
    first, dash, last = str(text).partition("-")
    try:
        found = int(first), int(last if dash else first)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise UserError(
            f"{key} has the entry {text!r}, which is neither a step nor a range of steps; write a step as "
            "metrics.jsonl counts steps, such as 1500, or the first and the last step of a range, such as 1200-1230"
        )
    return found


@dataclass(frozen=True)
class Steps:
    """The group size and the skipped steps of a run.

    Attributes:
        group_segments: the settled ``data.group_segments``.
        skips: ``data.skip_steps`` of this start.
        before: ``data.skip_steps`` of the start before; None at the first start.
    """

    group_segments: int
    skips: StepRanges
    before: StepRanges | None

    @classmethod
    def settle(cls, folder: Path, data: DataConfig, dp_size: int, segments_per_step: int) -> Steps:
        """Settle the group size: from the run folder, else from the config, else ``order.default_group``.

        The default leaves room for more data-parallel ranks at a later start.

        Raises:
            UserError: ``data.skip_steps`` cannot be read, or ``data.group_segments`` is not that of the first start.
        """
        found: dict[str, Any] = read_json(folder / FILE) if (folder / FILE).exists() else {}
        before = StepRanges(tuple((first, last) for first, last in found["skipped"])) if found else None
        if found and data.group_segments not in (0, found["group_segments"]):
            raise UserError(
                f"data.group_segments={data.group_segments}, and the run was started with {found['group_segments']}, "
                f"which decides the data of its steps; set data.group_segments to {found['group_segments']}"
            )
        return cls(
            found.get("group_segments") or data.group_segments or default_group(dp_size, segments_per_step),
            StepRanges.parse(data.skip_steps),
            before,
        )

    def applied(self, data: DataConfig) -> DataConfig:
        """The config with the settled group size."""
        return replace(data, group_segments=self.group_segments)

    def refuse_other_past(self, done: int) -> None:
        """Refuse other skipped steps than before among the first ``done`` steps, which are trained already.

        Raises:
            UserError: the skipped steps among the first ``done`` differ, or the file that names them is missing.
        """
        if self.before is None and done:
            raise UserError(
                f"{FILE} of the run is missing: it says which data its {done} steps read (data.group_segments, "
                "data.skip_steps); restore the file, or choose another name= to start over"
            )
        if self.before is not None and self.before.until(done) != self.skips.until(done):
            raise UserError(
                f"data.skip_steps skips {self.skips.until(done)} of the {done} steps that are done, and the run was "
                "made "
                f"skipping {self.before.until(done)}; change steps after {done} only, go back to an earlier "
                "checkpoint, "
                "or choose another name="
            )

    def to_json(self) -> dict[str, Any]:
        """The content of ``train.steps.json``, which ``settle`` reads at the next start."""
        return {"group_segments": self.group_segments, "skipped": [list(one) for one in self.skips.ranges]}
