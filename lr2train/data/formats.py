"""File formats: a list of files becomes shards, a shard becomes documents.

Choice: a shard is the same part of the input in every run, whatever the number of workers: a range of bytes of a .jsonl file, row groups of
a .parquet file, record batches of an .arrow file, some small .txt files together. A broken record is counted by reason, sampled and skipped:
one bad line must not cost a night. A file that breaks off counts once; one that the disk or the network fails to give ends the job, because nobody would
read its rest again. Ids are stable names (``file``, ``file:record``, ``file@byte`` for a line of a .jsonl file), because the
holdout is drawn by their hash. Cost: a compressed file is one shard, however large.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
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
_ROWS_AT_A_TIME = 256  # of a parquet file in memory
_ESCAPED = 6  # bytes of JSON that a byte of text can take
_REST_OF_LINE = 1 << 16  # of a record beside its text, at most about that


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
    """What a reader met on its way."""

    documents: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # broken records by reason
    rejects: list[dict[str, str]] = field(default_factory=list)  # examples of each
    broken_off_bytes: int = 0  # of files that broke off, their whole size: what was lost cannot be known
    limited: bool = False  # a limit of the source ended the reading

    @property
    def broken(self) -> int:
        """Records without text, of another encoding, not parseable or too large."""
        return self.reasons.total()

    def reject(self, reason: str, origin: str, sample: object = b"") -> None:
        """Count a broken record; the first few of a reason are kept with their beginning."""
        if self.reasons[reason] < KEPT_REJECTS:
            self.rejects.append({"reason": reason, "origin": origin, "beginning": _shown(sample)})
        self.reasons[reason] += 1

    def break_off(self, file: File, error: Exception, part_bytes: int | None = None) -> None:
        """Count a file that cannot be read (on); ``part_bytes`` of it are this reader's, or all.

        Raises:
            UserError: it is not damaged, but cannot be read now.
        """
        _refuse_outage(file, error)
        self.reject(BROKEN_OFF, file.name, str(error))
        self.broken_off_bytes += size_of(file) if part_bytes is None else part_bytes


def _shown(sample: object, size: int = 200) -> str:
    text = sample[:size] if isinstance(sample, (bytes, str)) else repr(sample)[:size]
    data = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def checked(id: str, text: object, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """The document, or one more broken record. Bytes, as a binary column has them, are read as UTF-8."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            tally.reject("bad UTF-8", id, text)
            return
    if not isinstance(text, str):
        tally.reject("no text", id, text)
    elif not text.strip():
        tally.reject("empty", id, text)
    else:
        try:
            data = text.encode()
        except UnicodeEncodeError:  # JSON can name half a surrogate pair
            tally.reject("bad UTF-8", id, text)
            return
        if len(data) > max_bytes:
            tally.reject("too large", id, data)
        else:
            yield Document(id, text, data)


