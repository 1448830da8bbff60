"""Where documents come from: a kind of source lists its input as shards, and reads a shard as documents.

Choice: the list of shards is all that decides who reads what, so many processes read one source and a later run finds the same shards. A
source that yields nothing is an error. What files hold is lr2train.data.ingest.formats' affair. Cost: what cannot be listed (a class of one's own,
a data set of another format) is one shard, read by one process.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.config import SourceConfig, UserError
from lr2train.data.batch import WINDOWS
from lr2train.data.ingest import broken_share
from lr2train.data.ingest.find_files import Found, Listing, find, reasons_in_words
from lr2train.data.ingest.formats import SUFFIXES, read_files, read_text, shards_of
from lr2train.data.ingest.records import (
    HUB,
    InputFile,
    InputSplit,
    ReadCounts,
    SourceDocument,
    checked,
    of_record,
    printable,
    size_of,
)  # fmt: skip
from lr2train.io import fingerprint, read_json

CUSTOM, FOLDER, HUB_KIND = "custom", "folder", "hub"
PART = "#"  # in an id, before a part of a document: parts are held out as their whole is
SHARD_BYTES = 64 << 20
_DATASETS = "datasets/"
_DEFINITION = re.compile(r"^(?:[ ]{4})?(?:@[^\n]*\n\s*)*(?:async def|def|class) ", re.MULTILINE)


class Kind(NamedTuple):
    """A kind of source: how its input is listed, and how a shard of it is read."""

    listing: Callable[[SourceConfig, int], Listing]
    read: Callable[[SourceConfig, InputSplit, ReadCounts], Iterator[SourceDocument]]


@dataclass(frozen=True)
class Limits:
    """How much may still be read; None is everything."""

    documents: int | None = None
    text_bytes: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, source: SourceConfig) -> Limits:
        """A source's own."""
        return cls(source.max_documents, source.max_bytes, source.max_tokens)

    def admit(self, documents: Iterable[SourceDocument], tally: ReadCounts) -> Iterator[SourceDocument]:
        """The documents within the limits on documents and bytes, counted. They end before the first that would exceed one."""
        for document in documents:
            size = len(document.data)
            if tally.documents == self.documents or (self.text_bytes is not None and tally.text_bytes + size > self.text_bytes):
                tally.limited = True
                return
            tally.documents += 1
            tally.text_bytes += size
            yield document


def read(source: SourceConfig, tally: ReadCounts, listed: Iterable[InputSplit] | None = None) -> Iterator[SourceDocument]:
    """Documents of a source in its fixed order, up to its ``max_documents`` and ``max_bytes``; the tally counts along.

    Args:
        listed: its shards; None lists them.

    Raises:
        UserError: unknown kind or option, a path that is not there, or nothing to read.
    """
    listed = listing(source, SHARD_BYTES).shards if listed is None else listed
    documents = (document for shard in listed for document in read_shard(source, shard, tally))
    yield from Limits.of(source).admit(documents, tally)
    if not tally.documents:
        raise broken_share.nothing(source, tally.reasons, tally.columns)


def listing(source: SourceConfig, shard_bytes: int) -> Listing:
    """The parts of a source's input in order, of about ``shard_bytes`` or less where their format can be cut.

    Raises:
        UserError: unknown kind or option, a path that is not there, or more than its ``max_broken_share`` cannot be opened.
    """
    made = kind_of(source).listing(source, shard_bytes)
    broken_share.refuse_unread(source, made.found)
    return made


def shards(source: SourceConfig, shard_bytes: int) -> list[InputSplit]:
    """The shards of a ``listing`` alone."""
    return listing(source, shard_bytes).shards


def read_shard(source: SourceConfig, shard: InputSplit, tally: ReadCounts) -> Iterator[SourceDocument]:
    """Documents of a shard in their fixed order, whatever the source's limits; broken records go to the tally."""
    return kind_of(source).read(source, shard, tally)


