"""What is lost of a source on the way from its files to documents, and when that is too much.

Choice: a source stops the job where more than its ``max_broken_share`` of records, of files or of bytes of text is lost, because a part of a
corpus that is missing shows nowhere else. What cannot be opened is refused before any work, the rest when the source is read. Cost: bytes of
what nobody could read are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.find_files import Found, Listing, reasons_in_words
from lr2train.data.ingest.records import MISSING_COLUMN, nearest_column

_EARLY_RECORDS = 1000  # after which a source with too many broken ones is stopped before its end


class Part(NamedTuple):
    """How much of something is lost: records, files or bytes."""

    what: str
    lost: float
    whole: float

    @property
    def share(self) -> float:
        """0 where there is nothing to lose."""
        return self.lost / self.whole if self.whole else 0.0

    def __str__(self) -> str:
        about = "" if self.what == "records" else "about "
        return f"{about}{self.lost:.0f} of {self.whole:.0f} {self.what} are lost"


def refuse_unread(source: SourceConfig, found: Found) -> None:
    """Stop before hours of work on a part of a corpus.

    Raises:
        UserError: more than the source's ``max_broken_share`` cannot be opened.
    """
    lost, held, about = found.lost, found.held, found.about_unread()
    parts = (Part("files", lost.files, lost.files + held.files), Part("bytes of text", lost.bytes, lost.bytes + held.bytes))
    beyond = _beyond(parts, source)
    if beyond is not None:
        raise UserError(
            f"data.sources.{source.name}.path={source.path}: {beyond} ({reasons_in_words(about['reasons'], about['examples'])}), more than its "
            f"max_broken_share of {source.max_broken_share:g}; make them readable, or {_allowing(source, parts)} to go on without them"
        )


def _beyond(parts: Iterable[Part], source: SourceConfig) -> Part | None:
    return next((part for part in parts if part.lost > source.max_broken_share * part.whole), None)


def _allowing(source: SourceConfig, parts: Iterable[Part]) -> str:
    """What to do that so much may be lost."""
    return f"set data.sources.{source.name}.max_broken_share={math.ceil(max(part.share for part in parts) * 1000) / 1000:g}"


def nothing(source: SourceConfig, reasons: Mapping[str, int], columns: Mapping[str, Any]) -> UserError:
    """What to say of a source without documents.

    Args:
        reasons: why its records are broken, with their counts.
        columns: of the first record without the text's column, see ``ReadCounts``.
    """
    key = f"data.sources.{source.name}"
    what = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) + (f"; {_has_instead(columns)}" if columns else "")
    broken = f": all its records are broken ({what})" if reasons else ""
    meant = nearest_column(source.text_column, columns.get("has", {}))
    if meant:
        remedy = f"set {key}.text_column (now {source.text_column}) to {meant}"
    elif {MISSING_COLUMN, "no text"} & set(reasons):
        remedy = f"set {key}.text_column (now {source.text_column}) to the column that holds the text"
    else:
        remedy = "point path at text, or raise its limits"
    return UserError(f"{key} ({source.kind}, path={source.path}) has no document{broken}; {remedy}")


def _has_instead(columns: Mapping[str, Any]) -> str:
    """Which columns of text there are in the place of the one that is missing."""
    return f"{columns['origin']} has {', '.join(columns['has']) or 'no column of text'}"


class BrokenShare:
    """What is not read of a source: broken records, files that broke off, and what could not be opened at all.

    Of what could not be opened the same part counts as was read of what could, because a source may have limits.

    Args:
        source: its config.
        made: manifests of the shards that count.
        listed: what the source has.
    """

    def __init__(self, source: SourceConfig, made: Sequence[dict[str, Any]], listed: Listing) -> None:
        self._source, self._closed = source, listed.found.about_unread()
        self.reasons = sum((Counter(one["reasons"]) for one in made), Counter[str]())
        self.columns: dict[str, Any] = next((one["columns"] for one in made if one["columns"]), {})
        self._files = sorted({name for one in made for name in one["lost_files"]})
        broken = self.reasons.total()
        self.records = Part("records", broken, broken + sum(one["read_documents"] for one in made))
        sizes = [max(shard.size_bytes, 1) for shard in listed.shards]
        part, closed, held = sum(sizes[: len(made)]) / max(sum(sizes), 1), listed.found.lost, listed.found.held
        files = len({file.name for shard in listed.shards[: len(made)] for file in shard.files})
        read, lost = (sum(one[key] for one in made) for key in ("input_bytes", "lost_bytes"))
        beside = closed.bytes * read / held.bytes if held.bytes else closed.bytes
        self._rest = (
            Part("files", part * closed.files + len(self._files), part * closed.files + files),
            Part("bytes of text", beside + lost, beside + read),
        )

    def beyond(self, ended: bool) -> Part | None:
        """The first part of which too much is lost; None where none is.

        Args:
            ended: whether the source was read to its end, or to its limits; until then only records are judged, once there are some.
        """
        parts = (self.records, *self._rest) if ended else (self.records,)
        return _beyond(parts, self._source) if ended or self.records.whole >= _EARLY_RECORDS else None

    def refusal(self, part: Part, ended: bool, rejects: Path) -> UserError:
        """What to say of it.

        Args:
            rejects: a file with examples.
        """
        key = f"data.sources.{self._source.name}"
        what = ", ".join(f"{count} {reason}" for reason, count in (*self.reasons.most_common(), *self._closed["reasons"].items()))
        files = f" in {', '.join(self._files[:3])}" if self._files else ""
        columns = f"; {_has_instead(self.columns)}" if self.columns else ""
        allow = (
            f"{_allowing(self._source, (self.records, *self._rest))} to go on without them" if ended else f"raise {key}.max_broken_share"
        )
        return UserError(
            f"{key}: {part} ({what}{files}{columns}), more than its max_broken_share of {self._source.max_broken_share:g}; see {rejects}, mend them, "
            f"or {allow}"
        )
