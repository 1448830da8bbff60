"""The plan of a window on disk: one .npy file of int32 [columns, pieces], so that each column is one run of bytes that can be mapped.

Choice: 24 bytes a piece and no compression, because the loader maps the file and touches a few pages a step, however large the plan. Cost:
about a hundred megabytes for 10B tokens in five million pieces.
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
    """The plan of one window: tokens [start, stop) of a document stand at ``offset`` of a segment. Sorted by (segment, offset), every
    segment occupied.

    The columns are int32: cast before squaring a length.

    Attributes:
        segment, document, start, stop, offset: int32 [pieces].
        source: int32 [pieces], index into the corpus' sources.
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
        """Segments of this window."""
        return int(self.segment[-1]) + 1 if len(self.segment) else 0

    @property
    def tokens(self) -> int:
        """Planned tokens, padding not counted."""
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
        """Rows of the table that make up one segment."""
        return range(int(self._first[segment]), int(self._first[segment + 1]))


def file_of(folder: Path, window: str) -> Path:
    """Where a corpus has the plan of a window."""
    return folder / f"segments.{window}.npy"


def write(path: Path, pieces: SegmentTable) -> dict[str, Any]:
    """Write a plan whole or not at all; returns its ``bytes`` and ``sha256`` for the manifest."""
    with replacing(path) as file:
        np.save(file, np.stack([np.asarray(getattr(pieces, column), np.int32) for column in COLUMNS]))
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read(path: Path, segment_tokens: int) -> SegmentTable:
    """A plan whose columns are views of its file.

    Raises:
        UserError: it is missing, cut short, or something else.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except PermissionError as error:
        raise unreadable(error, path) from None
    except (OSError, EOFError, ValueError) as error:
        raise _unusable(path, str(error)) from None
    if table.ndim != 2 or len(table) != len(COLUMNS) or table.dtype != np.int32:
        raise _unusable(path, f"it holds {table.dtype} {list(table.shape)}")
    return SegmentTable(*table, segment_tokens=segment_tokens)


def verify(path: Path, about: dict[str, Any]) -> None:
    """Compare a plan with what :func:`write` returned of it.

    Raises:
        UserError: the file is missing, or not what was written.
    """
    if not path.is_file() or path.stat().st_size != about["bytes"]:
        raise _unusable(path, f"it has not the {about['bytes']} bytes that the manifest promises")
    if sha256_of(path) != about["sha256"]:
        raise _unusable(path, "its checksum is not the manifest's")


def _unusable(path: Path, why: str) -> UserError:
    return UserError(f"the plan {path} is unusable ({why}); remove it and run prepare again, which tokenises nothing anew")
