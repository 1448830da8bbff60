"""Reading stores through mmap: opening reads the index alone, and a document is a view of its file."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.data.store.files import broken, load_array, sealed, suffixed, unreadable
from lr2train.data.store.index import Index
from lr2train.data.store.open_files import with_files
from lr2train.data.store.writer import HASH_BYTES


class Store(Sequence[np.ndarray]):
    """One token shard, opened.

    Attributes:
        lengths: int32 [n], tokens of each document.
        starts: int64 [n], index into ``flat`` where each document begins.
        flat: uint16 or int32, all tokens back to back, mapped.
        dtype: of the tokens.

    Raises:
        UserError: a file is missing, of another format, cut short, or not readable.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        path = suffixed(prefix, ".idx")
        try:
            # read, not mapped: a map holds a file open
            index = self._index(with_files(lambda: np.fromfile(path, np.uint8)))
            self.dtype, self.lengths = index.dtype, index.lengths
            self.starts = index.offsets // self.dtype.itemsize
            self.flat = self._mapped()
        except FileNotFoundError as error:
            raise self._broken(f"{error.filename} is missing") from None
        except OSError as error:
            raise unreadable(error, path) from None

    def _index(self, raw: np.ndarray) -> Index:
        try:
            return Index.parsed(raw)
        except ValueError as error:
            raise self._broken(str(error)) from None

    def _mapped(self) -> np.ndarray:
        path, tokens = suffixed(self.prefix, ".bin"), int(self.lengths.sum(dtype=np.int64))
        found, promised = path.stat().st_size, tokens * self.dtype.itemsize
        if found != promised:
            raise self._broken(f"its .bin has {found} bytes where the .idx promises {promised}")
        return with_files(lambda: np.memmap(path, mode="r", dtype=self.dtype)) if tokens else np.zeros(0, self.dtype)

    def _broken(self, why: str) -> UserError:
        return broken(self.prefix, why)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:  # type: ignore[override]
        """Tokens of one document, a read-only view."""
        return self.read(document, 0, int(self.lengths[document]))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document, cut at the document's end; a read-only view."""
        first = int(self.starts[document])
        return self.flat[first + start : first + min(stop, int(self.lengths[document]))]

    @cached_property
    def _target_places(self) -> np.ndarray:
        """Indices into ``flat`` of the tokens that are learned, sorted; empty where all are."""
        if not self.manifest["targets"]:
            return np.zeros(0, np.int64)
        return load_array(suffixed(self.prefix, ".targets.npy"), mapped=True)

    def is_target(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start]: which of tokens [start, stop) are learned; None where all of the store are."""
        if not len(self._target_places):
            return None
        first = int(self.starts[document]) + start
        low, high = np.searchsorted(self._target_places, (first, first + stop - start))
        mask = np.zeros(stop - start, bool)
        mask[self._target_places[low:high] - first] = True
        return mask

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint8 [n, 16]: blake2b of each document's text; zeros where there is no text (synthetic documents)."""
        return load_array(suffixed(self.prefix, ".hashes.npy"))

    @cached_property
    def origins(self) -> list[str]:
        """Where each document came from: ``file:record``, ``file@byte``, or the id that its reader gave.

        Raises:
            UserError: the file of origins cannot be read.
        """
        path = suffixed(self.prefix, ".origins.txt")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise self._broken(f"{path.name} cannot be read ({error})") from None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Content of the ``.json``.

        Raises:
            UserError: the manifest is missing or was changed.
        """
        return sealed(suffixed(self.prefix, ".json"))


class SourceStore(Sequence[np.ndarray]):
    """The token shards of a source and split as one sequence of documents. Nothing is opened before it is asked for.

    Args:
        prefixes: paths of the token shards without suffix, in order.
        usable: a file of numpy's, bool [n]; None, or a file that does not exist, where all documents may be used.
    """

    def __init__(self, prefixes: Sequence[Path], usable: Path | None = None) -> None:
        self._prefixes, self._usable = list(prefixes), usable
        self._opened: dict[int, Store] = {}

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n]: tokens of each document, BOS and EOS included. Reads the sidecars of lengths alone."""
        parts = [load_array(suffixed(prefix, ".lengths.npy")) for prefix in self._prefixes]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @cached_property
    def usable(self) -> np.ndarray | None:
        """bool [n]: False for a document that is left out as a duplicate; None where none is."""
        return load_array(self._usable) if self._usable is not None and self._usable.exists() else None

    @cached_property
    def first(self) -> list[int]:
        """The number of each token shard's first document, and at the end the number of all documents."""
        counts = [len(load_array(suffixed(prefix, ".lengths.npy"), mapped=True)) for prefix in self._prefixes]
        return np.cumsum([0, *counts]).tolist()

    @property
    def shards(self) -> list[Store]:
        """All token shards, opened."""
        return [self.shard(number) for number in range(len(self._prefixes))]

    def shard(self, number: int) -> Store:
        """One token shard, opened once."""
        if number not in self._opened:
            self._opened[number] = Store(self._prefixes[number])
        return self._opened[number]

    def locate(self, document: int) -> tuple[Store, int]:
        """The token shard that holds a document, and the document's number there.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < self.first[-1]:
            raise IndexError(document)
        number = bisect_right(self.first, document) - 1
        return self.shard(number), document - self.first[number]

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, document: int) -> np.ndarray:  # type: ignore[override]
        """Tokens of one document, a read-only view."""
        shard, local = self.locate(document)
        return shard[local]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document, cut at the document's end; a read-only view."""
        shard, local = self.locate(document)
        return shard.read(local, start, stop)

    def origin(self, document: int) -> str:
        """Where one document came from; reads the origins of its token shard alone."""
        shard, local = self.locate(document)
        return shard.origins[local]

    @property
    def origins(self) -> list[str]:
        """Where each document came from."""
        return [origin for shard in self.shards for origin in shard.origins]

    @property
    def hashes(self) -> np.ndarray:
        """uint8 [n, 16]: blake2b of each document's text."""
        return np.concatenate([np.zeros((0, HASH_BYTES), np.uint8), *(shard.hashes for shard in self.shards)])
