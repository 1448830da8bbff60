"""File formats: a list of files becomes input splits, an input split becomes documents.

Choice: an input split is the same part of the input in every run, whatever the number of workers: a byte range of a
.jsonl file, row groups of a .parquet file, record batches of an .arrow file, or several small files. Ids are stable
names (``file``, ``file:record``, or ``file@byte`` for a line of a .jsonl file), because the holdout is drawn by their
hash. Cost: a compressed file is one split, however large.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO, cast

from lr2train.data.ingest.records import (
    BAD_UTF8,
    COMPRESSED,
    TOO_LARGE,
    InputFile,
    InputSplit,
    ReadCounts,
    SourceDocument,
    document_of_record,
    document_of_text,
    estimated_text_bytes,
    file_bytes,
    file_bytes_if_known,
    open_input,
)
from lr2train.data.ingest.tables import arrow_borders, parquet_borders, read_table
from lr2train.io import read_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet", ".arrow")

# A longer line than _MAX_ESCAPED * max_document_bytes + _MAX_REST cannot hold a text within the limit.
_MAX_ESCAPED = 3  # bytes of JSON for a byte of text with escaped letters; only control characters take more
_MAX_REST = 1 << 16  # bytes of a record beside its text
_CHUNK_BYTES = 1 << 20  # of a line, read at a time: a long line is given up before it fills the memory


def is_read(path: str) -> bool:
    """Whether a file is read, by its suffix.

    An .arrow file beside a state.json is read only where state.json names it: `datasets` saves its caches beside the
    records.
    """
    if not path.lower().endswith(SUFFIXES):
        return False
    file = Path(path)
    state = file.parent / "state.json"
    if not file.name.endswith(".arrow") or not state.is_file():
        return True
    return any(entry.get("filename") == file.name for entry in read_json(state).get("_data_files", []))


def input_splits(files: Sequence[InputFile], split_bytes: int) -> list[InputSplit]:
    """Files in order as splits of at most about ``split_bytes``.

    Small files share a split. A large file is cut where its format allows.
    """
    splits: list[InputSplit] = []
    together: list[InputFile] = []
    together_bytes = 0

    def close() -> None:
        nonlocal together, together_bytes
        if together:
            name = together[0].name if len(together) == 1 else f"{together[0].name} … {together[-1].name}"
            splits.append(InputSplit(name, tuple(together), size_bytes=together_bytes))
        together, together_bytes = [], 0

    for file in files:
        size = file_bytes(file)
        alone = file.on_hub or size > split_bytes
        if alone or together_bytes + size > split_bytes:
            close()
        if alone:
            splits.extend(_cut(file, split_bytes))
        else:
            together.append(file)
            together_bytes += size
    close()
    return splits


def _cut(file: InputFile, split_bytes: int) -> Iterator[InputSplit]:
    """A large file as several splits, where its format can be entered in the middle."""
    size = file_bytes(file)
    if file.lower_name.endswith(".parquet") and size:
        borders = parquet_borders(file, split_bytes)
    elif file.lower_name.endswith(".arrow") and size:
        borders = arrow_borders(file, size, split_bytes)
    elif file.lower_name.endswith(".jsonl") and not file.on_hub:
        borders = [*range(0, size, split_bytes), size]
    else:
        borders = [0, -1]
    for start, stop in pairwise(borders):
        name = file.name if len(borders) == 2 else f"{file.name}[{start}:{stop}]"
        yield InputSplit(name, (file,), start, stop, size // (len(borders) - 1))


def read_files(split: InputSplit, column: str, max_bytes: int, counts: ReadCounts) -> Iterator[SourceDocument]:
    """Documents of a split: one for each .txt file, one for each record of the other formats.

    Args:
        column: that holds the text. Dots lead into nested records (``meta.text``), unless a column has that very name.
        max_bytes: of a document.
    """
    for file in split.files:
        if file.lower_name.endswith(".txt"):
            yield from read_text(file, max_bytes, counts)
        elif file.lower_name.endswith((".parquet", ".arrow")):
            yield from read_table(file, split, column, max_bytes, counts)
        else:
            yield from _read_lines(file, split, column, max_bytes, counts)


def read_text(file: InputFile, max_bytes: int, counts: ReadCounts) -> Iterator[SourceDocument]:
    """A whole file as one document. Line ends become ``\\n``; a byte order mark is dropped."""
    try:
        with open_input(file.location) as stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            counts.count_broken(TOO_LARGE, file.name, data, max(file_bytes(file), len(data)))
        else:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            yield from document_of_text(file.name, text, max_bytes, counts, len(data))
    except UnicodeDecodeError:
        counts.count_broken(BAD_UTF8, file.name, data, len(data))
    except OSError as error:
        counts.count_unreadable(file, error, file_bytes_if_known(file))


def _read_lines(
    file: InputFile,
    split: InputSplit,
    column: str,
    max_bytes: int,
    counts: ReadCounts,
) -> Iterator[SourceDocument]:
    """JSON records, one a line. A damaged compressed file counts as one broken record and ends there."""
    compressed = file.lower_name.endswith(COMPRESSED)
    line_bytes = consumed_bytes = 0  # of lines, and of the file that they came from
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(open_input(file.location))
            longest = _MAX_ESCAPED * max_bytes + _MAX_REST
            lines = _lines(_decompressed(file.lower_name, raw, stack), split.start, split.stop, longest)
            for number, (offset, size, line) in enumerate(lines):
                line_bytes, consumed_bytes = offset + size - split.start, raw.tell() - split.start
                id = f"{file.name}:{number}" if compressed else f"{file.name}@{offset}"
                if line is None:
                    counts.count_broken(TOO_LARGE, id, size_bytes=size)
                elif line.strip():
                    yield from _read_record(id, line, column, max_bytes, counts)
    except (OSError, EOFError, zlib.error) as error:
        counts.count_unreadable(file, error, _lost_bytes(file, split, line_bytes, consumed_bytes))


def _lost_bytes(file: InputFile, split: InputSplit, line_bytes: int, consumed_bytes: int) -> int:
    """Estimate of the text after the place where a file is damaged.

    A truncated file does not say how long it was: half of it counts as lost. A file that goes on after the damage
    counts with its rest.

    Args:
        line_bytes: of the lines before the damage, uncompressed.
        consumed_bytes: of the file that these lines came from.
    """
    size = split.size_bytes if len(split.files) == 1 else file_bytes_if_known(file)
    rest = max(0, size - consumed_bytes)
    rest_text = rest * line_bytes // consumed_bytes if consumed_bytes else estimated_text_bytes(file.name, rest)
    return max(line_bytes, rest_text)


def _decompressed(lower_name: str, raw: IO[bytes], stack: ExitStack) -> IO[bytes]:
    if lower_name.endswith(".gz"):
        return stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=raw)))
    if lower_name.endswith(".zst"):
        import pyarrow as pa

        # Arrow's reader continues over all frames and reports a truncated file, as gzip's reader does.
        frames = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
        return stack.enter_context(cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, frames), 1 << 17)))
    return raw


def _lines(file: IO[bytes], start: int, stop: int, longest: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(offset, size, line) of the lines that begin in bytes [start, stop); line is None beyond ``longest`` bytes."""
    offset = start
    if start:  # the rest of a line that began earlier belongs to the split before
        file.seek(start - 1)
        offset += _read_line(file, 0)[0] - 1
    while stop < 0 or offset < stop:
        size, line = _read_line(file, longest)
        if not size:
            return
        yield offset, size, line
        offset += size


def _read_line(file: IO[bytes], longest: int) -> tuple[int, bytes | None]:
    """(size, line) of the next line.

    The size is 0 at the end of the file; line is None where it is longer than ``longest``.
    """
    chunks, size = list[bytes](), 0
    while chunk := file.readline(_CHUNK_BYTES):
        size += len(chunk)
        if size <= longest:
            chunks.append(chunk)
        else:
            chunks.clear()
        if chunk.endswith(b"\n"):
            break
    return size, b"".join(chunks) if size <= longest else None


def _read_record(id: str, line: bytes, column: str, max_bytes: int, counts: ReadCounts) -> Iterator[SourceDocument]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        counts.count_broken(BAD_UTF8, id, line, len(line))
    except (ValueError, RecursionError):
        counts.count_broken("invalid JSON", id, line, len(line))
    else:
        yield from document_of_record(id, record, column, max_bytes, counts, line)
