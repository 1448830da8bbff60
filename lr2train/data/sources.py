"""Where documents come from: readers that yield (id, text), one a kind.

Choice: a reader is a generator over one source and knows nothing of tokens. A broken record is counted and skipped: one bad line must not
cost a night; a source that yields nothing is an error. Ids are stable names (file, file:line), because the holdout is drawn by their hash.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.config import SourceConfig, UserError
from lr2train.data.batch import WINDOWS

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
CUSTOM = "custom"
PART = "#"  # in an id, before a part of a document: parts are held out as their whole is
_ROWS_AT_A_TIME = 256  # of a parquet file in memory
_DEFINITION = re.compile(r"^(?:[ ]{4})?(?:@[^\n]*\n\s*)*(?:async def|def|class) ", re.MULTILINE)


class Document(NamedTuple):
    """One text with a name that is the same in every run."""

    id: str
    text: str


@dataclass
class Tally:
    """What a reader met on its way."""

    documents: int = 0
    text_bytes: int = 0
    broken: int = 0  # records without text, of another encoding, or not parseable


Reader = Callable[[SourceConfig, Tally], Iterator[Document]]


def read(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Documents of a source in its fixed order, up to its ``max_documents`` and ``max_bytes``; the tally counts along.

    Raises:
        UserError: unknown kind or option, a path that is not there, or nothing to read.
    """
    for document in reader_of(source)(source, tally):
        size = len(document.text.encode())
        if tally.documents == source.max_documents or (source.max_bytes is not None and tally.text_bytes + size > source.max_bytes):
            break
        tally.documents += 1
        tally.text_bytes += size
        yield document
    if not tally.documents:
        raise UserError(
            f"data.sources.{source.name} ({source.kind}, path={source.path}) has no document ({tally.broken} broken records); point path "
            "at text, or raise its limits"
        )


def check(source: SourceConfig) -> None:
    """Refuse a source of text that cannot be read, before anything is.

    Raises:
        UserError: unknown kind or window, a limit that lets nothing through, or a ``target`` that is not there.
    """
    reader_of(source)
    check_windows(source)
    for key in ("max_documents", "max_bytes", "max_tokens"):
        limit = getattr(source, key)
        if limit is not None and limit < 1:
            raise UserError(f"data.sources.{source.name}.{key}={limit} is below 1; set it to 1 or more, or to null to read all")
    if source.kind == CUSTOM:
        _target(source)
    elif source.target is not None:
        raise UserError(f"data.sources.{source.name}.target={source.target} needs kind={CUSTOM}, not {source.kind}; set kind={CUSTOM}")


def check_windows(source: SourceConfig) -> None:
    """Refuse windows that do not exist.

    Raises:
        UserError: none, or an unknown one.
    """
    if not source.windows or not set(source.windows) <= set(WINDOWS):
        raise UserError(
            f"data.sources.{source.name}.windows={list(source.windows)} is not one or both of {', '.join(WINDOWS)}; set windows to them"
        )


def reader_of(source: SourceConfig) -> Reader:
    """The reader of a source's kind.

    Raises:
        UserError: there is none.
    """
    if source.kind not in READERS:
        raise UserError(
            f"data.sources.{source.name}: kind={source.kind} is not one of {', '.join(sorted(READERS))}, needles; set kind to one of them"
        )
    return READERS[source.kind]


