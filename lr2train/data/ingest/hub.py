"""kind: hub. Data sets of the Hugging Face hub, or a local copy in the same form.

Choice: `datasets` resolves the config, the split and the commit to a list of files, and we read these files ourselves,
so that many processes share them and every record has a stable name. Nothing is downloaded without ``allow_download``.
Cost: a data set in another format (.csv …) is one input split, streamed by `datasets`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.find_files import FoundFiles, SourceInput, find_files
from lr2train.data.ingest.formats import SUFFIXES, input_splits, is_read, read_files
from lr2train.data.ingest.records import (
    HUB_SCHEME,
    InputFile,
    InputSplit,
    ReadCounts,
    SourceDocument,
    document_of_record,
)
from lr2train.data.ingest.source_kinds import take_options

_DATASETS = "datasets/"  # begins the path of a data set's file below HUB_SCHEME


def _options(source: SourceConfig) -> dict[str, Any]:
    return take_options(source, allow_download=False, config=None, split="train", revision=None, streaming=False)


def _data_splits(options: dict[str, Any]) -> list[str]:
    """Names of the data set's own splits, such as train; not to be confused with input splits."""
    return [options["split"]] if isinstance(options["split"], str) else list(options["split"])


def list_hub(source: SourceConfig, split_bytes: int) -> SourceInput:
    """The files of a data set's splits.

    A local copy is searched as well, because `datasets` silently leaves out files that it may not open.

    Raises:
        UserError: the data set would be downloaded without permission, or cannot be read.
    """
    options = _options(source)
    key = f"data.sources.{source.name}"
    if source.path is None:
        raise UserError(f"{key}.path is not set; set it to the id of a dataset")
    if not options["allow_download"] and not Path(source.path).exists():
        raise UserError(f"{key}.path={source.path} would be downloaded; set {key}.options.allow_download=true")
    if any(Path(source.path).glob("*.txt")):  # `datasets` would make a document of every line
        raise UserError(f"{key}.path={source.path} holds text files; set kind=folder, which reads one document a file")
    files = _resolve_files(source, options)
    found = FoundFiles()
    if Path(source.path).is_dir():
        found = replace(find_files(Path(source.path), is_read), others={}, repeated=[])
    if files and all(file.lower_name.endswith(SUFFIXES) for file in files):
        return SourceInput(input_splits(files, split_bytes), found)
    return SourceInput([InputSplit("+".join(_data_splits(options)), tuple(files))], found)


def _resolve_files(source: SourceConfig, options: dict[str, Any]) -> list[InputFile]:
    """The files of the asked splits at one commit, as `datasets` resolves them."""
    from datasets import load_dataset_builder

    with _errors_in_words(source):
        builder = load_dataset_builder(source.path or "", name=options["config"], revision=options["revision"])
        found = builder.config.data_files or {}
        missing = [split for split in _data_splits(options) if split not in found]
        if missing:
            raise ValueError(f"it has no split {missing[0]}, only {', '.join(map(str, found))}")
        locations = [str(location) for split in _data_splits(options) for location in found[split]]
    return [InputFile(_name(location, source.path or ""), location) for location in locations]


def _name(location: str, path: str) -> str:
    """A file's name inside its repository or folder."""
    if location.startswith(HUB_SCHEME):
        return location.partition("@")[2].partition("/")[2]
    return Path(location).relative_to(path).as_posix() if Path(location).is_relative_to(path) else Path(location).name


def read_hub(source: SourceConfig, split: InputSplit, counts: ReadCounts) -> Iterator[SourceDocument]:
    """Documents of some files of a data set, or of a whole data set in another format.

    Options: ``allow_download``, ``config``, ``split`` (one or a list), ``revision``, ``streaming`` (files are read over
    the network and not kept in the hub's cache).
    """
    options, max_bytes = _options(source), source.max_document_bytes
    if split.files and all(file.lower_name.endswith(SUFFIXES) for file in split.files):
        if not options["streaming"]:
            split = split._replace(files=tuple(_downloaded(source, file) for file in split.files))
        with _errors_in_words(source):
            yield from read_files(split, source.text_column, max_bytes, counts)
        return
    for name in _data_splits(options):
        for number, record in enumerate(_rows(source, name, options)):
            yield from document_of_record(f"{name}:{number}", record, source.text_column, max_bytes, counts)


def _downloaded(source: SourceConfig, file: InputFile) -> InputFile:
    """A file of the hub in the local cache, at the commit of its location."""
    if not file.on_hub:
        return file
    from huggingface_hub import hf_hub_download

    repo, _, rest = file.location.removeprefix(HUB_SCHEME + _DATASETS).partition("@")
    revision, _, name = rest.partition("/")
    with _errors_in_words(source):
        return InputFile(file.name, hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def _rows(source: SourceConfig, name: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    with _errors_in_words(source):
        config, revision = options["config"], options["revision"]
        rows = load_dataset(source.path or "", name=config, split=name, revision=revision, streaming=True)
        yield from rows  # type: ignore[misc]


@contextmanager
def _errors_in_words(source: SourceConfig) -> Iterator[None]:
    """Turn any error of the hub's libraries into a sentence with the source's name.

    Four libraries raise errors without a common base: unknown data set, gated, needs a script, no such split, no
    network.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        setting = f" (HF_HUB_OFFLINE={offline} is set)" if offline else ""
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"data.sources.{source.name}.path={source.path} cannot be read as a dataset{setting}: {reason}; log in "
            "where it is gated, or set path to a local copy"
        ) from error
