"""Which files lie in a folder, and which of them cannot be read.

Choice: links are followed, and every real folder and every real file is read once. A file inside the folder is read
under its own name, any other file under the first link that leads to it. Every entry is accounted for: it is read, or
of another kind, or reached twice, or unread with a reason. Cost: the contents of a closed folder and of a dangling link
are unknown, so each counts as an average one.

``sources`` cuts the files into input splits. ``broken_share`` decides whether too much is unread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.data.ingest.records import NO_PERMISSION, InputFile, InputSplit, estimated_text_bytes, printable

# Reasons. They stand in prepare.json.
CLOSED_FOLDER = "folder that may not be opened"
CLOSED_FILE = "file that may not be opened"
DANGLING_LINK = "link to nothing"
NOT_A_FILE = "device, pipe or socket"
_MAX_EXAMPLES = 5


class Unread(NamedTuple):
    """A file or a folder that cannot be read.

    Attributes:
        name: relative to the source.
        reason: in words.
        size_bytes: of a file on the disk; None where it is unknown.
        folder: whether the entry is a folder, or may be one.
    """

    name: str
    reason: str
    size_bytes: int | None = None
    folder: bool = False


class TextAmount(NamedTuple):
    """Files and bytes of text. Estimates are not whole numbers."""

    files: float = 0.0
    bytes: float = 0.0


@dataclass
class FoundFiles:
    """The contents of a folder.

    Attributes:
        files: to be read, in order.
        readable: estimated text of these files.
        n_folders: folders that hold such files.
        unread: entries that cannot be read.
        others: files of other kinds: suffix -> [number of files, bytes].
        repeated: links to something that is read under another name, or to a folder that contains the link.
    """

    files: list[InputFile] = field(default_factory=list)
    readable: TextAmount = field(default_factory=TextAmount)
    n_folders: int = 0
    unread: list[Unread] = field(default_factory=list)
    others: dict[str, list[int]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    @property
    def lost(self) -> TextAmount:
        """Estimated text of the unread entries.

        An unknown size counts as the average of the files or folders that are read.
        """
        file_bytes = self.readable.bytes / max(self.readable.files, 1)
        files_in_folder = max(self.readable.files / max(self.n_folders, 1), 1.0)
        lost = [self._amount(entry, file_bytes, files_in_folder) for entry in self.unread]
        return TextAmount(sum(amount.files for amount in lost), sum(amount.bytes for amount in lost))

    @staticmethod
    def _amount(entry: Unread, file_bytes: float, files_in_folder: float) -> TextAmount:
        if entry.folder:
            return TextAmount(files_in_folder, files_in_folder * file_bytes)
        if entry.size_bytes is None:
            return TextAmount(1.0, file_bytes)
        return TextAmount(1.0, estimated_text_bytes(entry.name, entry.size_bytes))

    def unread_report(self) -> dict[str, Any]:
        """The unread entries as JSON values: estimated files and bytes, reasons, examples."""
        lost = self.lost
        reasons = Counter(entry.reason for entry in self.unread)
        examples = [{"name": entry.name, "reason": entry.reason} for entry in self.unread[:_MAX_EXAMPLES]]
        return {
            "files": round(lost.files),
            "bytes": round(lost.bytes),
            "reasons": dict(reasons.most_common()),
            "examples": examples,
        }

    def passed_over_report(self) -> dict[str, Any]:
        """Files of other kinds and repeated links as JSON values."""
        most_frequent = sorted(self.others.items(), key=lambda kind: -kind[1][0])
        kinds = {suffix: {"files": n, "bytes": size} for suffix, (n, size) in most_frequent}
        totals = {key: sum(kind[key] for kind in kinds.values()) for key in ("files", "bytes")}
        return {**totals, "kinds": kinds, "links": len(self.repeated)}


class SourceInput(NamedTuple):
    """The input of a source.

    Attributes:
        splits: in reading order.
        found: the contents of its folder; empty where the source has no folder.
    """

    splits: list[InputSplit]
    found: FoundFiles


def not_read_report(inputs: Mapping[str, SourceInput]) -> dict[str, dict[str, Any]]:
    """For each source that is not read whole: its unread entries, and those that are passed over, as JSON values."""
    found = {name: source_input.found for name, source_input in inputs.items()}
    return {
        name: {"unread": files.unread_report(), "passed_over": files.passed_over_report()}
        for name, files in found.items()
        if files.unread or files.others or files.repeated
    }


def not_read_lines(report: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """The report of ``not_read_report`` in words."""
    for name, of_source in report.items():
        unread, passed_over = of_source["unread"], of_source["passed_over"]
        if unread["reasons"]:
            reasons = reasons_in_words(unread["reasons"], unread["examples"])
            files, size = unread["files"], unread["bytes"]
            yield f"{name}: about {files} files with {size} bytes of text cannot be read: {reasons}"
        if passed_over["files"]:
            kinds = ", ".join(f"{kind['files']} {suffix}" for suffix, kind in passed_over["kinds"].items())
            files, size = passed_over["files"], passed_over["bytes"]
            yield f"{name}: passing over {files} files of other kinds with {size} bytes ({kinds})"
        if passed_over["links"]:
            yield f"{name}: passing over {passed_over['links']} links to text that is read under another name"


def reasons_in_words(reasons: Mapping[str, int], examples: Sequence[Mapping[str, str]]) -> str:
    """Such as ``2 link to nothing, such as a.txt``."""
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return counted + (f", such as {examples[0]['name']}" if examples else "")


IsRead = Callable[[str], bool]
"""Whether the file of a path is of a kind that is read."""


def find_files(root: Path, is_read: IsRead, skipped_folders: Collection[str] = ()) -> FoundFiles:
    """Search a folder and everything below it.

    Args:
        root: a folder; a single file is its own only entry.
        is_read: decides which files are read; all other files are counted.
        skipped_folders: names of folders that do not belong to the source.
    """
    if not root.is_dir():
        size = root.stat().st_size
        if not os.access(root, os.R_OK):
            return FoundFiles(unread=[Unread(printable(root.name), CLOSED_FILE, size)])
        readable = TextAmount(1.0, estimated_text_bytes(root.name, size))
        return FoundFiles(files=[InputFile(printable(root.name), str(root))], readable=readable, n_folders=1)
    return _Search(root, is_read, skipped_folders).run()


class _Search:
    """One search. Names are relative to the root and may hold bytes that are not UTF-8 (surrogate escapes)."""

    def __init__(self, root: Path, is_read: IsRead, skipped_folders: Collection[str]) -> None:
        self._root, self._is_read, self._skipped = str(root), is_read, skipped_folders
        self._found, self._sizes = FoundFiles(), list[float]()
        self._files: list[tuple[str, str]] = []  # (name, path)
        self._links: list[tuple[str, str]] = []  # (name, path); followed last: real entries keep their names
        self._seen = set[str]()  # real paths of folders and files

    def run(self) -> FoundFiles:
        """The contents of the folder."""
        self._search_folder("", self._root, os.path.realpath(self._root))
        while self._links:  # a linked folder may hold more links
            links, self._links = sorted(self._links), []
            for name, path in links:
                self._follow(name, path)
        found = self._found
        in_order = sorted(self._files, key=lambda file: file[0].split("/"))
        found.files = [InputFile(printable(name), path) for name, path in in_order]
        found.readable = TextAmount(float(len(self._sizes)), sum(self._sizes))
        found.n_folders = len({name.rpartition("/")[0] for name, _ in self._files})
        found.unread.sort()
        return found

    def _search_folder(self, name: str, path: str, real_path: str) -> None:
        """Search a folder and all real folders below it. Links are kept for later."""
        folders = [(name, path, real_path)]
        while folders:
            name, path, real_path = folders.pop()
            if real_path in self._seen:
                self._found.repeated.append(printable(name))
                continue
            self._seen.add(real_path)
            try:
                with os.scandir(path) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                self._add_unread(name or ".", error, CLOSED_FOLDER, folder=True)
                continue
            for entry in entries:
                entry_name = f"{name}/{entry.name}" if name else entry.name
                entry_real_path = os.path.join(real_path, entry.name)
                if entry.name.startswith("."):  # trash, notebook checkpoints, .git: copies of text that nobody means
                    is_folder = entry.is_dir(follow_symlinks=False)
                    self._count_other("hidden", 0 if is_folder else entry.stat(follow_symlinks=False).st_size)
                elif entry.is_symlink():
                    self._links.append((entry_name, entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    if entry.name not in self._skipped:
                        folders.append((entry_name, entry.path, entry_real_path))
                else:
                    self._add_file(entry_name, entry.path, entry_real_path)

    def _add_file(self, name: str, path: str, real_path: str) -> None:
        is_read = self._is_read(path)
        try:
            status = os.stat(path)
        except OSError as error:
            if is_read:
                self._add_unread(name, error, CLOSED_FILE)
            else:
                self._add_other(name, 0)
            return
        if not is_read:
            self._add_other(name, status.st_size)
        elif not stat.S_ISREG(status.st_mode):
            self._found.unread.append(Unread(printable(name), NOT_A_FILE, 0))
        elif real_path in self._seen:
            self._found.repeated.append(printable(name))
        elif not os.access(path, os.R_OK):
            self._found.unread.append(Unread(printable(name), CLOSED_FILE, status.st_size))
        else:
            self._seen.add(real_path)
            self._files.append((name, path))
            self._sizes.append(estimated_text_bytes(name, status.st_size))

    def _follow(self, name: str, path: str) -> None:
        """Follow a link to a file or a folder."""
        real_path, link_folder = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            may_be_folder = not os.path.splitext(name)[1]
            if self._is_read(path) or may_be_folder:
                self._add_unread(name, error, CLOSED_FILE, folder=may_be_folder)
            else:
                self._add_other(name, 0)
            return
        if not is_folder:
            self._add_file(name, path, real_path)
        elif os.path.commonpath([real_path, link_folder]) == real_path:  # the link lies inside its own target: a circle
            self._found.repeated.append(printable(name))
        elif os.path.basename(name) not in self._skipped:
            self._search_folder(name, path, real_path)

    def _add_unread(self, name: str, error: OSError, closed: str, folder: bool = False) -> None:
        """Add an entry that the system refuses; ``closed`` is the reason where a permission is missing."""
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        other = DANGLING_LINK if missing else error.strerror or str(error)
        reason = closed if error.errno in NO_PERMISSION else other
        self._found.unread.append(Unread(printable(name), reason, folder=folder))

    def _add_other(self, name: str, size: int) -> None:
        base = os.path.basename(name)
        self._count_other(printable(os.path.splitext(base)[1] or base), size)

    def _count_other(self, suffix: str, size: int) -> None:
        kind = self._found.others.setdefault(suffix, [0, 0])
        kind[0] += 1
        kind[1] += size
