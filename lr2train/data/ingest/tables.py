"""Tables: .parquet and .arrow files, by their row groups and record batches.

Choice: of a table only the column of the text is read, a few rows at a time. A table that lacks the column counts with all its rows and the
bytes of its columns of text, because that is the text that is lost. Cost: a row group is never divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from lr2train.data.ingest.records import HUB, InputFile, InputSplit, ReadCounts, SourceDocument, checked, opened, size_if_known, text_bytes

_MOST_ROWS, _ROWS_BYTES = 256, 32 << 20  # of a parquet file in memory at a time


class _NoColumn(Exception):
    """Rows without the column.

    Args:
        rows: how many.
        has: the columns of text that they have, with their sizes in bytes.
    """

    def __init__(self, rows: int, has: dict[str, int]) -> None:
        super().__init__()
        self.rows, self.has = rows, has


def read_table(file: InputFile, shard: InputSplit, column: str, max_bytes: int, tally: ReadCounts) -> Iterator[SourceDocument]:
    """Rows of a .parquet or .arrow file. One that cannot be read counts once, one that lacks the column with all its rows."""
    from pyarrow import ArrowException

    rows = _parquet_rows if file.kind.endswith(".parquet") else _arrow_rows
    try:
        with ExitStack() as stack:
            for number, text in rows(file.place, shard.start, shard.stop, column, stack):
                yield from checked(f"{file.name}:{number}", text, max_bytes, tally)
    except _NoColumn as found:
        about = f"no column {column}, only {', '.join(found.has) or 'columns without text'}"
        if found.rows:
            tally.lacks_column(column, file.name, found.has, about, sum(found.has.values()), found.rows)
    except (ArrowException, OSError) as error:
        part = shard.size_bytes if len(shard.files) == 1 else size_if_known(file)
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


def parquet_borders(file: InputFile, shard_bytes: int) -> list[int]:
    """Row groups together until they are large enough; the whole file where it cannot be read, and is reported by its reader."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        about = ParquetFile(file.place).metadata
        sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in _groups(about)]
    except (ArrowException, OSError):
        return [0, -1]
    return _grouped(sizes, shard_bytes)


def arrow_borders(file: InputFile, size: int, shard_bytes: int) -> list[int]:
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


def _groups(about: Any) -> list[Any]:
    return [about.row_group(number) for number in range(about.num_row_groups)]


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