def read_text(file: File, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """A file that is one document."""
    try:
        with opened(file.place) as lines:
            data = lines.read(max_bytes + 1)
        if len(data) > max_bytes:
            tally.reject("too large", file.name, data)
        else:
            yield from checked(file.name, data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"), max_bytes, tally)
    except UnicodeDecodeError:
        tally.reject("bad UTF-8", file.name, data)
    except OSError as error:
        tally.break_off(file, error)


def _refuse_outage(file: File, error: Exception) -> None:
    """Tell a damaged file, which is skipped, from one that cannot be read now: the system's errors have a number, those of decoders have none.

    Raises:
        UserError: it cannot be read now.
    """
    if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile):
        return
    if error.errno is not None or file.place.startswith(HUB):  # libraries of the network number nothing
        raise UserError(
            f"{file.place} cannot be read ({' '.join(str(error).split())}); make it readable or remove it, and run the same command again to go on"
        ) from error


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
    """Documents of a shard of files: one a .txt file, one a record of the others."""
    for file in shard.files:
        if file.name.endswith(".txt"):
            yield from read_text(file, max_bytes, tally)
        elif file.name.endswith((".parquet", ".arrow")):
            yield from _read_table(file, shard, column, max_bytes, tally)
        else:
            yield from _read_lines(file, shard, column, max_bytes, tally)


def _part_of(shard: Shard) -> int | None:
    """Bytes that a shard holds of its one file; None where it holds several, whole."""
    return shard.size_bytes if len(shard.files) == 1 else None


def _read_table(file: File, shard: Shard, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """Rows of a .parquet or .arrow file. One that cannot be read, or lacks the column, counts once."""
    from pyarrow import ArrowException

    rows = _parquet_rows if file.name.endswith(".parquet") else _arrow_rows
    try:
        with ExitStack() as stack:
            for number, text in rows(file.place, shard.start, shard.stop, column, stack):
                yield from checked(f"{file.name}:{number}", text, max_bytes, tally)
    except KeyError:
        tally.reject("missing column", file.name, f"no column {column}")
    except (ArrowException, OSError) as error:
        tally.break_off(file, error, _part_of(shard))


def _parquet_rows(place: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stack.enter_context(opened(place)))
    if column not in file.schema_arrow.names:
        raise KeyError(column)
    groups = range(start, stop if stop >= 0 else file.metadata.num_row_groups)
    number = sum(file.metadata.row_group(group).num_rows for group in range(start))
    for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=list(groups), columns=[column]):
        yield from enumerate(_values(batch.column(0)), number)
        number += batch.num_rows


def _values(column: Any) -> list[Any]:
    """A column's values; as bytes where one of them is no UTF-8."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()


def _arrow_rows(place: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    number = 0
    for index, batch in enumerate(_arrow_batches(place)):
        if column not in batch.schema.names:
            raise KeyError(column)
        if start <= index and (stop < 0 or index < stop):
            yield from enumerate(_values(batch.column(column)), number)
        number += batch.num_rows


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
    compressed = file.name.endswith((".gz", ".zst"))
    try:
        with ExitStack() as stack:
            lines = _decompressed(file, stack)
            longest = _ESCAPED * max_bytes + _REST_OF_LINE
            for number, (place, line) in enumerate(_lines(lines, shard.start, shard.stop, longest)):
                id = f"{file.name}:{number}" if compressed else f"{file.name}@{place}"
                if line is None:
                    tally.reject("too large", id)
                elif line.strip():
                    yield from _parsed(id, line, column, max_bytes, tally)
    except (OSError, EOFError, zlib.error) as error:
        tally.break_off(file, error, _part_of(shard))


def _decompressed(file: File, stack: ExitStack) -> IO[bytes]:
    raw = stack.enter_context(opened(file.place))
    if file.name.endswith(".gz"):
        return stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=raw)))
    if file.name.endswith(".zst"):
        import pyarrow as pa

        # Arrow's reader goes on over all frames and tells a file that breaks off, as gzip's does.
        frames = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
        return stack.enter_context(cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, frames), 1 << 17)))
    return raw


def _lines(file: IO[bytes], start: int, stop: int, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines that begin in bytes [start, stop), with where they begin; None stands for one that is too long to be held."""
    place = start
    if start:  # what begins before is the part's before us
        file.seek(start - 1)
        place += sum(map(len, _pieces(file, longest))) - 1
    while stop < 0 or place < stop:
        pieces = _pieces(file, longest)
        line = next(pieces, b"")
        if not line:
            return
        rest = sum(map(len, pieces))
        yield place, None if rest else line
        place += len(line) + rest


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """One line, in pieces of at most ``size``."""
    while piece := file.readline(size):
        yield piece
        if piece.endswith(b"\n"):
            return


def _parsed(id: str, line: bytes, column: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        tally.reject("bad UTF-8", id, line)
    except (ValueError, RecursionError):
        tally.reject("invalid JSON", id, line)
    else:
        if isinstance(record, dict) and column in record:
            yield from checked(id, record[column], max_bytes, tally)
        else:
            tally.reject("missing column", id, line)
