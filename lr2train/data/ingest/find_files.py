"""Which files lie in a folder, and which of them cannot be read.

Choice: links are followed, and every real folder and every real file is read once: under its own name where it lies in the folder, else under
the first link to it. Nothing that was found is left without a word: a file is read, of a kind that we do not read, read under another name, or
unread with a reason. Cost: nobody knows how much a closed folder or a link to nothing holds, so each counts as an average one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.data.ingest.records import FORBIDDEN, InputFile, InputSplit, printable, text_bytes

CLOSED_FOLDER, CLOSED_FILE, NOWHERE, NO_FILE = (
    "folder that may not be opened", "file that may not be opened", "link to nothing", "device, pipe or socket",
)  # fmt: skip
_EXAMPLES = 5


class Unread(NamedTuple):
    """A file or a folder that cannot be read.

    Attributes:
        name: as in ids.
        reason: why, in words.
        size_bytes: of a file, on the disk; None where it is not known.
        folder: whether it is one, or may be one.
    """

    name: str
    reason: str
    size_bytes: int | None = None
    folder: bool = False


class Amount(NamedTuple):
    """Files and bytes of text; estimates are no whole numbers of files."""

    files: float = 0.0
    bytes: float = 0.0


@dataclass
class Found:
    """What lies in a folder.

    Attributes:
        files: to read, in order.
        held: how much they are, about.
        unread: what cannot be read.
        others: files of other kinds by the ends of their names, each kind with its number of files and of bytes.
        again: links to what is read under another name, or to a folder that they lie in.
    """

    files: list[InputFile] = field(default_factory=list)
    held: Amount = field(default_factory=Amount)
    folders: int = 0  # that hold files to read
    unread: list[Unread] = field(default_factory=list)
    others: dict[str, list[int]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)

    @property
    def lost(self) -> Amount:
        """How much is unread, about: what is not known counts as an average file or folder of those that are read."""
        a_file = self.held.bytes / max(self.held.files, 1)
        in_a_folder = max(self.held.files / max(self.folders, 1), 1.0)
        lost = [self._amount(one, a_file, in_a_folder) for one in self.unread]
        return Amount(sum(one.files for one in lost), sum(one.bytes for one in lost))

    @staticmethod
    def _amount(one: Unread, a_file: float, in_a_folder: float) -> Amount:
        if one.folder:
            return Amount(in_a_folder, in_a_folder * a_file)
        return Amount(1.0, a_file if one.size_bytes is None else text_bytes(one.name, one.size_bytes))

    def about_unread(self) -> dict[str, Any]:
        """What is unread as JSON values: about how many files and bytes, reasons, examples."""
        lost = self.lost
        reasons = Counter(one.reason for one in self.unread)
        examples = [{"name": one.name, "reason": one.reason} for one in self.unread[:_EXAMPLES]]
        return {"files": round(lost.files), "bytes": round(lost.bytes), "reasons": dict(reasons.most_common()), "examples": examples}

    def about_others(self) -> dict[str, Any]:
        """What is passed over as JSON values: files of other kinds and their bytes, and links to what is read under another name."""
        kinds = {kind: {"files": n, "bytes": size} for kind, (n, size) in sorted(self.others.items(), key=lambda one: -one[1][0])}
        counts = {key: sum(kind[key] for kind in kinds.values()) for key in ("files", "bytes")}
        return {**counts, "kinds": kinds, "links": len(self.again)}


class Listing(NamedTuple):
    """What a source has.

    Attributes:
        shards: its input, in order.
        found: what was found beside it, where it lies in a folder.
    """

    shards: list[InputSplit]
    found: Found


def reasons_in_words(reasons: Mapping[str, int], examples: Sequence[Mapping[str, str]]) -> str:
    """As in ``2 link to nothing, such as a.txt``."""
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return counted + (f", such as {examples[0]['name']}" if examples else "")


Reads = Callable[[str], bool]
"""Whether a file of this path is of a kind that is read."""


def find(root: Path, reads: Reads, skipped: Collection[str] = ()) -> Found:
    """Look through a folder and all below it, or at one file.

    Args:
        root: folder or file.
        reads: which files to read; the others are counted.
        skipped: names of folders that are none of ours.
    """
    if not root.is_dir():
        size = root.stat().st_size
        if not os.access(root, os.R_OK):
            return Found(unread=[Unread(printable(root.name), CLOSED_FILE, size)])
        return Found(files=[InputFile(printable(root.name), str(root))], held=Amount(1.0, text_bytes(root.name, size)), folders=1)
    return _Search(root, reads, skipped).run()


class _Search:
    def __init__(self, root: Path, reads: Reads, skipped: Collection[str]) -> None:
        self._root, self._reads, self._skipped = str(root), reads, skipped
        self._found, self._sizes = Found(), list[float]()
        self._files: list[tuple[str, str]] = []  # names and places
        self._links: list[tuple[str, str]] = []  # looked at when what lies there itself is known
        self._seen = set[str]()  # real paths of folders and files

    def run(self) -> Found:
        self._folder("", self._root, os.path.realpath(self._root))
        while self._links:  # a linked folder may hold more
            links, self._links = sorted(self._links), []
            for name, place in links:
                self._link(name, place)
        found = self._found
        found.files = [InputFile(printable(name), place) for name, place in sorted(self._files, key=lambda file: file[0].split("/"))]
        found.held = Amount(float(len(self._sizes)), sum(self._sizes))
        found.folders = len({name.rpartition("/")[0] for name, _ in self._files})
        found.unread.sort()
        return found

    def _folder(self, name: str, place: str, real: str) -> None:
        """A folder and all that lies below it itself; its links are kept for later."""
        below = [(name, place, real)]
        while below:
            name, place, real = below.pop()
            if real in self._seen:
                self._found.again.append(printable(name))
                continue
            self._seen.add(real)
            try:
                with os.scandir(place) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                self._unread(name or ".", error, CLOSED_FOLDER, folder=True)
                continue
            for entry in entries:
                its, real_place = f"{name}/{entry.name}" if name else entry.name, os.path.join(real, entry.name)
                if entry.name.startswith("."):  # trash, checkpoints of notebooks, .git: copies of texts, which nobody means
                    self._count("hidden", 0 if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size)
                elif entry.is_symlink():
                    self._links.append((its, entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    if entry.name not in self._skipped:
                        below.append((its, entry.path, real_place))
                else:
                    self._file(its, entry.path, real_place)

    def _file(self, name: str, place: str, real: str) -> None:
        reads = self._reads(place)
        try:
            about = os.stat(place)
        except OSError as error:
            if reads:
                self._unread(name, error, CLOSED_FILE)
            else:
                self._other(name, 0)
            return
        if not reads:
            self._other(name, about.st_size)
        elif not stat.S_ISREG(about.st_mode):
            self._found.unread.append(Unread(printable(name), NO_FILE, 0))
        elif real in self._seen:
            self._found.again.append(printable(name))
        elif not os.access(place, os.R_OK):
            self._found.unread.append(Unread(printable(name), CLOSED_FILE, about.st_size))
        else:
            self._seen.add(real)
            self._files.append((name, place))
            self._sizes.append(text_bytes(name, about.st_size))

    def _link(self, name: str, place: str) -> None:
        real, own = os.path.realpath(place), os.path.realpath(os.path.dirname(place))
        try:
            is_folder = stat.S_ISDIR(os.stat(place).st_mode)
        except OSError as error:
            may_be_folder = not os.path.splitext(name)[1]
            if self._reads(place) or may_be_folder:
                self._unread(name, error, CLOSED_FILE, folder=may_be_folder)
            else:
                self._other(name, 0)
            return
        if not is_folder:
            self._file(name, place, real)
        elif os.path.commonpath([real, own]) == real:  # a folder that the link lies in
            self._found.again.append(printable(name))
        elif os.path.basename(name) not in self._skipped:
            self._folder(name, place, real)

    def _unread(self, name: str, error: OSError, closed: str, folder: bool = False) -> None:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        reason = closed if error.errno in FORBIDDEN else NOWHERE if missing else error.strerror or str(error)
        self._found.unread.append(Unread(printable(name), reason, folder=folder))

    def _other(self, name: str, size: int) -> None:
        base = os.path.basename(name)
        self._count(printable(os.path.splitext(base)[1] or base), size)

    def _count(self, kind_of: str, size: int) -> None:
        kind = self._found.others.setdefault(kind_of, [0, 0])
        kind[0] += 1
        kind[1] += size
