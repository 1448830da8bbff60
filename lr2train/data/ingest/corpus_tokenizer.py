"""The tokenizer that is trained on a corpus' own sources, in a process that can be ended.

Choice: the library that learns merges does not come back before it is done, and hears no Ctrl-C meanwhile. So it works in a process of its own,
which reads the sources itself, says how far it is and is ended with us. Cost: that process imports its modules anew, about two seconds, so a
little text is learned from in this process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from lr2train.config import SourceConfig
from lr2train.data import tokenizer as tokenizers
from lr2train.data.ingest import sources
from lr2train.data.ingest.records import InputSplit, ReadCounts
from lr2train.data.ingest.workers import Report, Work, WorkerPool
from lr2train.data.needles import sentences
from lr2train.run import meter

_LITTLE = 2_000_000  # characters that are learned from in a second or two
_REPORT_S = 0.5


@dataclass
class TokenizerTraining:
    """What a tokenizer is to learn from; called, it gives what trains one into a folder.

    Attributes:
        texts: sources of text with their shards.
        size: characters of each at most.
        wording: of needles, None where the corpus has none.
        vocab_size: entries in all.
    """

    texts: list[tuple[SourceConfig, list[InputSplit]]]
    size: int
    wording: str | None
    vocab_size: int
    _read: int = field(default=0, init=False)

    def __call__(self) -> Work:
        """In the process that works."""
        return self._learn

    @property
    def characters(self) -> int:
        """About how many it learns from."""
        return sum(
            min(self.size, source.max_bytes or self.size, sum(shard.size_bytes for shard in shards) or self.size)
            for source, shards in self.texts
        )

    def _learn(self, folder: Path, report: Report) -> None:
        asks = sentences(self.wording) if self.wording else ()
        texts = chain.from_iterable(self._beginning(*text) for text in self.texts)
        with _reporting(lambda: report(self._read)):
            tokenizers.train(self._counted(chain(texts, asks)), self.vocab_size).save(folder)

    def _beginning(self, source: SourceConfig, shards: list[InputSplit]) -> Iterator[str]:
        """Documents of a source until they add up to ``size`` characters."""
        read = 0
        for document in sources.read(source, ReadCounts(), shards):
            yield document.text
            read += len(document.text)
            if read >= self.size:
                return

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self._read += len(text)


@contextlib.contextmanager
def _reporting(report: Callable[[], None]) -> Iterator[None]:
    """While the block runs, which comes back to nobody, a thread reports."""
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


def learn(lesson: TokenizerTraining, folder: Path) -> None:
    """Train a tokenizer into a folder.

    Raises:
        UserError: the vocabulary is too small, a source has nothing to read, or the process died.
    """
    whole = float(max(lesson.characters, 1))
    tasks = iter([folder])
    with (
        WorkerPool[Path](lesson, 1 if whole <= _LITTLE else 2, lambda _: "the training of the tokenizer", alone=True) as workers,
        meter("train the tokenizer") as tick,
    ):
        for _ in workers.run(lambda: next(tasks, None), lambda _, read: tick(min(read / whole, 1.0), 1.0, f"{read / 1e6:.1f} MB read")):
            pass
