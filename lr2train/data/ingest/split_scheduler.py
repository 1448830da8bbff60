"""Which input splits of a source are tokenised, and which of them count under the source's limits.

Choice: the limits (documents, bytes, tokens) mean what they mean to one process that reads the source from its
beginning. Several processes tokenise splits ahead, each under what is left as far as is known. A split in which a limit
turns out to lie is done again with exactly what is left. Cost: at a limit, up to one split a process is tokenised in
vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from lr2train.data.ingest.sources import SourceLimits
from lr2train.data.ingest.tokenize_split import SplitTask


class SplitScheduler:
    """Hands out the splits of a source and takes their manifests back, in any order.

    Args:
        tasks: all splits in order, with the source's whole limits.
        finished: manifests of finished splits, by number.

    Attributes:
        counted: manifests of the splits that count, in order. They end where a limit is reached.
        complete: whether ``counted`` is final.
    """

    def __init__(self, tasks: Sequence[SplitTask], finished: dict[int, dict[str, Any]]) -> None:
        self._tasks, self._finished = tasks, dict(finished)
        self._left = tasks[0].limits if tasks else SourceLimits()  # after the counted splits
        self._handed_out: set[int] = set(finished)
        self.counted: list[dict[str, Any]] = []
        self.complete = not tasks
        self._count()

    def next_task(self) -> SplitTask | None:
        """The next split to tokenise; None where there is none now."""
        if self.complete:
            return None
        numbers = range(len(self.counted), len(self._tasks))
        number = next((number for number in numbers if number not in self._handed_out), None)
        if number is None:
            return None
        self._handed_out.add(number)
        return self._tasks[number]._replace(limits=self._left)

    def add_result(self, task: SplitTask, manifest: dict[str, Any]) -> None:
        """A split is done."""
        self._finished[task.number] = manifest
        self._count()

    def _count(self) -> None:
        """Count finished splits in order, as far as there is no gap."""
        while not self.complete and len(self.counted) in self._finished:
            number = len(self.counted)
            manifest = self._finished[number]
            if manifest["limits"] != asdict(self._left) and (manifest["limited"] or not self._fits(manifest)):
                del self._finished[number]  # done again, under what is really left
                self._handed_out.discard(number)
                return
            self.counted.append(manifest)
            self._left = _subtract(self._left, manifest)
            nothing_left = 0 in asdict(self._left).values()
            self.complete = manifest["limited"] or nothing_left or len(self.counted) == len(self._tasks)

    def _fits(self, manifest: dict[str, Any]) -> bool:
        """Whether a split lies wholly within what is left, so that the limits that it was read under did not matter."""
        amounts = (
            (self._left.documents, manifest["read_documents"]),
            (self._left.text_bytes, manifest["text_bytes"]),
            (self._left.tokens, manifest["read_tokens"] + 1),  # + 1: reading ends as soon as the tokens are reached
        )
        return all(left is None or amount <= left for left, amount in amounts)


def _subtract(limits: SourceLimits, manifest: dict[str, Any]) -> SourceLimits:
    """The limits that remain after a split."""
    read = {
        "documents": manifest["read_documents"],
        "text_bytes": manifest["text_bytes"],
        "tokens": manifest["read_tokens"],
    }
    left = {key: max(0, limit - read[key]) for key, limit in asdict(limits).items() if limit is not None}
    return replace(limits, **left)
