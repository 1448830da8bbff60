"""File formats: a list of files becomes shards, a shard becomes documents.

Choice: a shard is the same part of the input in every run, whatever the number of workers: a range of bytes of a .jsonl file, row groups of
a .parquet file, record batches of an .arrow file, some small .txt files together. Ids are stable names (``file``, ``file:record``,
``file@byte`` for a line of a .jsonl file), because the holdout is drawn by their hash. Cost: a compressed file is one shard, however large.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import IO, cast

from lr2train.data.ingest.records import (
    COMPRESSED,
    HUB,
    InputFile,
    InputSplit,
    ReadCounts,
    SourceDocument,
    checked,
    of_record,
    opened,
    size_if_known,
    size_of,
    text_bytes,
)
from lr2train.data.ingest.tables import arrow_borders, parquet_borders, read_table

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (".txt", *LINES, ".parquet", ".arrow")
_ESCAPED = 3  # bytes of JSON that a byte of text takes where other alphabets are escaped; only control characters take more
_REST_OF_LINE = 1 << 16  # of a record beside its text, at most about that
_PIECE = 1 << 20  # of a line that is read at a time: a long one is given up before it fills the memory


def read_text(file: InputFile, max_bytes: int, tally: ReadCounts) -> Iterator[SourceDocument]:
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
        tally.break_off(file, error, size_if_known(file))


def shards_of(files: Sequence[InputFile], shard_bytes: int) -> list[InputSplit]:
    """Files in order as shards of at most about ``shard_bytes``: small ones together, large ones cut."""
    made: list[InputSplit] = []
    together: list[InputFile] = []
    size = 0
    for file in files:
        its = size_of(file)
        alone = file.place.startswith(HUB) or its > shard_bytes
        if together and (alone or size + its > shard_bytes):
            made.append(InputSplit(_range_name(together), tuple(together), size_bytes=size))
            together, size = [], 0
        if alone:
            made.extend(_cut(file, shard_bytes))
        else:
            together.append(file)
            size += its
    return made + ([InputSplit(_range_name(together), tuple(together), size_bytes=size)] if together else [])


def _range_name(files: Sequence[InputFile]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} … {files[-1].name}"


def _cut(file: InputFile, shard_bytes: int) -> Iterator[InputSplit]:
    """A large file as several shards where its format can be entered in the middle."""
    size = size_of(file)
    if file.kind.endswith(".parquet") and size:
        borders = parquet_borders(file, shard_bytes)
    elif file.kind.endswith(".arrow") and size:
        borders = arrow_borders(file, size, shard_bytes)
    elif file.kind.endswith(".jsonl") and not file.place.startswith(HUB):
        borders = [*range(0, size, shard_bytes), size]
    else:
        borders = [0, -1]
    for start, stop in pairwise(borders):
        name = file.name if len(borders) == 2 else f"{file.name}[{start}:{stop}]"
        yield InputSplit(name, (file,), start, stop, size // (len(borders) - 1))


def read_files(shard: InputSplit, column: str, max_bytes: int, tally: ReadCounts) -> Iterator[SourceDocument]:
    """Documents of a shard of files: one a .txt file, one a record of the others.

    Args:
        column: that holds the text; dots lead into records (``meta.text``), unless a column has that very name.
    """
    for file in shard.files:
        if file.kind.endswith(".txt"):
            yield from read_text(file, max_bytes, tally)
        elif file.kind.endswith((".parquet", ".arrow")):
            yield from read_table(file, shard, column, max_bytes, tally)
        else:
            yield from _read_lines(file, shard, column, max_bytes, tally)


def _read_lines(file: InputFile, shard: InputSplit, column: str, max_bytes: int, tally: ReadCounts) -> Iterator[SourceDocument]:
    """JSON values, one a line. A compressed file that breaks off counts once and ends there."""
    compressed = file.kind.endswith(COMPRESSED)
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


def _lost_of(file: InputFile, shard: InputSplit, read: int, consumed: int) -> int:
    """About how much text a file has lost that broke off.

    A file that was cut does not say how long it was: it counts as if half of it were gone. A file with a bad place in it counts with its rest.

    Args:
        read: bytes of its lines until then, uncompressed.
        consumed: bytes of the file that they came from.
    """
    size = shard.size_bytes if len(shard.files) == 1 else size_if_known(file)
    rest = max(0, size - consumed)
    return max(read, rest * read // consumed if consumed else text_bytes(file.name, rest))


def _decompressed(name: str, raw: IO[bytes], stack: ExitStack) -> IO[bytes]:
    name = name.lower()
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


def _parsed(id: str, line: bytes, column: str, max_bytes: int, tally: ReadCounts) -> Iterator[SourceDocument]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        tally.reject("bad UTF-8", id, line, len(line))
    except (ValueError, RecursionError):
        tally.reject("invalid JSON", id, line, len(line))
    else:
        yield from of_record(id, record, column, max_bytes, tally, line)
