"""One input split becomes two token shards: a store of its training documents and a store of its held-out documents.

Choice: a worker process does a whole split. Both stores appear whole or not at all, so a kill costs only the splits
that are in work. The manifests are returned to the parent process, which writes them (``manifest_writer``). Cost: a
split is done from its beginning again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lr2train.config import DecontaminateConfig, SourceConfig
from lr2train.data import store
from lr2train.data import tokenizer as tokenizers
from lr2train.data.corpus import store_prefix
from lr2train.data.ingest import sources, tokenizer_backend
from lr2train.data.ingest.decontaminate import EvaluationNgrams
from lr2train.data.ingest.records import InputSplit, ReadCounts, SourceDocument
from lr2train.data.ingest.source_kinds import PART
from lr2train.data.ingest.sources import SourceLimits
from lr2train.data.ingest.workers import ReportProgress
from lr2train.data.plan import buckets
from lr2train.data.store import HOLDOUT, TRAIN

_BATCH_BYTES = 1 << 21  # of text that is tokenised at one time
_MAX_EXAMPLES = 3  # of contaminated documents, in one split
_REPORT_EVERY = 1000  # documents


class SplitTask(NamedTuple):
    """One input split to tokenise, under what is left of its source's limits.

    Attributes:
        source: its config.
        split: the input.
        number: of the split in its source, and of its token shards.
        fingerprint: of everything that decides the tokens.
        limits: what may still be read.
        stamp: of the split's files when they were listed (``sources.stamps``).
        made_before: the manifest of finished shards, where the task is only to compare their documents with the input.
    """

    source: SourceConfig
    split: InputSplit
    number: int
    fingerprint: str
    limits: SourceLimits
    stamp: str = ""
    made_before: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenizeSettings:
    """The settings that every worker process needs.

    Attributes:
        folder: the run folder.
        tokenizer: the corpus' tokenizer folder.
        backend: ``hf`` or ``gigatoken``.
        strict: the config asks for gigatoken by name: a disagreement is an error, and the split is not done again
            without it.
        holdout: share of documents kept out of training.
        original_window_tokens: L0. It decides which documents a source of one window keeps.
        decontaminate: evaluation sets.
    """

    folder: Path
    tokenizer: Path
    backend: str
    strict: bool
    holdout: float
    original_window_tokens: int
    decontaminate: DecontaminateConfig


class SplitTokenizer:
    """Does ``SplitTask``s, one after another."""

    def __init__(self, settings: TokenizeSettings) -> None:
        self._settings = settings
        self._tokenizer = tokenizers.load(str(settings.tokenizer))
        self._encoder = tokenizer_backend.Encoder(self._tokenizer, settings.backend)
        self._evaluation = EvaluationNgrams(settings.decontaminate) if settings.decontaminate.files else None

    def __call__(self, task: SplitTask, report: ReportProgress) -> dict[str, Any]:
        """Tokenise a split.

        Returns:
            The manifest of the training shard, with the manifest of the held-out shard under ``holdout``. Their files
            are written, their manifests are not. For a task that only compares: ``{"same": bool}``.
        """
        if task.made_before is not None:
            return {"same": contents_digest(task, task.made_before, report) == task.made_before["contents"]}
        try:
            return self._tokenise(task, report, "")
        except tokenizer_backend.Disagreement as reason:
            if self._settings.strict:
                raise tokenizer_backend.refusal(reason) from None
            self._encoder = tokenizer_backend.Encoder(self._tokenizer, tokenizer_backend.HF)
            return self._tokenise(task, report, str(reason))

    def _tokenise(self, task: SplitTask, report: ReportProgress, fallback: str) -> dict[str, Any]:
        self._encoder.begin_split()
        reader = _SplitReader(task, report)
        about = {
            "source": task.source.name,
            "shard": task.split.name,
            "fingerprint": task.fingerprint,
            "limits": asdict(task.limits),
            "stamp": task.stamp,
        }
        vocab_size = self._tokenizer.vocab_size
        prefixes = _store_prefixes(self._settings.folder, task)
        train, held = (store.StoreWriter(prefix, vocab_size, about, sealed=False) for prefix in prefixes)
        with train, held:
            for document, tokens in self._tokens(reader):
                writer = held if is_held_out(document.id, self._settings.holdout) else train
                writer.add(tokens, hash=store.text_hash(document.utf8), origin=document.id)
            about.update(reader.counts_for_manifest(), fallback=fallback)  # the writers hold `about` until they close
        return {**train.manifest, "holdout": held.manifest}

    def _tokens(self, reader: _SplitReader) -> Iterator[tuple[SourceDocument, np.ndarray]]:
        """(document, tokens with BOS and EOS) for the source's windows, until its limit of tokens is reached."""
        windows, border = reader.task.source.windows, self._settings.original_window_tokens
        for batch in _batches(self._clean(reader)):
            ids_of_batch = self._encoder.encode([document.text for document in batch])
            for document, ids in zip(batch, ids_of_batch, strict=True):
                tokens = self._tokenizer.bound(ids)
                if buckets.window_of(len(tokens), border) in windows:
                    yield document, tokens
                    reader.tokens += len(tokens)
                    if reader.task.limits.tokens is not None and reader.tokens >= reader.task.limits.tokens:
                        reader.counts.limited = True
                        return
            reader.report(reader.counts.text_bytes)

    def _clean(self, reader: _SplitReader) -> Iterator[SourceDocument]:
        """Documents that share no n-gram with an evaluation set."""
        for document in reader.documents():
            shared = self._evaluation.find(document.text) if self._evaluation else None
            if shared is None:
                yield document
            else:
                reader.count_contaminated(document, shared)