def check(source: SourceConfig) -> None:
    """Refuse a source of text that cannot be read, before anything is.

    Raises:
        UserError: unknown kind or window, a limit that lets nothing through, or a ``target`` that is not there.
    """
    kind_of(source)
    check_windows(source)
    for key in ("max_documents", "max_bytes", "max_tokens", "max_document_bytes"):
        limit = getattr(source, key)
        if limit is not None and limit < 1:
            raise UserError(f"data.sources.{source.name}.{key}={limit} is below 1; set it to 1 or more, or to null to read all")
    if not 0.0 <= source.max_broken_share <= 1.0:
        raise UserError(
            f"data.sources.{source.name}.max_broken_share={source.max_broken_share} is not between 0 and 1; set it inside these limits"
        )
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


def kind_of(source: SourceConfig) -> Kind:
    """What a source's kind does.

    Raises:
        UserError: there is none.
    """
    if source.kind not in KINDS:
        raise UserError(
            f"data.sources.{source.name}: kind={source.kind} is not one of {', '.join(sorted(KINDS))}, needles; set kind to one of them"
        )
    return KINDS[source.kind]


def identity(source: SourceConfig, listed: Sequence[InputSplit]) -> str:
    """What decides a source's documents beside its config, as far as one glance tells: names and sizes of files, commits, the Python version.

    Times and places do not count: ``stamps`` has them. Of a custom class nothing is known.
    """
    files = dict.fromkeys(file for shard in listed for file in shard.files)
    values = [[file.place] if file.place.startswith(HUB) else [file.name, size_of(file)] for file in files]
    return fingerprint([sys.version if source.kind == "stdlib" else "", values]) if files else ""


def stamps(listed: Iterable[InputSplit]) -> list[str]:
    """By which the local files of each shard are known again without reading them: places, sizes and times."""
    real: dict[str, str] = {}  # of folders, which hold many files

    def stamp(place: str) -> list[Any]:
        folder, name = os.path.split(place)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        about = os.stat(place)
        return [real[folder], name, about.st_size, about.st_mtime_ns]

    return [fingerprint([stamp(file.place) for file in shard.files if not file.place.startswith(HUB)]) for shard in listed]


def shape(shard: InputSplit) -> list[Any]:
    """Which part of a source's input a shard is, wherever that lies."""
    files = [file.place if file.place.startswith(HUB) else file.name for file in shard.files]
    return [files, shard.start, shard.stop]


def settled(source: SourceConfig) -> SourceConfig:
    """A source whose path says the same in every folder."""
    local = source.path is not None and is_local(source)
    return replace(source, path=os.path.abspath(source.path or "")) if local else source


def is_local(source: SourceConfig) -> bool:
    """Whether its path leads to files of this machine."""
    return source.kind == FOLDER or (source.kind == HUB_KIND and source.path is not None and os.path.lexists(source.path))


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


def _stdlib_listing(source: SourceConfig, shard_bytes: int) -> Listing:
    """The .py files of the library, those of a folder before those of its folders; installed packages are not the library's."""
    skipped = {"site-packages", "dist-packages", "__pycache__"} | (set() if _stdlib_options(source)["tests"] else {"test", "tests"})
    found = find(Path(sysconfig.get_path("stdlib")), lambda place: place.endswith(".py"), skipped)
    files = sorted(found.files, key=lambda file: [(1, folder) for folder in file.name.split("/")[:-1]] + [(0, file.name)])
    return Listing(shards_of(files, shard_bytes), replace(found, others={}))


def _stdlib_options(source: SourceConfig) -> dict[str, Any]:
    options = take_options(source, unit="module", tests=False)
    if options["unit"] not in ("module", "definition"):
        raise UserError(
            f"data.sources.{source.name}.options.unit={options['unit']} is not one of module, definition; set it to one of them"
        )
    return options


def _read_stdlib(source: SourceConfig, shard: InputSplit, tally: ReadCounts) -> Iterator[SourceDocument]:
    """Source code of the running Python's standard library: real documents of 1k to 300k tokens on every machine, without a download.

    Options: ``unit``: module (a file) or definition (a function, method or class head; short documents); ``tests`` adds the library's own
    tests (half of all its text, and missing on some systems).
    """
    whole = _stdlib_options(source)["unit"] == "module"
    for file in shard.files:
        modules = read_text(file, source.max_document_bytes, tally)
        yield from modules if whole else (part for module in modules for part in _definitions(module))


