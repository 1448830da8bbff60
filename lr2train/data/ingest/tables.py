"""Tables: .parquet files by row groups, .arrow files by record batches.

Choice: only the text column of a table is read, a few rows at a time. A table without the text column counts with all
its rows and with the bytes of its columns of strings, because that is the text that is lost. Cost: a row group is never
divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from lr2train.data.ingest.records import (
    HUB_SCHEME,
    InputFile,
    InputSplit,
    ReadCounts,
    SourceDocument,
    document_of_text,
    estimated_text_bytes,
    file_bytes_if_known,
    open_input,
)

_MAX_ROWS, _BATCH_BYTES = 256, 32 << 20  # of a .parquet file in memory at a time


class _NoColumn(Exception):
    """Rows without the text column.

    Args:
        rows: how many.
        text_columns: their columns of strings, with sizes in bytes.
    """

    def __init__(self, rows: int, text_columns: dict[str, int]) -> None:
        super().__init__()
        self.rows, self.text_columns = rows, text_columns


def read_table(
    file: InputFile,
    split: InputSplit,
    column: str,
    max_bytes: int,
    counts: ReadCounts,
) -> Iterator[SourceDocument]:
    """Documents of a .parquet or .arrow file, one for each row.

    A file that cannot be read counts as one broken record. A file without the column counts with all its rows.
    """
    from pyarrow import ArrowException

    rows = _parquet_rows if file.lower_name.endswith(".parquet") else _arrow_rows
    try:
        with ExitStack() as stack:
            for number, text in rows(file.location, split.start, split.stop, column, stack):
                yield from document_of_text(f"{file.name}:{number}", text, max_bytes, counts)
    except _NoColumn as missing:
        about = f"no column {column}, only {', '.join(missing.text_columns) or 'columns without text'}"
        if missing.rows:
            size = sum(missing.text_columns.values())
            counts.count_missing_column(file.name, missing.text_columns, about, size, missing.rows)
    except (ArrowException, OSError) as error:
        part = split.size_bytes if len(split.files) == 1 else file_bytes_if_known(file)
        counts.count_unreadable(file, error, estimated_text_bytes(file.name, part))


def _parquet_rows(location: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    """(row number in the file, value) of row groups [start, stop)."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stack.enter_context(open_input(location)))
    all_groups = _row_groups(file.metadata)
    groups = all_groups[start : stop if stop >= 0 else len(all_groups)]
    n_rows = sum(group.num_rows for group in groups)
    text_columns = _text_sizes(groups)
    if not _has_column(file.schema_arrow, column):
        raise _NoColumn(n_rows, text_columns)
    number = sum(group.num_rows for group in all_groups[:start])
    batch_rows = max(1, min(_MAX_ROWS, _BATCH_BYTES * n_rows // max(1, text_columns.get(column, 0))))
    for batch in file.iter_batches(batch_rows, row_groups=list(range(start, start + len(groups))), columns=[column]):
        yield from enumerate(_values(batch, column), number)
        number += batch.num_rows


def _text_sizes(groups: Sequence[Any]) -> dict[str, int]:
    """Uncompressed bytes of the columns of strings in some row groups. Dots lead into nested records."""
    sizes = Counter[str]()
    for group in groups:
        for chunk in (group.column(number) for number in range(group.num_columns)):
            if chunk.physical_type == "BYTE_ARRAY":
                sizes[chunk.path_in_schema] += chunk.total_uncompressed_size
    return dict(sizes)


def _has_column(schema: Any, column: str) -> bool:
    """Whether an Arrow schema, or the type of a record, has a column that is not a record itself.

    Dots lead into nested records. A column whose own name holds dots comes first.
    """
    from pyarrow import types

    fields = {child.name: child.type for child in schema}
    if column in fields:
        return not types.is_struct(fields[column])
    head, _, rest = column.partition(".")
    return bool(rest and head in fields and types.is_struct(fields[head]) and _has_column(fields[head], rest))


def _column(table: Any, column: str) -> Any:
    """A column of a record batch, or of an array of records."""
    columns = _columns(table)
    if column in columns:
        return columns[column]
    head, _, rest = column.partition(".")
    return _column(columns[head], rest)


def _columns(table: Any) -> dict[str, Any]:
    """The columns by name. In an array of records, a record that is null is null in every column."""
    if hasattr(table, "schema"):
        return dict(zip(table.schema.names, table.columns, strict=True))
    return dict(zip((child.name for child in table.type), table.flatten(), strict=True))


def _values(batch: Any, column: str) -> list[Any]:
    """A column's values: strings, or bytes where some value is not UTF-8."""
    import pyarrow as pa

    values = _column(batch, column)
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return values.cast(pa.large_binary()).to_pylist()


def _arrow_rows(location: str, start: int, stop: int, column: str, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    """(row number in the file, value) of record batches [start, stop)."""
    number, n_without = 0, 0
    text_columns = Counter[str]()
    for index, batch in enumerate(_arrow_batches(location)):
        if start <= index and (stop < 0 or index < stop):
            if _has_column(batch.schema, column):
                yield from enumerate(_values(batch, column), number)
            else:
                n_without += batch.num_rows
                text_columns.update({name: _column(batch, name).nbytes for name in _text_columns(batch.schema)})
        number += batch.num_rows
    if n_without:
        raise _NoColumn(n_without, dict(text_columns))


def _text_columns(schema: Any, prefix: str = "") -> Iterator[str]:
    """Columns of strings of an Arrow schema. Names in nested records are joined by dots."""
    from pyarrow import types

    text_types = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    for child in schema:
        if types.is_struct(child.type):
            yield from _text_columns(child.type, f"{prefix}{child.name}.")
        elif any(is_type(child.type) for is_type in text_types):
            yield prefix + child.name


def parquet_borders(file: InputFile, split_bytes: int) -> list[int]:
    """Row groups at which splits of about ``split_bytes`` begin, and the number of all.

    ``[0, -1]``, the whole file, where the file is damaged: its reader reports the damage.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        groups = _row_groups(ParquetFile(file.location).metadata)
        sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    except (ArrowException, OSError):
        return [0, -1]
    return _borders(sizes, split_bytes)


def arrow_borders(file: InputFile, size: int, split_bytes: int) -> list[int]:
    """Record batches at which splits begin, like ``parquet_borders``; batches are taken as equally large."""
    from pyarrow import ArrowException

    try:
        n = sum(1 for _ in _arrow_batches(file.location))
    except (ArrowException, OSError):
        return [0, -1]
    return _borders([size // max(n, 1)] * n, split_bytes)


def _borders(sizes: Sequence[int], most: int) -> list[int]:
    borders, size = [0], 0
    for number, added in enumerate(sizes):
        if size and size + added > most:
            borders.append(number)
            size = 0
        size += added
    return [*borders, len(sizes)]


def _row_groups(metadata: Any) -> list[Any]:
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def _arrow_batches(location: str) -> Iterator[Any]:
    """Record batches of an Arrow stream (the format that `datasets` writes) or of an Arrow file, mapped into memory."""
    import pyarrow as pa

    on_hub = location.startswith(HUB_SCHEME)
    source = pa.PythonFile(open_input(location), mode="r") if on_hub else pa.memory_map(location)
    with source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
