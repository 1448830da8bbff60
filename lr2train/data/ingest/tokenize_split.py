"""Stage 1: a source's shards become stores, by several processes, in an order that does not show in the result.

Choice: a shard of the input makes one store of training documents and one of held-out ones, whole or not at all; a kill costs the shards in
hand and nothing else. A source's limits (documents, bytes, tokens) are those of reading it from its beginning: shards are tokenised ahead
under what is left as far as is known, and where a limit turns out to lie inside a shard, that one is done again with exactly what was left.
Cost: at a limit, up to one shard a process is tokenised in vain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lr2train.config import DecontaminateConfig, SourceConfig
from lr2train.data import store
from lr2train.data import tokenizer as tokenizers
from lr2train.data.corpus import store_prefix
from lr2train.data.ingest import sources, tokenizer_backend
from lr2train.data.ingest.decontaminate import Contamination
from lr2train.data.ingest.records import InputSplit, ReadCounts, SourceDocument
from lr2train.data.ingest.sources import Limits
from lr2train.data.ingest.workers import Report
from lr2train.data.plan import buckets
from lr2train.data.store import HOLDOUT, TRAIN

_GROUP_BYTES = 1 << 21  # of text encoded at one time
_EXAMPLES = 3  # of contaminated documents that a shard keeps
_REPORT_EVERY = 1000  # documents


class SplitTask(NamedTuple):
    """One shard to do, under what is left of its source's limits.

    Attributes:
        stamp: of its files when they were listed (``sources.stamps``).
        made_before: its manifest, where the only question is whether its documents are still those that were tokenised.
    """

    source: SourceConfig
    shard: InputSplit
    number: int
    fingerprint: str
    limits: Limits
    stamp: str = ""
    made_before: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenizeSettings:
    """What every process needs; called, it gives what does a task.

    Attributes:
        folder: the run folder.
        tokenizer: its tokenizer folder.
        backend: ``hf`` or ``gigatoken``.
        strict: gigatoken was asked for by name: a disagreement is an error, not a reason to do the shard again without it.
        holdout: share of documents kept out of training.
        original_window_tokens: L0, which decides the documents of a source that is meant for one window.
        decontaminate: evaluation sets.
    """

    folder: Path
    tokenizer: Path
    backend: str
    strict: bool
    holdout: float
    original_window_tokens: int
    decontaminate: DecontaminateConfig

    def __call__(self) -> ShardMaker:
        """In the process that works."""
        return ShardMaker(self)


class ShardMaker:
    """Makes the two stores of a shard."""

    def __init__(self, setup: TokenizeSettings) -> None:
        self._setup = setup
        self._tokenizer = tokenizers.load(str(setup.tokenizer))
        self._encoder = tokenizer_backend.Encoder(self._tokenizer, setup.backend)
        self._contamination = Contamination(setup.decontaminate) if setup.decontaminate.files else None

    def __call__(self, task: SplitTask, report: Report) -> dict[str, Any]:
        """The shard's manifest with the held-out store's under ``holdout``, once their files are there; the manifests are to be written.

        Of a shard that was made before, ``{"same": …}``.
        """
        if task.made_before is not None:
            return {"same": contents(task, task.made_before, report) == task.made_before["contents"]}
        try:
            return self._make(task, report, "")
        except tokenizer_backend.Disagreement as reason:
            if self._setup.strict:
                raise tokenizer_backend.refusal(reason) from None
            self._encoder = tokenizer_backend.Encoder(self._tokenizer, tokenizer_backend.HF)
            return self._make(task, report, str(reason))

    def _make(self, task: SplitTask, report: Report, fallback: str) -> dict[str, Any]:
        self._encoder.begin_shard()
        work = _Reading(task, report)
        about = {"source": task.source.name, "shard": task.shard.name, "fingerprint": task.fingerprint, "limits": asdict(task.limits)}
        about["stamp"] = task.stamp
        vocab_size = self._tokenizer.vocab_size
        prefixes = [store_prefix(self._setup.folder, task.source.name, split, task.number) for split in (TRAIN, HOLDOUT)]
        train, held = (store.StoreWriter(prefix, vocab_size, about, sealed=False) for prefix in prefixes)
        with train, held:
            for document, tokens in self._tokenised(work):
                writer = held if is_held_out(document.id, self._setup.holdout) else train
                writer.add(tokens, hash=store.text_hash(document.data), origin=document.id)
            about.update(work.about(), fallback=fallback)
        return {**train.manifest, "holdout": held.manifest}

    def _tokenised(self, work: _Reading) -> Iterator[tuple[SourceDocument, np.ndarray]]:
        """Documents of the source's windows until its tokens are reached, BOS and EOS included."""
        windows, border = work.task.source.windows, self._setup.original_window_tokens
        for group in _groups(self._clean(work)):
            for document, ids in zip(group, self._encoder.encode([one.text for one in group]), strict=True):
                tokens = self._tokenizer.bound(ids)
                if buckets.window_of(len(tokens), border) in windows:
                    yield document, tokens
                    work.tokens += len(tokens)
                    if work.task.limits.tokens is not None and work.tokens >= work.task.limits.tokens:
                        work.tally.limited = True
                        return
            work.report(work.tally.text_bytes)

    def _clean(self, work: _Reading) -> Iterator[SourceDocument]:
        """Documents that share no run of words with an evaluation set."""
        for document in work.documents():
            found = self._contamination.find(document.text) if self._contamination else None
            if found is None:
                yield document
            else:
                work.contaminated(document, found)


