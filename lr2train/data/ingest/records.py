"""Records on their way from files to documents: what is read, and what is lost on the way.

Choice: a broken record is counted by reason and by bytes, sampled and skipped: one bad line must not cost a night. A file that the disk or the
network fails to give ends the job, because nobody would read its rest again; a damaged one, or one that stays closed to us, is counted. Cost:
sizes of lost text are estimates where a file is compressed.
"""

from __future__ import annotations

import difflib
import errno
import gzip
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from lr2train.config import UserError

HUB = "hf://"  # begins the place of a file that is read from the hub as it goes
BROKEN_OFF = "unreadable file"  # the reason of a reject
MISSING_COLUMN = "missing column"  # the reason of a reject
KEPT_REJECTS = 5  # examples of a reason that a shard keeps
FORBIDDEN = (errno.EACCES, errno.EPERM)  # of a file that stays closed however often it is tried
COMPRESSED = (".gz", ".zst")
_EXPANDS = 3  # times that text is larger than its compressed file, about, where nothing of the file is known


class SourceDocument(NamedTuple):
    """One text with a name that is the same in every run."""

    id: str
    text: str
    data: bytes  # the text in UTF-8


class InputFile(NamedTuple):
    """A file of a source: its name in ids, and where it lies."""

    name: str
    place: str

    @property
    def kind(self) -> str:
        """The name whose end tells the format; some systems write it in capitals."""
        return self.name.lower()


class InputSplit(NamedTuple):
    """A part of a source's input.

    Attributes:
        name: what it is called in messages.
        files: of it; several small ones are whole.
        start, stop: of one large file: bytes (.jsonl), row groups (.parquet), record batches (.arrow); stop < 0 is to the end.
        size_bytes: of input, as far as it is known: what progress is measured by.
    """

    name: str
    files: tuple[InputFile, ...]
    start: int = 0
    stop: int = -1
    size_bytes: int = 0


@dataclass
class ReadCounts:
    """What a reader met on its way. Bytes are those of records as they lie in the file, uncompressed."""

    documents: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # broken records by reason
    rejects: list[dict[str, str]] = field(default_factory=list)  # examples of each
    input_bytes: int = 0  # of all records, read or broken
    lost_bytes: int = 0  # of broken records, and about those that files lack which broke off
    lost_files: list[str] = field(default_factory=list)  # that could not be opened, or not be read to their end
    columns: dict[str, Any] = field(default_factory=dict)  # of the first record that lacks the column: its origin, and what it has instead
    limited: bool = False  # a limit of the source ended the reading

    @property
    def broken(self) -> int:
        """Records without text, of another encoding, not parseable or too large."""
        return self.reasons.total()

    def reject(self, reason: str, origin: str, sample: object = b"", size_bytes: int = 0, records: int = 1) -> None:
        """Count broken records with the text that is lost in them; the first few of a reason are kept with their beginning."""
        if self.reasons[reason] < KEPT_REJECTS:
            self.rejects.append({"reason": reason, "origin": origin, "beginning": _shown(sample)})
        self.reasons[reason] += records
        self.input_bytes += size_bytes
        self.lost_bytes += size_bytes

    def lacks_column(self, column: str, origin: str, has: Mapping[str, int], sample: object, size_bytes: int, records: int = 1) -> None:
        """Count records without the column.

        Args:
            has: the columns of text that they have, with about their sizes; records in records by names with dots.
        """
        self.columns = self.columns or {"origin": origin, "has": dict(has)}
        self.reject(MISSING_COLUMN, origin, sample, size_bytes, records)

    def break_off(self, file: InputFile, error: Exception, lost_bytes: int) -> None:
        """Count a file that cannot be read (on), with about the text that it still held.

        Raises:
            UserError: it is neither damaged nor closed to us, but cannot be read now.
        """
        _refuse_outage(file, error)
        self.reject(BROKEN_OFF, file.name, str(error), lost_bytes)
        self.lost_files.append(file.name)