def _definitions(module: SourceDocument) -> Iterator[SourceDocument]:
    """A module cut where a function, method or class begins, its decorators included."""
    starts = [match.start() for match in _DEFINITION.finditer(module.text)]
    stops = [*starts[1:], len(module.text)]
    for number, (start, stop) in enumerate(zip(starts, stops, strict=False)):
        text = module.text[start:stop]
        yield SourceDocument(f"{module.id}{PART}{number}", text, text.encode())


def _folder_listing(source: SourceConfig, shard_bytes: int) -> Listing:
    """Every .txt (one document), .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .arrow (one a record) under a folder, sorted; or one such file.

    Raises:
        UserError: there is nothing that we read.
    """
    take_options(source)
    key, kinds = f"data.sources.{source.name}.path={source.path}", ", ".join(SUFFIXES)
    path = Path(source.path or "")
    try:
        if source.path is None:
            raise FileNotFoundError
        path.stat()
    except PermissionError:
        raise UserError(f"{key} lies in a folder that may not be opened by this user; make it readable") from None
    except OSError:
        raise UserError(f"{key} does not exist; set it to a folder or a file ({kinds})") from None
    found = find(path, _is_read)
    if not any(_is_read(file.place) for file in found.files[:1]):
        unread = found.about_unread()
        closed = f" ({reasons_in_words(unread['reasons'], unread['examples'])})" if found.unread else ""
        raise UserError(f"{key} holds no file that we read{closed}; it needs {kinds}")
    return Listing(shards_of(found.files, shard_bytes), found)


def _read_folder(source: SourceConfig, shard: InputSplit, tally: ReadCounts) -> Iterator[SourceDocument]:
    return read_files(shard, source.text_column, source.max_document_bytes, tally)


def _is_read(place: str) -> bool:
    return place.lower().endswith(SUFFIXES) and _of_the_data_set(Path(place))


def _of_the_data_set(file: Path) -> bool:
    """Whether an .arrow file holds records of the set: what `datasets` saved lists its own in state.json, and caches lie beside them."""
    state = file.parent / "state.json"
    if not file.name.endswith(".arrow") or not state.is_file():
        return True
    return any(one.get("filename") == file.name for one in read_json(state).get("_data_files", []))


def _hub_options(source: SourceConfig) -> dict[str, Any]:
    return take_options(source, allow_download=False, config=None, split="train", revision=None, streaming=False)


def _hub_listing(source: SourceConfig, shard_bytes: int) -> Listing:
    """The files of a data set's splits; a set whose files we do not read ourselves is one shard for `datasets`.

    `datasets` leaves out in silence what it may not open of a local copy, so we look through that ourselves.

    Raises:
        UserError: it would be downloaded without leave, or cannot be read.
    """
    options = _hub_options(source)
    if source.path is None:
        raise UserError(f"data.sources.{source.name}.path is not set; set it to the id of a dataset")
    if not options["allow_download"] and not Path(source.path).exists():
        raise UserError(
            f"data.sources.{source.name}.path={source.path} would be downloaded; set "
            f"data.sources.{source.name}.options.allow_download=true, or give a local folder"
        )
    if any(Path(source.path).glob("*.txt")):  # `datasets` would make a document of every line
        raise UserError(f"data.sources.{source.name}.path={source.path} holds text files; set kind=folder, which reads one document a file")
    files = _hub_files(source, options)
    found = replace(find(Path(source.path), _is_read), others={}, again=[]) if Path(source.path).is_dir() else Found()
    if files and all(file.kind.endswith(SUFFIXES) for file in files):
        return Listing(shards_of(files, shard_bytes), found)
    return Listing([InputSplit("+".join(_splits(options)), tuple(files))], found)


def _splits(options: dict[str, Any]) -> list[str]:
    return [options["split"]] if isinstance(options["split"], str) else list(options["split"])


def _hub_files(source: SourceConfig, options: dict[str, Any]) -> list[InputFile]:
    """The files of the splits, at one commit: what `datasets` finds for the data set's config."""
    from datasets import load_dataset_builder

    with _named(source):
        found = load_dataset_builder(source.path or "", name=options["config"], revision=options["revision"]).config.data_files or {}
        missing = [split for split in _splits(options) if split not in found]
        if missing:
            raise ValueError(f"it has no split {missing[0]}, only {', '.join(map(str, found))}")
        places = [str(place) for split in _splits(options) for place in found[split]]
    return [InputFile(_hub_name(place, source.path or ""), place) for place in places]


