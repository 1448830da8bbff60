"""The kinds of sources that need no network: a folder of files, the standard library, a user's own class.

Each kind has two functions: ``list_…`` returns the input in splits, ``read_…`` yields the documents of a split.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lr2train.config import SourceConfig, UserError
from lr2train.config.plugins import plugin
from lr2train.data.ingest.find_files import FoundFiles, SourceInput, find_files, reasons_in_words
from lr2train.data.ingest.formats import SUFFIXES, input_splits, is_read, read_files, read_text
from lr2train.data.ingest.records import InputFile, InputSplit, ReadCounts, SourceDocument, document_of_text, printable

PART = "#"  # in an id, before the number of a part: parts of a module are held out together
_DEFINITION = re.compile(r"^(?:[ ]{4})?(?:@[^\n]*\n\s*)*(?:async def|def|class) ", re.MULTILINE)


def take_options(source: SourceConfig, **defaults: Any) -> dict[str, Any]:
    """A source's options over their defaults.

    Raises:
        UserError: an option that its kind does not have.
    """
    unknown = sorted(set(source.options) - set(defaults))
    if unknown:
        known = ", ".join(defaults) or "none"
        raise UserError(
            f"data.sources.{source.name}.options.{unknown[0]} is not an option of kind={source.kind} ({known}); "
            "remove it or correct its name"
        )
    return {**defaults, **source.options}


# kind: folder


def list_folder(source: SourceConfig, split_bytes: int) -> SourceInput:
    """All files below a folder whose suffix is read (``formats.SUFFIXES``), sorted by name; or one such file.

    Raises:
        UserError: the path does not exist, is not readable, or holds no such file.
    """
    take_options(source)
    key, suffixes = f"data.sources.{source.name}.path={source.path}", ", ".join(SUFFIXES)
    path = Path(source.path or "")
    try:
        if source.path is None:
            raise FileNotFoundError
        path.stat()
    except PermissionError:
        raise UserError(f"{key} lies in a folder that may not be opened by this user; make it readable") from None
    except OSError:
        raise UserError(f"{key} does not exist; set it to a folder or a file ({suffixes})") from None
    found = find_files(path, is_read)
    if not any(is_read(file.location) for file in found.files[:1]):  # a single file is found whatever its suffix
        unread = found.unread_report()
        closed = f" ({reasons_in_words(unread['reasons'], unread['examples'])})" if found.unread else ""
        raise UserError(f"{key} holds no file that we read{closed}; it needs {suffixes}")
    return SourceInput(input_splits(found.files, split_bytes), found)


def read_folder(source: SourceConfig, split: InputSplit, counts: ReadCounts) -> Iterator[SourceDocument]:
    """Documents of some files."""
    return read_files(split, source.text_column, source.max_document_bytes, counts)


# kind: stdlib


def _stdlib_options(source: SourceConfig) -> dict[str, Any]:
    options = take_options(source, unit="module", tests=False)
    key, unit = f"data.sources.{source.name}.options.unit", options["unit"]
    if unit not in ("module", "definition"):
        raise UserError(f"{key}={unit} is not one of module, definition; set it to one of them")
    return options


def list_stdlib(source: SourceConfig, split_bytes: int) -> SourceInput:
    """The .py files of the standard library without installed packages.

    The files of a folder come before its subfolders.
    """
    skipped_folders = {"site-packages", "dist-packages", "__pycache__"}
    if not _stdlib_options(source)["tests"]:
        skipped_folders |= {"test", "tests"}
    found = find_files(Path(sysconfig.get_path("stdlib")), lambda path: path.endswith(".py"), skipped_folders)

    def folders_last(file: InputFile) -> list[tuple[int, str]]:
        *folders, _ = file.name.split("/")
        return [*((1, folder) for folder in folders), (0, file.name)]

    files = sorted(found.files, key=folders_last)
    return SourceInput(input_splits(files, split_bytes), replace(found, others={}))


def read_stdlib(source: SourceConfig, split: InputSplit, counts: ReadCounts) -> Iterator[SourceDocument]:
    """Source code of the running Python: real documents of 1k to 300k tokens on every machine, without a download.

    Options: ``unit`` is ``module`` (a file) or ``definition`` (a function, method or class head: short documents).
    ``tests`` adds the library's own tests, half of its text and missing on some systems.
    """
    whole_modules = _stdlib_options(source)["unit"] == "module"
    for file in split.files:
        modules = read_text(file, source.max_document_bytes, counts)
        yield from modules if whole_modules else (part for module in modules for part in _definitions(module))


def _definitions(module: SourceDocument) -> Iterator[SourceDocument]:
    """A module cut where a function, method or class begins, its decorators included."""
    starts = [match.start() for match in _DEFINITION.finditer(module.text)]
    stops = [*starts[1:], len(module.text)]
    for number, (start, stop) in enumerate(zip(starts, stops, strict=False)):
        text = module.text[start:stop]
        yield SourceDocument(f"{module.id}{PART}{number}", text, text.encode())


# kind: custom


def list_custom(source: SourceConfig, split_bytes: int) -> SourceInput:
    """One split: the input of a user's own class is unknown."""
    return SourceInput([InputSplit(source.name, ())], FoundFiles())


def read_custom(source: SourceConfig, split: InputSplit, counts: ReadCounts) -> Iterator[SourceDocument]:
    """Pairs (stable id, text) that an instance of the class ``target`` yields. Options: the arguments of the class.

    Raises:
        UserError: the class cannot be imported, built or iterated over.
    """
    target = import_target(source)
    try:
        pairs = iter(target(**source.options))
    except TypeError as error:  # an unknown argument, or no __iter__
        raise UserError(
            f"data.sources.{source.name}.target={source.target} cannot be built with options "
            f"{dict(source.options)} and iterated over: {error}; give the options that it takes"
        ) from error
    for number, pair in enumerate(pairs):
        id, text = pair if isinstance(pair, tuple) and len(pair) == 2 else (f"{source.target}:{number}", None)
        yield from document_of_text(printable(str(id)), text, source.max_document_bytes, counts)


def import_target(source: SourceConfig) -> Callable[..., Iterable[Any]]:
    """The class that ``target`` names.

    Raises:
        UserError: the class cannot be imported.
    """
    return plugin(source.target, f"data.sources.{source.name}.target")