class _Reading:
    """What is counted while a shard is read."""

    def __init__(self, task: SplitTask, report: Report) -> None:
        self.task, self.report = task, report
        self.tally, self.tokens = ReadCounts(), 0
        self._contaminated, self._examples = 0, list[dict[str, str]]()
        self._digest = hashlib.blake2b(digest_size=16)

    def documents(self) -> Iterator[SourceDocument]:
        for document in self.task.limits.admit(sources.read_shard(self.task.source, self.task.shard, self.tally), self.tally):
            self._digest.update(f"{len(document.data)} {document.id}\n".encode())
            self._digest.update(document.data)
            yield document

    @property
    def contents(self) -> str:
        """Stands for the names and the texts of the documents so far, all that a shard's tokens come from."""
        return self._digest.hexdigest()

    def contaminated(self, document: SourceDocument, found: str) -> None:
        self._contaminated += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append({"origin": document.id, "words": found})

    def about(self) -> dict[str, Any]:
        counted = {"read_documents": self.tally.documents, "text_bytes": self.tally.text_bytes, "read_tokens": self.tokens}
        broken = {"reasons": dict(self.tally.reasons), "rejects": self.tally.rejects, "limited": self.tally.limited}
        broken |= {key: getattr(self.tally, key) for key in ("input_bytes", "lost_bytes", "lost_files", "columns")}
        return {**counted, **broken, "contents": self.contents, "contaminated": self._contaminated, "contaminated_examples": self._examples}


def contents(task: SplitTask, made: dict[str, Any], report: Report) -> str:
    """The ``contents`` of a shard's documents, read anew as far as they were read before and not tokenised."""
    limits = Limits(documents=made["read_documents"]) if made["limited"] else Limits()
    reading = _Reading(task._replace(limits=limits), report)
    for number, _ in enumerate(reading.documents()):
        if number % _REPORT_EVERY == 0:
            report(reading.tally.text_bytes)
    return reading.contents


def _groups(documents: Iterable[SourceDocument]) -> Iterator[list[SourceDocument]]:
    """Some megabytes at a time."""
    group: list[SourceDocument] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.data)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is kept out of training: by the hash of its id, so always the same ones, whoever reads them and however many."""
    whole = document.partition(sources.PART)[0]
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "little") < share * 2**64


def finished(folder: Path, task: SplitTask) -> dict[str, Any] | None:
    """What a shard's finished stores say, the held-out one under ``holdout``; None where they are still to be made."""
    about = [store.finished(store_prefix(folder, task.source.name, split, task.number), task.fingerprint) for split in (TRAIN, HOLDOUT)]
    train, held = about
    return None if train is None or held is None else {**train, "holdout": held}


class SplitScheduler:
    """Which shards of a source count under its limits, as if they had been read one after the other.

    Args:
        tasks: all shards, in order, with the source's whole limits.
        made: what finished shards say, by number.
    """

    def __init__(self, tasks: Sequence[SplitTask], made: dict[int, dict[str, Any]]) -> None:
        self._tasks, self._made = tasks, dict(made)
        self._left = tasks[0].limits if tasks else Limits()
        self._given: set[int] = set(made)
        self.settled: list[dict[str, Any]] = []  # manifests of the shards that count, in order
        self.closed = not tasks
        self._settle()

    def draw(self) -> SplitTask | None:
        """A shard to do next, None where there is none (now)."""
        if self.closed:
            return None
        number = next((n for n in range(len(self.settled), len(self._tasks)) if n not in self._given), None)
        if number is None:
            return None
        self._given.add(number)
        return self._tasks[number]._replace(limits=self._left)

    def put(self, task: SplitTask, made: dict[str, Any]) -> None:
        """A shard is done."""
        self._made[task.number] = made
        self._settle()

    def _settle(self) -> None:
        while not self.closed and len(self.settled) in self._made:
            number = len(self.settled)
            made = self._made[number]
            if made["limits"] != asdict(self._left) and (made["limited"] or not self._holds(made)):
                del self._made[number]  # to be done again with what is really left
                self._given.discard(number)
                return
            self.settled.append(made)
            self._left = _minus(self._left, made)
            self.closed = made["limited"] or len(self.settled) == len(self._tasks) or 0 in asdict(self._left).values()

    def _holds(self, made: dict[str, Any]) -> bool:
        """Whether a shard lies wholly within what is left, so that its limits did not matter."""
        counted = (
            (self._left.documents, made["read_documents"]),
            (self._left.text_bytes, made["text_bytes"]),
            (self._left.tokens, made["read_tokens"] + 1),  # where they are just reached, reading ends
        )
        return all(left is None or count <= left for left, count in counted)


def _minus(limits: Limits, made: dict[str, Any]) -> Limits:
    counts = {"documents": made["read_documents"], "text_bytes": made["text_bytes"], "tokens": made["read_tokens"]}
    return replace(limits, **{key: max(0, left - counts[key]) for key, left in asdict(limits).items() if left is not None})