def _hub_name(place: str, path: str) -> str:
    """A file's name inside its repository or folder."""
    if place.startswith(HUB):
        return place.partition("@")[2].partition("/")[2]
    return Path(place).relative_to(path).as_posix() if Path(place).is_relative_to(path) else Path(place).name


@contextmanager
def _named(source: SourceConfig) -> Iterator[None]:
    """Whatever the libraries of the hub raise becomes a sentence with the source's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # unknown, gated, a script, no such split, no network: of four libraries' own kinds, without a common base
        offline = f" (HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']} is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"data.sources.{source.name}.path={source.path} cannot be read as a dataset{offline}: {why}; log in where it is gated, or set path "
            "to a local copy"
        ) from error


def _read_hub(source: SourceConfig, shard: InputSplit, tally: ReadCounts) -> Iterator[SourceDocument]:
    """A Hugging Face dataset without a script, or a local folder that ``datasets`` understands.

    Options: ``allow_download`` (nothing is downloaded by surprise), ``config``, ``split`` (one or a list), ``revision``, ``streaming`` (read
    files as they come instead of keeping them in the hub's cache).
    """
    options = _hub_options(source)
    if shard.files and all(file.kind.endswith(SUFFIXES) for file in shard.files):
        here = shard if options["streaming"] else shard._replace(files=tuple(_downloaded(source, file) for file in shard.files))
        with _named(source):
            yield from read_files(here, source.text_column, source.max_document_bytes, tally)
        return
    for split in _splits(options):
        for number, record in enumerate(_hub_rows(source, split, options)):
            yield from of_record(f"{split}:{number}", record, source.text_column, source.max_document_bytes, tally)


def _downloaded(source: SourceConfig, file: InputFile) -> InputFile:
    """A file of the hub in the local cache, at the commit that it was listed at."""
    if not file.place.startswith(HUB):
        return file
    from huggingface_hub import hf_hub_download

    repo, _, rest = file.place.removeprefix(HUB + _DATASETS).partition("@")
    revision, _, name = rest.partition("/")
    with _named(source):
        return InputFile(file.name, hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def _hub_rows(source: SourceConfig, split: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    with _named(source):
        yield from load_dataset(source.path or "", name=options["config"], split=split, revision=options["revision"], streaming=True)  # type: ignore[misc]


def _one_shard(source: SourceConfig, shard_bytes: int) -> Listing:
    return Listing([InputSplit(source.name, ())], Found())


def _read_custom(source: SourceConfig, shard: InputSplit, tally: ReadCounts) -> Iterator[SourceDocument]:
    """Whatever an instance of the class ``target`` yields: pairs of a stable id and a text. Options: the class' own arguments."""
    target = _target(source)
    try:
        pairs = iter(target(**source.options))
    except TypeError as error:  # an argument that it does not take, or no __iter__
        raise UserError(
            f"data.sources.{source.name}.target={source.target} cannot be built with options {dict(source.options)} and iterated over: "
            f"{error}; give the options that it takes"
        ) from error
    for number, pair in enumerate(pairs):
        id, text = pair if isinstance(pair, tuple) and len(pair) == 2 else (f"{source.target}:{number}", None)
        yield from checked(printable(str(id)), text, source.max_document_bytes, tally)


def _target(source: SourceConfig) -> Callable[..., Iterable[Any]]:
    module, _, name = (source.target or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module before the dot
        raise UserError(
            f"data.sources.{source.name}.target={source.target} cannot be imported ({error}); set it to package.module.Class of a package "
            "on PYTHONPATH"
        ) from error


KINDS: dict[str, Kind] = {
    "stdlib": Kind(_stdlib_listing, _read_stdlib),
    FOLDER: Kind(_folder_listing, _read_folder),
    HUB_KIND: Kind(_hub_listing, _read_hub),
    CUSTOM: Kind(_one_shard, _read_custom),
}
