"""A planned segment as facts for a person: its documents, their origins and extent, and how their ends read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.data.batch import IGNORE, WINDOWS, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import SegmentLoader
from lr2train.data.tokenizer import Tokenizer

PADDING = "·"


@dataclass(frozen=True)
class DocumentView:
    """One document span of a segment.

    Attributes:
        at: place of its first token in the segment.
        source: name of its source.
        document: number in the source.
        origin: where the document came from; empty where the corpus does not know.
        start, stop: tokens [start, stop) of the document.
        length: tokens of the whole document, BOS and EOS included.
        n_targets: labels of the span that are learned.
        head, tail: its first and last characters, with control characters escaped.
    """

    at: int
    source: str
    document: int
    origin: str
    start: int
    stop: int
    length: int
    n_targets: int
    head: str
    tail: str

    @property
    def begins_before(self) -> bool:
        """The document's beginning is in another segment, or in none."""
        return self.start > 0

    @property
    def goes_on(self) -> bool:
        """The document's end is in another segment, or in none."""
        return self.stop < self.length


@dataclass(frozen=True)
class SegmentView:
    """One planned segment.

    Attributes:
        window, number: of the segment; ``n_segments`` has its window.
        segment_tokens: T.
        n_targets: labels that are learned.
        n_spans: attention spans: 1 where attention covers the whole segment.
        documents: its document spans, in order.
    """

    window: str
    number: int
    n_segments: int
    segment_tokens: int
    n_targets: int
    n_spans: int
    documents: tuple[DocumentView, ...]

    @property
    def padding_share(self) -> float:
        """Positions that hold no token, as a share of all."""
        return 1 - sum(one.stop - one.start for one in self.documents) / self.segment_tokens

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of its sources, in the order in which they appear."""
        return tuple(dict.fromkeys(one.source for one in self.documents))


class Viewer:
    """Looks at the segments of a corpus, as a loader of that corpus gives them."""

    def __init__(self, corpus: Corpus, loader: SegmentLoader) -> None:
        self.loader, self._tokenizer = loader, corpus.tokenizer
        self._tables = {window: corpus.segment_table(window) for window in WINDOWS}
        self._names, self._stores = corpus.source_names, corpus.stores()

    def look(self, window: str, number: int, text_chars: int) -> SegmentView:
        """One planned segment, which must exist, with so many characters of each document's beginning and end."""
        (batch,) = self.loader.load([(window, number)])
        documents = tuple(self._document(batch, row, text_chars) for row in self._tables[window].spans_of(number))
        n = self.loader.n_segments(window)
        return SegmentView(window, number, n, len(batch.tokens), batch.n_target_tokens, len(batch.spans), documents)

    def _document(self, batch: Batch, row: int, text_chars: int) -> DocumentView:
        columns = ("source", "document", "start", "stop", "offset")
        source, document, start, stop, at = (
            int(getattr(self._tables[batch.window], column)[row]) for column in columns
        )
        store, end = self._stores[source], at + stop - start
        head, tail = ends(self._tokenizer, batch.tokens[at:end], text_chars)
        ignored = batch.breaks[0, batch.breaks[1] == IGNORE]
        learned = end - at - int(np.count_nonzero((at <= ignored) & (ignored < end)))
        return DocumentView(
            at,
            self._names[source],
            document,
            store.origin(document),
            start,
            stop,
            int(store.lengths[document]),
            learned,
            head,
            tail,
        )


def ends(tokenizer: Tokenizer, tokens: np.ndarray, n_chars: int) -> tuple[str, str]:
    """The first and the last characters of some tokens, escaped; no last ones where the first are the whole text.

    A token is at least one character, so ``n_chars`` tokens are enough for each end.
    """
    if len(tokens) <= 2 * n_chars:
        text = tokenizer.decode(tokens)
        if len(text) <= 2 * n_chars:
            return escaped(text), ""
    head, tail = tokenizer.decode(tokens[:n_chars]), tokenizer.decode(tokens[-n_chars:] if n_chars else [])
    return escaped(head[:n_chars]), escaped(tail[-n_chars:] if n_chars else "")


def escaped(text: str) -> str:
    """Text on one line: a character that does not print as itself becomes an escape, such as ``\\n``."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def bar(segment: SegmentView, n_cells: int, letters: dict[str, str]) -> str:
    """A segment as one line of cells.

    A cell shows the source of the token at its middle, in capital and small letters in turn by document.

    Args:
        segment: to show.
        n_cells: characters.
        letters: a capital letter for each source.
    """
    starts = [one.at for one in segment.documents]
    cells = []
    for cell in range(n_cells):
        place = (2 * cell + 1) * segment.segment_tokens // (2 * n_cells)
        nth = bisect_right(starts, place) - 1
        document = segment.documents[max(0, nth)]
        inside = document.at <= place < document.at + document.stop - document.start
        letter = letters[document.source]
        cells.append((letter.lower() if nth % 2 else letter) if inside else PADDING)
    return "".join(cells)


def letters_of(names: Sequence[str]) -> dict[str, str]:
    """A capital letter for each name, in order; beyond 26 they begin again."""
    return {name: chr(ord("A") + number % 26) for number, name in enumerate(names)}
