"""Input files, their records, and the documents that records become. Broken records are counted here.

Choice: a broken record is counted by its reason and its bytes, then skipped: one bad line must not end a night's job. A
damaged file, or a file without read permission, is counted too. A file that the disk or the network fails to deliver
ends the job, because a later run would never read the rest of that file. Cost: the bytes of lost text are an estimate
where a file is compressed.

The counts go into the manifest of the token shard. ``broken_share`` decides from them whether too much is lost.
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

HUB_SCHEME = "hf://"  # begins the location of a file on the Hugging Face hub
COMPRESSED = (".gz", ".zst")
NO_PERMISSION = (errno.EACCES, errno.EPERM)  # another try does not help: such a file is counted, not an outage

# Reasons of broken records. They stand in manifests and in rejects.jsonl.
UNREADABLE_FILE = "unreadable file"
MISSING_COLUMN = "missing column"
BAD_UTF8 = "bad UTF-8"
NO_TEXT = "no text"
TOO_LARGE = "too large"

_MAX_EXAMPLES = 5  # of each reason, in one input split
_EXAMPLE_LENGTH = 200  # bytes or characters of a record
_COMPRESSION_RATIO = 3  # assumed where nothing of a compressed file was read


class SourceDocument(NamedTuple):
    """One text.

    Attributes:
        id: stable name, the same in every run: ``file``, ``file:record`` or ``file@byte``.
        text: the text.
        utf8: the text in UTF-8.
    """

    id: str
    text: str
    utf8: bytes


class InputFile(NamedTuple):
    """A file of a source.

    Attributes:
        name: as it appears in document ids, relative to the source.
        location: path on this machine, or ``hf://…`` on the hub.
    """

    name: str
    location: str

    @property
    def lower_name(self) -> str:
        """The name for comparisons with suffixes: some systems write suffixes in capitals."""
        return self.name.lower()

    @property
    def on_hub(self) -> bool:
        """Whether the location is on the hub."""
        return self.location.startswith(HUB_SCHEME)


class InputSplit(NamedTuple):
    """A piece of a source's input that one process takes: several small files, or a range of one large file.

    Attributes:
        name: for messages.
        files: the files of the split.
        start, stop: range of one large file, in bytes (.jsonl), row groups (.parquet) or record batches (.arrow);
            ``stop < 0`` means to the end.
        size_bytes: of input, 0 where it is unknown. Progress is measured by it.
    """

    name: str
    files: tuple[InputFile, ...]
    start: int = 0
    stop: int = -1
    size_bytes: int = 0


@dataclass
class ReadCounts:
    """Counts of one pass over some input. Bytes of a record are counted as it lies in the file, uncompressed."""

    documents: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # broken records by reason
    rejects: list[dict[str, str]] = field(default_factory=list)  # examples of each reason
    input_bytes: int = 0  # of all records, broken ones included
    lost_bytes: int = 0  # of broken records, plus the estimate for the unread rest of damaged files
    lost_files: list[str] = field(default_factory=list)  # files that were not read, or not read to their end
    columns: dict[str, Any] = field(default_factory=dict)  # id and columns of the first record without the text column
    limited: bool = False  # a limit of the source ended the reading

    @property
    def broken(self) -> int:
        """Number of broken records."""
        return self.reasons.total()

    def count_broken(self, reason: str, id: str, sample: object = b"", size_bytes: int = 0, records: int = 1) -> None:
        """Count broken records of one reason and the text that is lost with them.

        Args:
            reason: in words.
            id: of the first of these records.
            sample: its beginning is kept as an example, for the first few records of a reason.
            size_bytes: of all these records.
            records: how many.
        """
        if self.reasons[reason] < _MAX_EXAMPLES:
            self.rejects.append({"reason": reason, "origin": id, "beginning": _beginning(sample)})
        self.reasons[reason] += records
        self.input_bytes += size_bytes
        self.lost_bytes += size_bytes

    def count_missing_column(
        self,
        id: str,
        text_columns: Mapping[str, int],
        sample: object,
        size_bytes: int,
        records: int = 1,
    ) -> None:
        """Count records without the text column.

        Args:
            text_columns: the columns of strings that these records do have, with their sizes. Dots lead into nested
                records.
        """
        self.columns = self.columns or {"origin": id, "has": dict(text_columns)}
        self.count_broken(MISSING_COLUMN, id, sample, size_bytes, records)

    def count_unreadable(self, file: InputFile, error: Exception, lost_bytes: int) -> None:
        """Count a damaged file, or a file without read permission.

        Args:
            lost_bytes: estimate of the text that was not read.

        Raises:
            UserError: the disk or the network failed to deliver the file.
        """
        _refuse_outage(file, error)
        self.count_broken(UNREADABLE_FILE, file.name, str(error), lost_bytes)
        self.lost_files.append(file.name)


def _beginning(sample: object) -> str:
    text = sample[:_EXAMPLE_LENGTH] if isinstance(sample, (bytes, str)) else repr(sample)[:_EXAMPLE_LENGTH]
    data = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def document_of_text(
    id: str,
    text: object,
    max_bytes: int,
    counts: ReadCounts,
    size_bytes: int | None = None,
) -> Iterator[SourceDocument]:
    """The document of a text, or nothing and one more broken record.

    Args:
        text: a string, or bytes of UTF-8 as a binary column holds them; anything else is a broken record.
        max_bytes: of the text in UTF-8.
        size_bytes: of the whole record in its file; None where the record is its text alone.
    """
    size = _size(text) if size_bytes is None else size_bytes
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            counts.count_broken(BAD_UTF8, id, text, size)
            return
    if not isinstance(text, str):
        counts.count_broken(NO_TEXT, id, text, 0 if text is None else size)
    elif not text.strip():
        counts.count_broken("empty", id, text)
    elif "\0" in text:  # left by a power cut, or UTF-16 that was taken for UTF-8
        counts.count_broken("NUL characters", id, text, size)
    else:
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:  # JSON can name half of a surrogate pair
            counts.count_broken(BAD_UTF8, id, text, size)
            return
        if len(utf8) > max_bytes:
            counts.count_broken(TOO_LARGE, id, utf8, size)
        else:
            counts.input_bytes += size
            yield SourceDocument(id, text, utf8)


def _size(value: object) -> int:
    """Approximate bytes of a value."""
    return len(value) if isinstance(value, (str, bytes)) else 0 if value is None else len(str(value))


def document_of_record(
    id: str, record: object, column: str, max_bytes: int, counts: ReadCounts, line: bytes | None = None
) -> Iterator[SourceDocument]:
    """The document of a JSON record, or nothing and one more broken record.

    Args:
        column: the text column; dots lead into nested records.
        line: the record as it lies in its file, None where there is no such line.
    """
    try:
        text = _value(record, column)
    except KeyError:
        sample, size_bytes = (record, len(str(record))) if line is None else (line, len(line))
        counts.count_missing_column(id, dict(_text_columns(record)), sample, size_bytes)
    else:
        yield from document_of_text(id, text, max_bytes, counts, None if line is None else len(line))


def _value(record: object, column: str) -> Any:
    """A record's value in a column. A column whose own name holds dots comes before a nested record.

    Raises:
        KeyError: the record has no such column, or the column is a record itself.
    """
    if isinstance(record, dict):
        if column in record and not isinstance(record[column], dict):
            return record[column]
        head, dot, rest = column.partition(".")
        if dot:
            return _value(record.get(head), rest)
    raise KeyError(column)


def _text_columns(record: object, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Names and sizes of a record's strings. Names in nested records are joined by dots."""
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, dict):
            yield from _text_columns(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield prefix + name, len(value)


def nearest_column(column: str, text_columns: Mapping[str, int]) -> str | None:
    """The column that a user probably meant; None where there is no column of text.

    The candidates in order: inside a record of that name, the same last name, a similar name, the column with most
    text.
    """
    inside = [name for name in text_columns if name.startswith(f"{column}.")]
    same = [name for name in text_columns if name.rpartition(".")[2] == column.rpartition(".")[2]]
    similar = difflib.get_close_matches(column, text_columns, n=1)
    largest = sorted(text_columns, key=lambda name: -text_columns[name])
    return next(iter([*inside, *same, *similar, *largest]), None)


def _refuse_outage(file: InputFile, error: Exception) -> None:
    """Tell an outage from a damaged file: errors of the system have a number, errors of decoders have none.

    Raises:
        UserError: the disk or the network failed to deliver the file.
    """
    if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile) or error.errno in NO_PERMISSION:
        return
    # libraries of the network raise OSError without a number
    if error.errno is not None or file.on_hub:
        raise UserError(
            f"{printable(file.location)} cannot be read ({printable(' '.join(str(error).split()))}); make it "
            "readable, and run the same command again to go on"
        ) from error


def printable(name: str) -> str:
    """A file name as text. Bytes that are not UTF-8 become ``\\xe9``."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file system returns
        return name.encode("utf-8", "backslashreplace").decode()


def open_input(location: str) -> IO[bytes]:
    """Open a file of this machine or of the hub; bytes of the hub are fetched as they are read."""
    if location.startswith(HUB_SCHEME):
        from huggingface_hub import HfFileSystem

        return cast(IO[bytes], HfFileSystem().open(location, "rb"))
    return open(location, "rb")


def file_bytes(file: InputFile) -> int:
    """Size of a file on this machine; 0 for a file of the hub."""
    return 0 if file.on_hub else Path(file.location).stat().st_size


def file_bytes_if_known(file: InputFile) -> int:
    """Size of a file that may have vanished by now; 0 then."""
    try:
        return file_bytes(file)
    except OSError:
        return 0


def estimated_text_bytes(name: str, size_bytes: int) -> int:
    """Estimate of the text in a file that was never read."""
    return size_bytes * (_COMPRESSION_RATIO if name.lower().endswith((*COMPRESSED, ".parquet")) else 1)
