"""How much of a source is lost between its files and its documents, and whether that is too much.

Choice: the job stops where a source loses more than its ``max_broken_share`` of records, of files or of bytes of text,
because a missing part of a corpus shows nowhere later. Entries that cannot be opened are judged before any work; the
rest is judged while the source is read. Cost: the bytes of what nobody could read are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.find_files import FoundFiles, SourceInput, reasons_in_words
from lr2train.data.ingest.records import MISSING_COLUMN, NO_TEXT, nearest_column

_EARLY_RECORDS = 1000  # enough to stop a source with too many broken records before its end


class LostPart(NamedTuple):
    """The lost part of a source's records, files or bytes.

    Attributes:
        unit: ``records``, ``files`` or ``bytes of text``.
        lost: of this unit.
        total: lost and read.
    """

    unit: str
    lost: float
    total: float

    @property
    def share(self) -> float:
        """Lost share; 0 where there is nothing to lose."""
        return self.lost / self.total if self.total else 0.0

    def __str__(self) -> str:
        about = "" if self.unit == "records" else "about "
        return f"{about}{self.lost:.0f} of {self.total:.0f} {self.unit} are lost"


def refuse_unread(source: SourceConfig, found: FoundFiles) -> None:
    """Stop before hours of work on an incomplete source.

    Raises:
        UserError: more than the source's ``max_broken_share`` of files or of bytes cannot be opened.
    """
    lost, readable, report = found.lost, found.readable, found.unread_report()
    parts = (
        LostPart("files", lost.files, lost.files + readable.files),
        LostPart("bytes of text", lost.bytes, lost.bytes + readable.bytes),
    )
    exceeding = _first_exceeding(parts, source)
    if exceeding is not None:
        reasons, allow = reasons_in_words(report["reasons"], report["examples"]), _allow(source, parts)
        raise UserError(
            f"data.sources.{source.name}.path={source.path}: {exceeding} ({reasons}), more than its "
            f"max_broken_share of {source.max_broken_share:g}; make them readable, or "
            f"{allow} to go on without them"
        )


def _first_exceeding(parts: Iterable[LostPart], source: SourceConfig) -> LostPart | None:
    return next((part for part in parts if part.lost > source.max_broken_share * part.total), None)


def _allow(source: SourceConfig, parts: Iterable[LostPart]) -> str:
    """The setting that allows so much to be lost."""
    share = math.ceil(max(part.share for part in parts) * 1000) / 1000
    return f"set data.sources.{source.name}.max_broken_share={share:g}"


def no_document(source: SourceConfig, reasons: Mapping[str, int], columns: Mapping[str, Any]) -> UserError:
    """The error for a source without a single document.

    Args:
        reasons: of its broken records, with their counts.
        columns: of the first record without the text column (``ReadCounts.columns``).
    """
    key = f"data.sources.{source.name}"
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    counted += f"; {_columns_in_words(columns)}" if columns else ""
    broken = f": all its records are broken ({counted})" if reasons else ""
    meant = nearest_column(source.text_column, columns.get("has", {}))
    if meant:
        remedy = f"set {key}.text_column (now {source.text_column}) to {meant}"
    elif {MISSING_COLUMN, NO_TEXT} & set(reasons):
        remedy = f"set {key}.text_column (now {source.text_column}) to the column that holds the text"
    else:
        remedy = "point path at text, or raise its limits"
    return UserError(f"{key} ({source.kind}, path={source.path}) has no document{broken}; {remedy}")


def _columns_in_words(columns: Mapping[str, Any]) -> str:
    return f"{columns['origin']} has {', '.join(columns['has']) or 'no column of text'}"


class BrokenShare:
    """The lost share of a source: broken records, damaged files, and entries that could not be opened.

    A source may have limits, so its shards may cover a part of its input. The entries that could not be opened then
    count in the same proportion.

    Args:
        source: its config.
        manifests: of the token shards that count, in order.
        source_input: of the source.
    """

    def __init__(self, source: SourceConfig, manifests: Sequence[dict[str, Any]], source_input: SourceInput) -> None:
        self._source, self._unread_reasons = source, source_input.found.unread_report()["reasons"]
        self.reasons = sum((Counter(one["reasons"]) for one in manifests), Counter[str]())
        self.columns: dict[str, Any] = next((one["columns"] for one in manifests if one["columns"]), {})
        self._damaged_files = sorted({name for one in manifests for name in one["lost_files"]})
        broken = self.reasons.total()
        self.records = LostPart("records", broken, broken + sum(one["read_documents"] for one in manifests))
        self._files_and_bytes = self._lost_files_and_bytes(manifests, source_input)

    def _lost_files_and_bytes(
        self,
        manifests: Sequence[dict[str, Any]],
        source_input: SourceInput,
    ) -> tuple[LostPart, LostPart]:
        unread, readable = source_input.found.lost, source_input.found.readable
        sizes = [max(split.size_bytes, 1) for split in source_input.splits]
        read_share = sum(sizes[: len(manifests)]) / max(sum(sizes), 1)
        files = len({file.name for split in source_input.splits[: len(manifests)] for file in split.files})
        input_bytes, lost_bytes = (sum(one[key] for one in manifests) for key in ("input_bytes", "lost_bytes"))
        unread_bytes = unread.bytes * input_bytes / readable.bytes if readable.bytes else unread.bytes
        unread_files = read_share * unread.files
        return (
            LostPart("files", unread_files + len(self._damaged_files), unread_files + files),
            LostPart("bytes of text", unread_bytes + lost_bytes, unread_bytes + input_bytes),
        )

    def exceeding(self, ended: bool) -> LostPart | None:
        """The first part of which too much is lost; None where no part exceeds ``max_broken_share``.

        Args:
            ended: whether the source was read to its end or to its limits. Before that only records are judged, and
                only once there are ``_EARLY_RECORDS``.
        """
        if not ended:
            return _first_exceeding([self.records], self._source) if self.records.total >= _EARLY_RECORDS else None
        return _first_exceeding((self.records, *self._files_and_bytes), self._source)

    def refusal(self, part: LostPart, ended: bool, rejects: Path) -> UserError:
        """The error for a part that exceeds the share.

        Args:
            rejects: file with examples.
        """
        key = f"data.sources.{self._source.name}"
        reasons = (*self.reasons.most_common(), *self._unread_reasons.items())
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons)
        files = f" in {', '.join(self._damaged_files[:3])}" if self._damaged_files else ""
        columns = f"; {_columns_in_words(self.columns)}" if self.columns else ""
        parts = (self.records, *self._files_and_bytes)
        # before the end of a source nobody knows which share would suffice
        remedy = f"{_allow(self._source, parts)} to go on without them" if ended else f"raise {key}.max_broken_share"
        return UserError(
            f"{key}: {part} ({counted}{files}{columns}), more than its max_broken_share of "
            f"{self._source.max_broken_share:g}; repair the records that {rejects} names, or {remedy}"
        )
