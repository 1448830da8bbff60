"""Sources of documents: a source lists its input as splits, and reads a split as documents.

To add a kind of source, write its two functions (``source_kinds`` has examples) and enter them in ``KINDS``.

Choice: the list of input splits alone decides who reads which part, so many processes read one source and a later run
finds the same splits. A source without a document is an error. Cost: input that cannot be listed (a user's own class, a
data set in another format) is one split, read by one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lr2train.config import SourceConfig, UserError
from lr2train.data.batch import WINDOWS
from lr2train.data.ingest import broken_share, hub, source_kinds
from lr2train.data.ingest.find_files import SourceInput
from lr2train.data.ingest.records import InputSplit, ReadCounts, SourceDocument, file_bytes
from lr2train.io import fingerprint

CUSTOM, FOLDER, HUB, NEEDLES, STDLIB = "custom", "folder", "hub", "needles", "stdlib"
SPLIT_BYTES = 64 << 20


class SourceKind(NamedTuple):
    """A kind of source.

    Attributes:
        list_input: (config, split_bytes) -> the source's input.
        read: (config, split, counts) -> the documents of a split.
    """

    list_input: Callable[[SourceConfig, int], SourceInput]
    read: Callable[[SourceConfig, InputSplit, ReadCounts], Iterator[SourceDocument]]


# `needles` is not among them: its documents are made from the text of these (needle_source).
KINDS: dict[str, SourceKind] = {
    STDLIB: SourceKind(source_kinds.list_stdlib, source_kinds.read_stdlib),
    FOLDER: SourceKind(source_kinds.list_folder, source_kinds.read_folder),
    HUB: SourceKind(hub.list_hub, hub.read_hub),
    CUSTOM: SourceKind(source_kinds.list_custom, source_kinds.read_custom),
}


@dataclass(frozen=True)
class SourceLimits:
    """How much may still be read; None is everything."""

    documents: int | None = None
    text_bytes: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, source: SourceConfig) -> SourceLimits:
        """The limits of a source's config."""
        return cls(source.max_documents, source.max_bytes, source.max_tokens)

    def admit(self, documents: Iterable[SourceDocument], counts: ReadCounts) -> Iterator[SourceDocument]:
        """Documents within the limits on documents and bytes, counted.

        They end before the first that exceeds a limit.
        """
        for document in documents:
            size = len(document.utf8)
            too_long = self.text_bytes is not None and counts.text_bytes + size > self.text_bytes
            if counts.documents == self.documents or too_long:
                counts.limited = True
                return
            counts.documents += 1
            counts.text_bytes += size
            yield document


def list_input(source: SourceConfig, split_bytes: int) -> SourceInput:
    """The input of a source, in splits of at most about ``split_bytes`` where the format can be cut.

    Raises:
        UserError: unknown kind or option, a path that does not exist, or more than ``max_broken_share`` cannot be
            opened.
    """
    source_input = kind_of(source).list_input(source, split_bytes)
    broken_share.refuse_unread(source, source_input.found)
    return source_input


def read_source(
    source: SourceConfig,
    counts: ReadCounts,
    splits: Iterable[InputSplit] | None = None,
) -> Iterator[SourceDocument]:
    """Documents of a source in their fixed order, up to its ``max_documents`` and ``max_bytes``.

    Args:
        counts: of what was read, updated on the way.
        splits: of its input; None lists them.

    Raises:
        UserError: unknown kind or option, a path that does not exist, or no document.
    """
    splits = list_input(source, SPLIT_BYTES).splits if splits is None else splits
    documents = (document for split in splits for document in read_split(source, split, counts))
    yield from SourceLimits.of(source).admit(documents, counts)
    if not counts.documents:
        raise broken_share.no_document(source, counts.reasons, counts.columns)


def read_split(source: SourceConfig, split: InputSplit, counts: ReadCounts) -> Iterator[SourceDocument]:
    """All documents of a split in their fixed order, whatever the source's limits.

    Broken records go into ``counts``.
    """
    return kind_of(source).read(source, split, counts)


def kind_of(source: SourceConfig) -> SourceKind:
    """The kind of a source of text.

    Raises:
        UserError: unknown kind.
    """
    if source.kind not in KINDS:
        key, kinds = f"data.sources.{source.name}", ", ".join((*sorted(KINDS), NEEDLES))
        raise UserError(f"{key}: kind={source.kind} is not one of {kinds}; set kind to one of them")
    return KINDS[source.kind]


def check_source(source: SourceConfig) -> None:
    """Refuse a source of text that cannot be read, before anything is read.

    Raises:
        UserError: unknown kind or window, a limit below 1, or a ``target`` that cannot be imported.
    """
    kind_of(source)
    check_windows(source)
    source_key, share = f"data.sources.{source.name}", source.max_broken_share
    for key in ("max_documents", "max_bytes", "max_tokens", "max_document_bytes"):
        limit = getattr(source, key)
        if limit is not None and limit < 1:
            raise UserError(f"{source_key}.{key}={limit} is below 1; set it to 1 or more, or to null to read all")
    if not 0.0 <= share <= 1.0:
        raise UserError(f"{source_key}.max_broken_share={share} is not between 0 and 1; set it inside these limits")
    if source.kind == CUSTOM:
        source_kinds.import_target(source)
    elif source.target is not None:
        target = f"{source_key}.target={source.target}"
        raise UserError(f"{target} needs kind={CUSTOM}, not {source.kind}; set {source_key}.kind={CUSTOM}")


def check_windows(source: SourceConfig) -> None:
    """Refuse windows that do not exist.

    Raises:
        UserError: no window, or an unknown window.
    """
    if not source.windows or not set(source.windows) <= set(WINDOWS):
        key, windows = f"data.sources.{source.name}.windows", ", ".join(WINDOWS)
        raise UserError(f"{key}={list(source.windows)} is not one or both of {windows}; set windows to them")


def identity(source: SourceConfig, splits: Sequence[InputSplit]) -> str:
    """Fingerprint of a source's files without reading them: names and sizes, commits of the hub, the Python version.

    Times and locations do not count (``stamps`` has them). Empty for a custom class, whose input is unknown.
    """
    files = dict.fromkeys(file for split in splits for file in split.files)
    values = [[file.location] if file.on_hub else [file.name, file_bytes(file)] for file in files]
    return fingerprint([sys.version if source.kind == STDLIB else "", values]) if files else ""


def stamps(splits: Iterable[InputSplit]) -> list[str]:
    """For each split, the fingerprint of its local files' locations, sizes and times.

    An equal stamp means: not touched since.
    """
    real_folders: dict[str, str] = {}  # one look-up for the many files of a folder

    def stamp(location: str) -> list[Any]:
        folder, name = os.path.split(location)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        status = os.stat(location)
        return [real_folders[folder], name, status.st_size, status.st_mtime_ns]

    return [fingerprint([stamp(file.location) for file in split.files if not file.on_hub]) for split in splits]


def extent(split: InputSplit) -> list[Any]:
    """The part of its source that a split covers, as JSON values; the location of local files does not count."""
    files = [file.location if file.on_hub else file.name for file in split.files]
    return [files, split.start, split.stop]


def with_absolute_path(source: SourceConfig) -> SourceConfig:
    """A source whose path means the same in every working directory."""
    local = source.path is not None and is_local(source)
    return replace(source, path=os.path.abspath(source.path or "")) if local else source


def is_local(source: SourceConfig) -> bool:
    """Whether the path of a source leads to files of this machine."""
    return source.kind == FOLDER or (source.kind == HUB and source.path is not None and os.path.lexists(source.path))