def _shown(sample: object, size: int = 200) -> str:
    text = sample[:size] if isinstance(sample, (bytes, str)) else repr(sample)[:size]
    data = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def checked(id: str, text: object, max_bytes: int, tally: ReadCounts, size_bytes: int | None = None) -> Iterator[SourceDocument]:
    """The document, or one more broken record. Bytes, as a binary column has them, are read as UTF-8.

    Args:
        size_bytes: of the whole record in its file; None where it is nothing but its text.
    """
    size = _size(text) if size_bytes is None else size_bytes
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            tally.reject("bad UTF-8", id, text, size)
            return
    if not isinstance(text, str):
        tally.reject("no text", id, text, 0 if text is None else size)
    elif not text.strip():
        tally.reject("empty", id, text)
    elif "\0" in text:  # of a power cut, or text in UTF-16 that was taken for UTF-8
        tally.reject("NUL characters", id, text, size)
    else:
        try:
            data = text.encode()
        except UnicodeEncodeError:  # JSON can name half a surrogate pair
            tally.reject("bad UTF-8", id, text, size)
            return
        if len(data) > max_bytes:
            tally.reject("too large", id, data, size)
        else:
            tally.input_bytes += size
            yield SourceDocument(id, text, data)


def _size(value: object) -> int:
    """Bytes of a value, about."""
    return len(value) if isinstance(value, (str, bytes)) else 0 if value is None else len(str(value))


def of_record(
    id: str, record: object, column: str, max_bytes: int, tally: ReadCounts, line: bytes | None = None
) -> Iterator[SourceDocument]:
    """The document of a record, or one more broken record.

    Args:
        line: the record as it lies in its file.
    """
    size = None if line is None else len(line)
    try:
        text = _value(record, column)
    except KeyError:
        sample = record if line is None else line
        tally.lacks_column(column, id, dict(_texts(record)), sample, size if size is not None else len(str(record)))
    else:
        yield from checked(id, text, max_bytes, tally, size)


def _value(record: object, column: str) -> Any:
    """A record's column that is no record itself; dots lead into records.

    Raises:
        KeyError: there is none.
    """
    if isinstance(record, dict):
        if column in record and not isinstance(record[column], dict):
            return record[column]
        head, dot, rest = column.partition(".")
        if dot:
            return _value(record.get(head), rest)
    raise KeyError(column)


def _texts(record: object, before: str = "") -> Iterator[tuple[str, int]]:
    """A record's strings by name, with their sizes; those in records by names with dots."""
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, dict):
            yield from _texts(value, f"{before}{name}.")
        elif isinstance(value, str):
            yield before + name, len(value)


def nearest_column(column: str, has: Mapping[str, int]) -> str | None:
    """The column that was probably meant: in the record of that name, of the same last name, of a like name, else the one with most text."""
    inside = [name for name in has if name.startswith(f"{column}.")]
    same = [name for name in has if name.rpartition(".")[2] == column.rpartition(".")[2]]
    like = difflib.get_close_matches(column, has, n=1)
    largest = sorted(has, key=lambda name: -has[name])
    return next(iter([*inside, *same, *like, *largest]), None)


def _refuse_outage(file: InputFile, error: Exception) -> None:
    """Tell a damaged file, which is skipped, from one that cannot be read now: the system's errors have a number, those of decoders have none.

    Raises:
        UserError: it cannot be read now.
    """
    if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile) or error.errno in FORBIDDEN:
        return
    if error.errno is not None or file.place.startswith(HUB):  # libraries of the network number nothing
        raise UserError(
            f"{printable(file.place)} cannot be read ({printable(' '.join(str(error).split()))}); make it readable or remove it, and run the same "
            "command again to go on"
        ) from error


def printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 as ``\\xe9``."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which no file system gives
        return name.encode("utf-8", "backslashreplace").decode()


def opened(place: str) -> IO[bytes]:
    """A file's bytes, from the disk or from the hub as they are read."""
    if place.startswith(HUB):
        from huggingface_hub import HfFileSystem

        return cast(IO[bytes], HfFileSystem().open(place, "rb"))
    return open(place, "rb")


def size_of(file: InputFile) -> int:
    """Bytes of a local file; 0 where it is not one."""
    return 0 if file.place.startswith(HUB) else Path(file.place).stat().st_size


def size_if_known(file: InputFile) -> int:
    """Bytes of a file that may be gone by now."""
    try:
        return size_of(file)
    except OSError:
        return 0


def text_bytes(name: str, size_bytes: int) -> int:
    """About how much text a file holds that was never read."""
    return size_bytes * (_EXPANDS if name.lower().endswith((*COMPRESSED, ".parquet")) else 1)
