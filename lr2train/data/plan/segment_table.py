"""The segment table of a window: which part of which document stands where in which segment, in memory and on disk.

Choice: one .npy file, int32 [6, document spans], so that each column is one run of bytes that can be mapped. There is
no compression, because the loader maps the file and touches a few pages a step, however large the table is. Cost: 24
bytes a document span, about a hundred megabytes for 10B tokens in five million spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.data.store import unreadable
from lr2train.io import replacing, sha256_of

FORMAT = 1
COLUMNS = ("segment", "source", "document", "start", "stop", "offset")


@dataclass(frozen=True)
class SegmentTable:
    """A row is a document span: tokens [start, stop) of a document stand at ``offset`` of a segment.

    Rows are sorted by (segment, offset), and each segment has at least one. The columns are int32 [rows]: cast before
    squaring a length.

    Attributes:
        segment: number of the segment within the window.
        source: index into the corpus' sources.
        document: index into the source's store.
        start, stop: tokens [start, stop) of the document.
        offset: place in the segment of the span's first token.
        segment_tokens: T.
    """

    segment: np.ndarray
    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    offset: np.ndarray
    segment_tokens: int

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        return int(self.segment[-1]) + 1 if len(self.segment) else 0

    @property
    def tokens(self) -> int:
        """Tokens of all document spans; padding is not counted."""
        return int((self.stop - self.start).sum(dtype=np.int64))

    @property
    def padding_share(self) -> float:
        """Positions that hold no token, as a share of all."""
        room = self.n_segments * self.segment_tokens
        return 1.0 - self.tokens / room if room else 0.0

    @cached_property
    def _first(self) -> np.ndarray:
        return np.searchsorted(self.segment, np.arange(self.n_segments + 1, dtype=self.segment.dtype))

    def spans_of(self, segment: int) -> range:
        """Rows of the document spans of one segment."""
        return range(int(self._first[segment]), int(self._first[segment + 1]))


def file_of(folder: Path, window: str) -> Path:
    """Path of a window's table in a corpus."""
    return folder / f"segments.{window}.npy"


def write(path: Path, table: SegmentTable) -> dict[str, Any]:
    """Write a table whole or not at all; returns the file's ``bytes`` and ``sha256`` for the manifest."""
    with replacing(path) as file:
        np.save(file, np.stack([np.asarray(getattr(table, column), np.int32) for column in COLUMNS]))
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read(path: Path, segment_tokens: int) -> SegmentTable:
    """A table whose columns are views of its file.

    Raises:
        UserError: the file is missing, cut short, not readable, or not a segment table.
    """
    try:
        columns = np.load(path, mmap_mode="r")
    except PermissionError as error:
        raise unreadable(error, path) from None
    except (OSError, EOFError, ValueError) as error:
        raise _unusable(path, str(error)) from None
    if columns.ndim != 2 or len(columns) != len(COLUMNS) or columns.dtype != np.int32:
        raise _unusable(path, f"it holds {columns.dtype} {list(columns.shape)}")
    return SegmentTable(*columns, segment_tokens=segment_tokens)


def verify(path: Path, about: dict[str, Any]) -> None:
    """Compare a table's file with the size and checksum that :func:`write` returned.

    Raises:
        UserError: the file is missing, or differs from the one that was written.
    """
    if not path.is_file() or path.stat().st_size != about["bytes"]:
        raise _unusable(path, f"it does not have the {about['bytes']} bytes that the manifest promises")
    if sha256_of(path) != about["sha256"]:
        raise _unusable(path, "its checksum is not the manifest's")


def _unusable(path: Path, why: str) -> UserError:
    return UserError(
        f"the segment table {path} is unusable ({why}); remove it and run prepare again, which tokenises nothing anew"
    )
