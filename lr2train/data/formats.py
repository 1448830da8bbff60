"""File formats: a list of files becomes shards, a shard becomes documents.

Choice: a shard is the same part of the input in every run, whatever the number of workers: a range of bytes of a .jsonl file, row groups of
a .parquet file, record batches of an .arrow file, some small .txt files together. A broken record is counted by reason and by bytes, sampled
and skipped: one bad line must not cost a night. A file of other records counts with all its rows, a file that breaks off with about the text
that it has lost. A file that the disk or the network fails to give ends the job, because nobody would read its rest again. Ids are stable
names (``file``, ``file:record``, ``file@byte`` for a line of a .jsonl file), because the holdout is drawn by their hash. Cost: a compressed
file is one shard, however large; sizes of lost text are estimates where a file is compressed.
"""

from __future__ import annotations

import difflib
import errno
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from lr2train.config import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (".txt", *LINES, ".parquet", ".arrow")
HUB = "hf://"  # begins the place of a file that is read from the hub as it goes
BROKEN_OFF = "unreadable file"  # the reason of a reject
KEPT_REJECTS = 5  # examples of a reason that a shard keeps
MISSING_COLUMN = "missing column"  # the reason of a reject
FORBIDDEN = (errno.EACCES, errno.EPERM)  # of a file that stays closed however often it is tried
_MOST_ROWS, _ROWS_BYTES = 256, 32 << 20  # of a parquet file in memory at a time
_ESCAPED = 3  # bytes of JSON that a byte of text takes where other alphabets are escaped; only control characters take more
_REST_OF_LINE = 1 << 16  # of a record beside its text, at most about that
_PIECE = 1 << 20  # of a line that is read at a time: a long one is given up before it fills the memory
_EXPANDS = 3  # times that text is larger than its compressed file, about, where nothing of the file is known
_COMPRESSED = (".gz", ".zst")


class Document(NamedTuple):
    """One text with a name that is the same in every run."""

    id: str
    text: str
    data: bytes  # the text in UTF-8


class File(NamedTuple):
    """A file of a source: its name in ids, and where it lies."""

    name: str
    place: str


class Shard(NamedTuple):
    """A part of a source's input.

    Attributes:
        name: what it is called in messages.
        files: of it; several small ones are whole.
        start, stop: of one large file: bytes (.jsonl), row groups (.parquet), record batches (.arrow); stop < 0 is to the end.
        size_bytes: of input, as far as it is known: what progress is measured by.
    """

    name: str
    files: tuple[File, ...]
    start: int = 0
    stop: int = -1
    size_bytes: int = 0


@dataclass
class Tally:
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

    def break_off(self, file: File, error: Exception, lost_bytes: int) -> None:
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


def checked(id: str, text: object, max_bytes: int, tally: Tally, size_bytes: int | None = None) -> Iterator[Document]:
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
            yield Document(id, text, data)


def _size(value: object) -> int:
    """Bytes of a value, about."""
    return len(value) if isinstance(value, (str, bytes)) else 0 if value is None else len(str(value))