class _SplitReader:
    """Reads the documents of a split within its limits, and counts."""

    def __init__(self, task: SplitTask, report: ReportProgress) -> None:
        self.task, self.report = task, report
        self.counts, self.tokens = ReadCounts(), 0
        self._n_contaminated, self._contaminated = 0, list[dict[str, str]]()
        self._digest = hashlib.blake2b(digest_size=16)

    def documents(self) -> Iterator[SourceDocument]:
        documents = sources.read_split(self.task.source, self.task.split, self.counts)
        for document in self.task.limits.admit(documents, self.counts):
            self._digest.update(f"{len(document.utf8)} {document.id}\n".encode())
            self._digest.update(document.utf8)
            yield document

    @property
    def contents(self) -> str:
        """Digest of the ids and texts of the documents so far: all that the split's tokens come from."""
        return self._digest.hexdigest()

    def count_contaminated(self, document: SourceDocument, shared: str) -> None:
        self._n_contaminated += 1
        if len(self._contaminated) < _MAX_EXAMPLES:
            self._contaminated.append({"origin": document.id, "words": shared})

    def counts_for_manifest(self) -> dict[str, Any]:
        """What was read, left out and lost, by the manifest's keys."""
        counts = self.counts
        return {
            "read_documents": counts.documents,
            "text_bytes": counts.text_bytes,
            "read_tokens": self.tokens,
            "reasons": dict(counts.reasons),
            "rejects": counts.rejects,
            "limited": counts.limited,
            "input_bytes": counts.input_bytes,
            "lost_bytes": counts.lost_bytes,
            "lost_files": counts.lost_files,
            "columns": counts.columns,
            "contents": self.contents,
            "contaminated": self._n_contaminated,
            "contaminated_examples": self._contaminated,
        }


def contents_digest(task: SplitTask, manifest: dict[str, Any], report: ReportProgress) -> str:
    """The ``contents`` of a split as it is now, read as far as for the manifest and not tokenised."""
    limits = SourceLimits(documents=manifest["read_documents"]) if manifest["limited"] else SourceLimits()
    reader = _SplitReader(task._replace(limits=limits), report)
    for number, _ in enumerate(reader.documents()):
        if number % _REPORT_EVERY == 0:
            report(reader.counts.text_bytes)
    return reader.contents


def _batches(documents: Iterable[SourceDocument]) -> Iterator[list[SourceDocument]]:
    """Documents in lists of about ``_BATCH_BYTES``."""
    batch: list[SourceDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.utf8)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def is_held_out(id: str, share: float) -> bool:
    """Whether a document is kept out of training.

    The hash of its id decides, so the answer depends neither on the process that reads it nor on the other documents.
    All parts of a module have the same answer.
    """
    whole = id.partition(PART)[0]
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "little") < share * 2**64


def _store_prefixes(folder: Path, task: SplitTask) -> list[Path]:
    """Path prefixes of the training and the held-out store."""
    return [store_prefix(folder, task.source.name, split, task.number) for split in (TRAIN, HOLDOUT)]


def finished_manifest(folder: Path, task: SplitTask) -> dict[str, Any] | None:
    """The manifest of a split's finished shards, the held-out one under ``holdout``; None where they are missing."""
    train, held = (store.finished(prefix, task.fingerprint) for prefix in _store_prefixes(folder, task))
    return None if train is None or held is None else {**train, "holdout": held}