def identity(source: SourceConfig) -> str:
    """What decides a source's documents beside its config: files with sizes and times, or the Python version; of a custom class nothing is known."""
    if source.kind == "stdlib":
        return sys.version
    if source.kind == CUSTOM:
        return ""
    if source.kind != "folder" and not (source.path and Path(source.path).exists()):
        return ""
    facts = ((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(source))
    return hashlib.sha256("".join(map(str, facts)).encode()).hexdigest()


def take_options(source: SourceConfig, **defaults: Any) -> dict[str, Any]:
    """The source's options over their defaults.

    Raises:
        UserError: an option that the kind does not know.
    """
    unknown = sorted(set(source.options) - set(defaults))
    if unknown:
        known = ", ".join(defaults) or "none"
        raise UserError(
            f"data.sources.{source.name}.options.{unknown[0]} is not an option of kind={source.kind} ({known}); remove it or correct its "
            "name"
        )
    return {**defaults, **source.options}


def _read_stdlib(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Source code of the running Python's standard library: real documents of 1k to 300k tokens on every machine, without a download.

    Options: ``unit``: module (a file) or definition (a function, method or class head; short documents); ``tests`` adds the library's own
    tests (half of all its text, and missing on some systems).
    """
    options = take_options(source, unit="module", tests=False)
    if options["unit"] not in ("module", "definition"):
        raise UserError(
            f"data.sources.{source.name}.options.unit={options['unit']} is not one of module, definition; set it to one of them"
        )
    for file, name in _modules(Path(sysconfig.get_path("stdlib")), options["tests"]):
        whole = _text_file(file, name, tally)
        yield from whole if options["unit"] == "module" else (part for module in whole for part in _definitions(module))


def _modules(root: Path, tests: bool) -> Iterator[tuple[Path, str]]:
    """The .py files under a folder with their relative names, sorted; installed packages are not the library's."""
    skipped = {"site-packages", "dist-packages", "__pycache__"} | (set() if tests else {"test", "tests"})
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path, path.relative_to(root).as_posix()


def _definitions(module: Document) -> Iterator[Document]:
    """A module cut where a function, method or class begins, its decorators included."""
    starts = [match.start() for match in _DEFINITION.finditer(module.text)]
    stops = [*starts[1:], len(module.text)]
    for number, (start, stop) in enumerate(zip(starts, stops, strict=False)):
        yield Document(f"{module.id}{PART}{number}", module.text[start:stop])


def _read_folder(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Every .txt (one document), .jsonl, .jsonl.gz and .parquet (one a record) under a folder, sorted; or one such file."""
    take_options(source)
    root = Path(source.path or "")
    for file in _files(source):
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        if file.name.endswith(".txt"):
            yield from _text_file(file, name, tally)
        elif file.name.endswith(".parquet"):
            yield from _records(_parquet_records(file, source.text_column, tally), name, source.text_column, tally)
        else:
            yield from _records(_json_records(file, tally), name, source.text_column, tally)


def _files(source: SourceConfig) -> list[Path]:
    path = Path(source.path or "")
    if source.path is None or not path.exists():
        raise UserError(
            f"data.sources.{source.name}.path={source.path} does not exist; set it to a folder or a file ({', '.join(SUFFIXES)})"
        )
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in found if file.name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"data.sources.{source.name}.path={source.path} holds no file that we read; it needs {', '.join(SUFFIXES)}")
    return files


def _text_file(file: Path, name: str, tally: Tally) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        text = None
    yield from _checked(name, text, tally)


def _checked(name: str, text: object, tally: Tally) -> Iterator[Document]:
    """The document, or a count of one more broken record."""
    if isinstance(text, str) and text.strip():
        yield Document(name, text)
    else:
        tally.broken += 1


def _records(records: Iterable[Any], name: str, column: str, tally: Tally) -> Iterator[Document]:
    for number, record in enumerate(records):
        yield from _checked(f"{name}:{number}", record.get(column) if isinstance(record, dict) else None, tally)


def _json_records(file: Path, tally: Tally) -> Iterator[Any]:
    """One value a line; None stands for a line that is no JSON. A compressed file that breaks off counts once and ends there."""
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield _parsed(line)
    except (OSError, EOFError):
        tally.broken += 1


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # not UTF-8, or not JSON
        return None


def _parquet_records(file: Path, column: str, tally: Tally) -> Iterator[Any]:
    """Rows with the text column alone. A file that cannot be read, or lacks the column, counts once."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(file).iter_batches(_ROWS_AT_A_TIME, columns=[column]):
            yield from batch.to_pylist()
    except (ArrowException, OSError):
        tally.broken += 1


def _read_hub(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """A Hugging Face dataset without a script, streamed; or a local folder that ``datasets`` understands.

    Options: ``allow_download`` (nothing is downloaded by surprise), ``config``, ``split``, ``revision``.
    """
    options = take_options(source, allow_download=False, config=None, split="train", revision=None)
    if source.path is None:
        raise UserError(f"data.sources.{source.name}.path is not set; set it to the id of a dataset")
    if not options["allow_download"] and not Path(source.path).exists():
        raise UserError(
            f"data.sources.{source.name}.path={source.path} would be downloaded; set "
            f"data.sources.{source.name}.options.allow_download=true, or give a local folder"
        )
    if any(Path(source.path).glob("*.txt")):  # `datasets` would make a document of every line
        raise UserError(f"data.sources.{source.name}.path={source.path} holds text files; set kind=folder, which reads one document a file")
    yield from _records(_hub_rows(source.name, source.path, options), options["split"], source.text_column, tally)


def _hub_rows(name: str, path: str, options: dict[str, Any]) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(path, name=options["config"], split=options["split"], revision=options["revision"], streaming=True)
    except Exception as error:  # unknown, gated, a script, no such split, no network: of four libraries' own kinds, without a common base
        offline = f" (HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']} is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"data.sources.{name}.path={path} cannot be read as a dataset{offline}: {why}; log in where it is gated, or set path "
            "to a local copy"
        ) from error


def _read_custom(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Whatever an instance of the class ``target`` yields: pairs of a stable id and a text. Options: the class' own arguments."""
    target = _target(source)
    try:
        pairs = iter(target(**source.options))
    except TypeError as error:  # an argument that it does not take, or no __iter__
        raise UserError(
            f"data.sources.{source.name}.target={source.target} cannot be built with options {dict(source.options)} and iterated over: "
            f"{error}; give the options that it takes"
        ) from error
    for pair in pairs:
        name, text = pair if isinstance(pair, tuple) and len(pair) == 2 else ("", None)
        yield from _checked(str(name), text, tally)


def _target(source: SourceConfig) -> Callable[..., Iterable[Any]]:
    module, _, name = (source.target or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module before the dot
        raise UserError(
            f"data.sources.{source.name}.target={source.target} cannot be imported ({error}); set it to package.module.Class of a package "
            "on PYTHONPATH"
        ) from error


READERS: dict[str, Reader] = {"stdlib": _read_stdlib, "folder": _read_folder, "hub": _read_hub, CUSTOM: _read_custom}