def read_text(file: File, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """A file that is one document."""
    try:
        with opened(file.place) as lines:
            data = lines.read(max_bytes + 1)
        if len(data) > max_bytes:
            tally.reject("too large", file.name, data, max(size_of(file), len(data)))
        else:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            yield from checked(file.name, text, max_bytes, tally, len(data))
    except UnicodeDecodeError:
        tally.reject("bad UTF-8", file.name, data, len(data))
    except OSError as error:
        tally.break_off(file, error, _size_if_known(file))


def _refuse_outage(file: File, error: Exception) -> None:
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


def shards_of(files: Sequence[File], shard_bytes: int) -> list[Shard]:
    """Files in order as shards of at most about ``shard_bytes``: small ones together, large ones cut."""
    made: list[Shard] = []
    together: list[File] = []
    size = 0
    for file in files:
        its = size_of(file)
        alone = file.place.startswith(HUB) or its > shard_bytes
        if together and (alone or size + its > shard_bytes):
            made.append(Shard(_range_name(together), tuple(together), size_bytes=size))
            together, size = [], 0
        if alone:
            made.extend(_cut(file, shard_bytes))
        else:
            together.append(file)
            size += its
    return made + ([Shard(_range_name(together), tuple(together), size_bytes=size)] if together else [])


def _range_name(files: Sequence[File]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} … {files[-1].name}"


def size_of(file: File) -> int:
    """Bytes of a local file; 0 where it is not one."""
    return 0 if file.place.startswith(HUB) else Path(file.place).stat().st_size


def _size_if_known(file: File) -> int:
    """Bytes of a file that may be gone by now."""
    try:
        return size_of(file)
    except OSError:
        return 0


def text_bytes(name: str, size_bytes: int) -> int:
    """About how much text a file holds that was never read."""
    return size_bytes * (_EXPANDS if name.endswith((*_COMPRESSED, ".parquet")) else 1)


def _cut(file: File, shard_bytes: int) -> Iterator[Shard]:
    """A large file as several shards where its format can be entered in the middle."""
    size = size_of(file)
    if file.name.endswith(".parquet") and size:
        borders = _parquet_borders(file, shard_bytes)
    elif file.name.endswith(".arrow") and size:
        borders = _arrow_borders(file, size, shard_bytes)
    elif file.name.endswith(".jsonl") and not file.place.startswith(HUB):
        borders = [*range(0, size, shard_bytes), size]
    else:
        borders = [0, -1]
    for start, stop in pairwise(borders):
        name = file.name if len(borders) == 2 else f"{file.name}[{start}:{stop}]"
        yield Shard(name, (file,), start, stop, size // (len(borders) - 1))


def _parquet_borders(file: File, shard_bytes: int) -> list[int]:
    """Row groups together until they are large enough; the whole file where it cannot be read, and is reported by its reader."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        about = ParquetFile(file.place).metadata
        sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in _groups(about)]
    except (ArrowException, OSError):
        return [0, -1]
    return _grouped(sizes, shard_bytes)


def _groups(about: Any) -> list[Any]:
    return [about.row_group(number) for number in range(about.num_row_groups)]


def _arrow_borders(file: File, size: int, shard_bytes: int) -> list[int]:
    from pyarrow import ArrowException

    try:
        n = sum(1 for _ in _arrow_batches(file.place))
    except (ArrowException, OSError):
        return [0, -1]
    return _grouped([size // max(n, 1)] * n, shard_bytes)


def _grouped(sizes: Sequence[int], most: int) -> list[int]:
    borders, size = [0], 0
    for number, one in enumerate(sizes):
        if size and size + one > most:
            borders.append(number)
            size = 0
        size += one
    return [*borders, len(sizes)]


def read_files(shard: Shard, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """Documents of a shard of files: one a .txt file, one a record of the others.

    Args:
        column: that holds the text; dots lead into records (``meta.text``), unless a column has that very name.
    """
    for file in shard.files:
        if file.name.endswith(".txt"):
            yield from read_text(file, max_bytes, tally)
        elif file.name.endswith((".parquet", ".arrow")):
            yield from _read_table(file, shard, column, max_bytes, tally)
        else:
            yield from _read_lines(file, shard, column, max_bytes, tally)


class _NoColumn(Exception):
    """Rows without the column.

    Args:
        rows: how many.
        has: the columns of text that they have, with their sizes in bytes.
    """

    def __init__(self, rows: int, has: dict[str, int]) -> None:
        super().__init__()
        self.rows, self.has = rows, has


def _read_table(file: File, shard: Shard, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """Rows of a .parquet or .arrow file. One that cannot be read counts once, one that lacks the column with all its rows."""
    from pyarrow import ArrowException

    rows = _parquet_rows if file.name.endswith(".parquet") else _arrow_rows
    try:
        with ExitStack() as stack:
            for number, text in rows(file.place, shard.start, shard.stop, column, stack):
                yield from checked(f"{file.name}:{number}", text, max_bytes, tally)
    except _NoColumn as found:
        about = f"no column {column}, only {', '.join(found.has) or 'columns without text'}"
        if found.rows:
            tally.lacks_column(column, file.name, found.has, about, sum(found.has.values()), found.rows)
    except (ArrowException, OSError) as error:
        part = shard.size_bytes if len(shard.files) == 1 else _size_if_known(file)
        tally.break_off(file, error, text_bytes(file.name, part))


def _parquet_rows(place: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stack.enter_context(opened(place)))
    every = _groups(file.metadata)
    groups = every[start : stop if stop >= 0 else len(every)]
    n_rows = sum(group.num_rows for group in groups)
    sizes = _text_sizes(groups)
    if not _has(file.schema_arrow, column):
        raise _NoColumn(n_rows, sizes)
    number = sum(group.num_rows for group in every[:start])
    at_a_time = max(1, min(_MOST_ROWS, _ROWS_BYTES * n_rows // max(1, sizes.get(column, 0))))
    for batch in file.iter_batches(at_a_time, row_groups=list(range(start, start + len(groups))), columns=[column]):
        yield from enumerate(_values(batch, column), number)
        number += batch.num_rows


def _text_sizes(groups: Sequence[Any]) -> dict[str, int]:
    """Uncompressed bytes of the columns of strings in some row groups, by their names with dots."""
    sizes = Counter[str]()
    for group in groups:
        for part in (group.column(number) for number in range(group.num_columns)):
            if part.physical_type == "BYTE_ARRAY":
                sizes[part.path_in_schema] += part.total_uncompressed_size
    return dict(sizes)


def _has(schema: Any, column: str) -> bool:
    """Whether an Arrow schema, or the type of a record, has a column that is no record itself; dots lead into records."""
    from pyarrow import types

    inside = {child.name: child.type for child in schema}
    if column in inside:
        return not types.is_struct(inside[column])
    head, _, rest = column.partition(".")
    return bool(rest and head in inside and types.is_struct(inside[head]) and _has(inside[head], rest))


def _picked(inside: Any, column: str) -> Any:
    """A column of a record batch, or of an array of records."""
    columns = dict(zip(inside.schema.names, inside.columns, strict=True)) if hasattr(inside, "schema") else _fields(inside)
    if column in columns:
        return columns[column]
    head, _, rest = column.partition(".")
    return _picked(columns[head], rest)


def _fields(records: Any) -> dict[str, Any]:
    """The columns of an array of records; a missing record has nothing in any of them."""
    return dict(zip((child.name for child in records.type), records.flatten(), strict=True))


def _values(batch: Any, column: str) -> list[Any]:
    """A column's values; as bytes where one of them is no UTF-8."""
    import pyarrow as pa

    found = _picked(batch, column)
    try:
        return found.to_pylist()
    except UnicodeDecodeError:
        return found.cast(pa.large_binary()).to_pylist()


def _arrow_rows(place: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    number, without = 0, 0
    has = Counter[str]()
    for index, batch in enumerate(_arrow_batches(place)):
        if start <= index and (stop < 0 or index < stop):
            if _has(batch.schema, column):
                yield from enumerate(_values(batch, column), number)
            else:
                without += batch.num_rows
                has.update({name: _picked(batch, name).nbytes for name in _text_columns(batch.schema)})
        number += batch.num_rows
    if without:
        raise _NoColumn(without, dict(has))


def _text_columns(schema: Any, before: str = "") -> Iterator[str]:
    """Columns of strings of an Arrow schema, those in records by names with dots."""
    from pyarrow import types

    for child in schema:
        if types.is_struct(child.type):
            yield from _text_columns(child.type, f"{before}{child.name}.")
        elif any(kind(child.type) for kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
            yield before + child.name


def _arrow_batches(place: str) -> Iterator[Any]:
    """Record batches of a stream (what `datasets` writes) or of an Arrow file, mapped."""
    import pyarrow as pa

    source = pa.PythonFile(opened(place), mode="r") if place.startswith(HUB) else pa.memory_map(place)
    with source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def _read_lines(file: File, shard: Shard, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """JSON values, one a line. A compressed file that breaks off counts once and ends there."""
    compressed = file.name.endswith(_COMPRESSED)
    read = consumed = 0  # bytes of lines, bytes of the file
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(opened(file.place))
            longest = _ESCAPED * max_bytes + _REST_OF_LINE
            lines = _lines(_decompressed(file.name, raw, stack), shard.start, shard.stop, longest)
            for number, (place, size, line) in enumerate(lines):
                read, consumed = place + size - shard.start, raw.tell() - shard.start
                id = f"{file.name}:{number}" if compressed else f"{file.name}@{place}"
                if line is None:
                    tally.reject("too large", id, size_bytes=size)
                elif line.strip():
                    yield from _parsed(id, line, column, max_bytes, tally)
    except (OSError, EOFError, zlib.error) as error:
        tally.break_off(file, error, _lost_of(file, shard, read, consumed))


def _lost_of(file: File, shard: Shard, read: int, consumed: int) -> int:
    """About how much text a file has lost that broke off.

    A file that was cut does not say how long it was: it counts as if half of it were gone. A file with a bad place in it counts with its rest.

    Args:
        read: bytes of its lines until then, uncompressed.
        consumed: bytes of the file that they came from.
    """
    size = shard.size_bytes if len(shard.files) == 1 else _size_if_known(file)
    rest = max(0, size - consumed)
    return max(read, rest * read // consumed if consumed else text_bytes(file.name, rest))


def _decompressed(name: str, raw: IO[bytes], stack: ExitStack) -> IO[bytes]:
    if name.endswith(".gz"):
        return stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=raw)))
    if name.endswith(".zst"):
        import pyarrow as pa

        # Arrow's reader goes on over all frames and tells a file that breaks off, as gzip's does.
        frames = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
        return stack.enter_context(cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, frames), 1 << 17)))
    return raw


def _lines(file: IO[bytes], start: int, stop: int, longest: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Lines that begin in bytes [start, stop): where each begins, its size, and None in its place where it is too long to be held."""
    place = start
    if start:  # what begins before is the part's before us
        file.seek(start - 1)
        place += _line(file, 0)[0] - 1
    while stop < 0 or place < stop:
        size, line = _line(file, longest)
        if not size:
            return
        yield place, size, line
        place += size


def _line(file: IO[bytes], longest: int) -> tuple[int, bytes | None]:
    """The size of the next line, 0 at the end, and the line."""
    pieces, size = list[bytes](), 0
    while piece := file.readline(_PIECE):
        size += len(piece)
        if size <= longest:
            pieces.append(piece)
        else:
            pieces.clear()
        if piece.endswith(b"\n"):
            break
    return size, b"".join(pieces) if size <= longest else None


def _parsed(id: str, line: bytes, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        tally.reject("bad UTF-8", id, line, len(line))
    except (ValueError, RecursionError):
        tally.reject("invalid JSON", id, line, len(line))
    else:
        yield from of_record(id, record, column, max_bytes, tally, line)


def of_record(id: str, record: object, column: str, max_bytes: int, tally: Tally, line: bytes | None = None) -> Iterator[Document]:
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
