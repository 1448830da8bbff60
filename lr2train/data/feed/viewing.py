"""A planned segment as facts for a person: which documents it holds, from where, how far, and how they read at their ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lr2train.data.batch import IGNORE, WINDOWS, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import SegmentLoader
from lr2train.data.tokenizer import Tokenizer

EMPTY = "·"


@dataclass(frozen=True)
class PieceView:
    """One document's part of a segment.

    Attributes:
        at: place in the segment of its first token.
        source: name of its source.
        document: number in the source.
        origin: where the document came from; empty where the corpus does not know.
        start, stop: tokens [start, stop) of the document.
        length: tokens of the whole document, BOS and EOS included.
        n_targets: labels of the piece that are learned.
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
    """One planned segment."""

    window: str
    number: int
    n_segments: int
    segment_tokens: int
    n_targets: int
    n_spans: int
    pieces: tuple[PieceView, ...]

    @property
    def padding_share(self) -> float:
        """Positions that hold no token, as a share of all."""
        return 1 - sum(piece.stop - piece.start for piece in self.pieces) / self.segment_tokens

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that it draws from, in the order in which they appear."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))


class Viewer:
    """Looks at the segments of a corpus.

    Args:
        corpus: what was planned.
        loader: of it.
    """

    def __init__(self, corpus: Corpus, loader: SegmentLoader) -> None:
        self.loader, self._tokenizer = loader, corpus.tokenizer
        self._tables = {window: corpus.segment_table(window) for window in WINDOWS}
        self._names, self._stores = [source["name"] for source in corpus.manifest["sources"]], corpus.stores()

    def look(self, window: str, number: int, text_chars: int) -> SegmentView:
        """One planned segment, which must exist, with so many characters of each piece's beginning and end."""
        (batch,) = self.loader.load([(window, number)])
        labels = batch.labels
        pieces = tuple(self._piece(batch, labels, row, text_chars) for row in self._tables[window].spans_of(number))
        n = self.loader.n_segments(window)
        return SegmentView(window, number, n, len(batch.tokens), batch.n_target_tokens, len(batch.spans), pieces)

    def _piece(self, batch: Batch, labels: np.ndarray, row: int, text_chars: int) -> PieceView:
        columns = ("source", "document", "start", "stop", "offset")
        source, document, start, stop, at = (int(getattr(self._tables[batch.window], column)[row]) for column in columns)
        store, inside = self._stores[source], slice(at, at + stop - start)
        head, tail = ends(self._tokenizer, batch.tokens[inside], text_chars)
        learned = int(np.count_nonzero(labels[inside] != IGNORE))
        return PieceView(
            at, self._names[source], document, store.origin(document), start, stop, int(store.lengths[document]), learned, head, tail
        )


def ends(tokenizer: Tokenizer, tokens: np.ndarray, n_chars: int) -> tuple[str, str]:
    """The first and the last characters of some tokens (a token is at least one), escaped; the second is empty where the first says all."""
    if len(tokens) <= 2 * n_chars:
        text = tokenizer.decode(tokens)
        if len(text) <= 2 * n_chars:
            return escaped(text), ""
    head, tail = tokenizer.decode(tokens[:n_chars]), tokenizer.decode(tokens[-n_chars:] if n_chars else [])
    return escaped(head[:n_chars]), escaped(tail[-n_chars:] if n_chars else "")


def escaped(text: str) -> str:
    """Text on one line: what does not print as itself becomes an escape, such as ``\\n``."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def bar(segment: SegmentView, n_cells: int, letters: dict[str, str]) -> str:
    """A segment as one line: a cell shows the source of the token at its middle, capital and small in turn from document to document.

    Args:
        segment: what to show.
        n_cells: characters.
        letters: a capital letter for each source.
    """
    starts = [piece.at for piece in segment.pieces]
    cells = []
    for cell in range(n_cells):
        place = (2 * cell + 1) * segment.segment_tokens // (2 * n_cells)
        nth = bisect_right(starts, place) - 1
        piece = segment.pieces[max(0, nth)]
        inside = piece.at <= place < piece.at + piece.stop - piece.start
        letter = letters[piece.source]
        cells.append((letter.lower() if nth % 2 else letter) if inside else EMPTY)
    return "".join(cells)


def letters_of(names: Sequence[str]) -> dict[str, str]:
    """A capital letter for each name, in order; beyond 26 they begin again."""
    return {name: chr(ord("A") + number % 26) for number, name in enumerate(names)}
