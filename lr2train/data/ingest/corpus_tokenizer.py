"""The tokenizer of a corpus: a copy of ``data.tokenizer``, or one that is trained on the corpus' own sources.

Choice: the library that learns merges returns only when it is done, and does not react to Ctrl-C. So it runs in a
process of its own, which reads the sources itself, reports its progress and ends with its parent. Cost: that process
imports its modules anew, about two seconds; a small amount of text is therefore learned from in the calling process.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lr2train.config import DataConfig, SourceConfig, UserError
from lr2train.data import tokenizer as tokenizers
from lr2train.data.corpus import TOKENIZER, reopen
from lr2train.data.ingest import sources
from lr2train.data.ingest.find_files import SourceInput
from lr2train.data.ingest.records import InputSplit, ReadCounts
from lr2train.data.ingest.text_source import config_without
from lr2train.data.ingest.workers import ReportProgress, WorkerPool
from lr2train.data.needles import sentences
from lr2train.data.store import TRAIN
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import read_json, write_json
from lr2train.progress import meter

_LITTLE = 2_000_000  # characters that are learned from in a second or two
_REPORT_S = 0.5


def ensure_tokenizer(
    folder: Path,
    data: DataConfig,
    inputs: dict[str, SourceInput],
    log: Callable[[str], None],
) -> Tokenizer:
    """The corpus' tokenizer in ``folder/tokenizer``, made unless it is there.

    Raises:
        UserError: ``data.tokenizer`` is unusable, a source has no text, or documents of another tokenizer are there.
    """
    splits = {name: source_input.splits for name, source_input in inputs.items()}
    wanted = _fingerprint(data, splits)
    stamp = "" if data.tokenizer else fingerprint_of([sources.stamps(of_source) for of_source in splits.values()])
    target, manifest = folder / TOKENIZER, folder / f"{TOKENIZER}.manifest.json"
    found = read_json(manifest) if manifest.exists() else {}
    has_documents = any(folder.glob(f"store/*/{TRAIN}-*.json"))
    if found.get("fingerprint") == wanted and (target / "tokenizer.json").exists():
        # with documents there, touched files do not matter: each source compares the text of its own documents
        if has_documents or found.get("stamp") == stamp:
            tokenizer = tokenizers.load(str(target))
            if tokenizer.fingerprint == found["tokenizer"]:
                return tokenizer
    elif found and found["fingerprint"] != wanted and has_documents:
        what = f"data.tokenizer={data.tokenizer}" if data.tokenizer else "the text that the tokenizer is trained on"
        why = f"because {what} has changed"
        raise UserError(f"{folder} holds documents of another tokenizer, {why}; choose another name= to tokenise again")
    reopen(folder)
    manifest.unlink(missing_ok=True)
    started = time.monotonic()
    if data.tokenizer:
        tokenizers.load(data.tokenizer).save(target)
    else:
        train_tokenizer(_training_text(data, splits), target)
    tokenizer = tokenizers.load(str(target))
    if not data.tokenizer:
        log(f"trained a tokenizer of {tokenizer.vocab_size} entries in {time.monotonic() - started:.1f} s")
    write_json(manifest, {"fingerprint": wanted, "stamp": stamp, "tokenizer": tokenizer.fingerprint})
    return tokenizer


def _fingerprint(data: DataConfig, splits: dict[str, list[InputSplit]]) -> str:
    """A digest of everything that decides the tokenizer."""
    if data.tokenizer:
        return fingerprint_of(tokenizers.load(data.tokenizer).fingerprint)
    recipes: list[Any] = [
        [
            config_without(source, "weight", "max_broken_share"),
            sources.identity(source, splits.get(source.name, [])),
        ]
        for source in data.sources
    ]
    return fingerprint_of([data.vocab_size, data.tokenizer_train_bytes, data.needles.wording, recipes])


@dataclass(frozen=True)
class TrainingText:
    """The text that a tokenizer is trained on.

    Attributes:
        sources: sources of text with their input splits.
        characters_per_source: at most, from the beginning of each source.
        needle_wording: whose sentences are learned from too; None where the corpus has no needles.
        vocab_size: entries in all.
    """

    sources: list[tuple[SourceConfig, list[InputSplit]]]
    characters_per_source: int
    needle_wording: str | None
    vocab_size: int

    @property
    def characters(self) -> int:
        """Estimate of all characters."""
        most, total = self.characters_per_source, 0
        for source, splits in self.sources:
            total += min(most, source.max_bytes or most, sum(split.size_bytes for split in splits) or most)
        return total


def _training_text(data: DataConfig, splits: dict[str, list[InputSplit]]) -> TrainingText:
    texts = [(source, splits[source.name]) for source in data.sources if source.kind != sources.NEEDLES]
    has_needles = len(texts) < len(data.sources)
    wording = data.needles.wording if has_needles else None
    return TrainingText(texts, data.tokenizer_train_bytes // len(texts), wording, data.vocab_size)


def train_tokenizer(text: TrainingText, folder: Path) -> None:
    """Train a tokenizer and save it into a folder.

    Raises:
        UserError: the vocabulary is too small, a source has nothing to read, or the process died.
    """
    characters = float(max(text.characters, 1))
    n_processes = 1 if characters <= _LITTLE else 2  # a pool of one works in this process; there is a single task
    tasks = iter([folder])
    pool = WorkerPool[Path](partial(_Trainer, text), n_processes, lambda _: "the training of the tokenizer", alone=True)
    with pool as workers, meter("train the tokenizer") as tick:
        for _ in workers.run(
            lambda: next(tasks, None),
            lambda _, read: tick(min(read / characters, 1.0), 1.0, f"{read / 1e6:.1f} MB read"),
        ):
            pass


class _Trainer:
    """Trains a tokenizer into the folder that it is called with."""

    def __init__(self, text: TrainingText) -> None:
        self._text, self._read = text, 0  # characters

    def __call__(self, folder: Path, report: ReportProgress) -> None:
        of_sources = chain.from_iterable(self._beginning(*source) for source in self._text.sources)
        of_needles = sentences(self._text.needle_wording) if self._text.needle_wording else ()
        with _reporting(lambda: report(self._read)):
            tokenizers.train(self._counted(chain(of_sources, of_needles)), self._text.vocab_size).save(folder)

    def _beginning(self, source: SourceConfig, splits: list[InputSplit]) -> Iterator[str]:
        """Documents of a source until they add up to ``characters_per_source``."""
        read = 0
        for document in sources.read_source(source, ReadCounts(), splits):
            yield document.text
            read += len(document.text)
            if read >= self._text.characters_per_source:
                return

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self._read += len(text)


@contextlib.contextmanager
def _reporting(report: Callable[[], None]) -> Iterator[None]:
    """A thread reports while the block runs: the library in the block does not return before its end."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_REPORT_S):
            report()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
