"""Tokens of many documents in one flat file: Megatron's ``.bin/.idx``, readable by whoever reads that format.

Choice: ``.bin`` is the documents' tokens back to back, ``.idx`` their lengths and byte offsets, ``.lengths.npy`` the lengths again for
planners that need nothing else. Tokens are uint16 below Megatron's limit of 65500 entries, int32 above: its format has no code for uint32.
A store appears whole or
not at all: files are written under a temporary name and renamed, the ``.json`` manifest last. Cost: nothing is appended to a finished
store.

Layout of ``.idx`` (little endian): magic 9 bytes, version u64 = 1, dtype code u8, n documents u64, n + 1 u64, lengths int32 [n], byte
offsets int64 [n], document index int64 [n + 1] (0 … n: one sequence a document).
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.run import read_json, write_json

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_UINT16_VOCABULARY = 65500  # Megatron's own limit


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored type of a token id."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class StoreWriter:
    """Writes one store. Use as a context manager: on success the store appears, on an exception or a kill nothing does.

    Args:
        prefix: path without suffix.
        vocab_size: decides the dtype; every id must lie below it.
        about: JSON values for the manifest, ``fingerprint`` among them.
    """

    def __init__(self, prefix: Path, vocab_size: int, about: dict[str, Any]) -> None:
        self._prefix, self._about, self._vocab_size = prefix, about, vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._tokens, self._targets = 0, array("q")
        self._digest = hashlib.sha256()

    def __enter__(self) -> StoreWriter:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        _suffixed(self._prefix, ".json").unlink(missing_ok=True)  # from here on an older store of this name counts as unfinished
        self._file = _partial(self._prefix, ".bin").open("wb")
        return self

    def add(self, tokens: np.ndarray | Sequence[int], targets: Sequence[tuple[int, int]] | None = None) -> None:
        """Append one document; ``targets`` are the half-open ranges of it that are learned, None all of it. A store has them for all documents or none."""
        ids = np.asarray(tokens, dtype=np.int64)
        assert ids.ndim == 1
        assert len(ids)
        assert ids.min() >= 0
        assert ids.max() < self._vocab_size
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        for start, stop in targets or ():
            self._targets.extend(range(self._tokens + start, self._tokens + stop))
        self._lengths.append(len(ids))
        self._tokens += len(ids)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._file.close()
            return
        _sync(self._file)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        self._write_index(lengths)
        with _partial(self._prefix, ".lengths.npy").open("wb") as file:
            np.save(file, lengths)
            _sync(file, close=False)
        with _partial(self._prefix, ".targets.npy").open("wb") as file:
            np.save(file, np.frombuffer(self._targets, dtype=np.int64) if self._targets else np.zeros(0, np.int64))
            _sync(file, close=False)
        for suffix in (".bin", ".idx", ".lengths.npy", ".targets.npy"):
            os.replace(_partial(self._prefix, suffix), _suffixed(self._prefix, suffix))
        counts = {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "targets": len(self._targets),
            "dtype": self._dtype.name,
            "sha256": self._digest.hexdigest(),
        }
        write_json(_suffixed(self._prefix, ".json"), {**self._about, **counts})

    def _write_index(self, lengths: np.ndarray) -> None:
        n = len(lengths)
        offsets = _offsets(lengths) * self._dtype.itemsize
        with _partial(self._prefix, ".idx").open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self._dtype], n, n + 1))
            for values in (lengths.astype("<i4"), offsets.astype("<i8"), np.arange(n + 1, dtype="<i8")):
                file.write(values.tobytes())
            _sync(file, close=False)


class Store(Sequence[np.ndarray]):
    """Reads one store through mmap: opening costs nothing, a document is a view.

    Raises:
        UserError: the files are missing, of another format, or cut short.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _suffixed(prefix, ".idx")
        try:
            if index.stat().st_size < _HEADER.size:
                raise self._broken("its .idx is cut short")
            raw = np.memmap(index, mode="r", dtype=np.uint8)
            self.dtype, n = self._header(raw)
            self._parse(raw, n)
            self.flat = self._flat()
        except FileNotFoundError as error:
            raise self._broken(f"{error.filename} is missing") from None

    def _header(self, raw: np.ndarray) -> tuple[np.dtype, int]:
        magic, version, code, n, n_index = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != MAGIC or version != VERSION or code not in _DTYPES or n_index != n + 1:
            raise self._broken("its .idx is not one that we write (Megatron version 1, uint16 or int32, a sequence a document)")
        return _DTYPES[code], n

    def _parse(self, raw: np.ndarray, n: int) -> None:
        if len(raw) != _HEADER.size + 4 * n + 8 * n + 8 * (n + 1):
            raise self._broken("its .idx is cut short")
        end = _HEADER.size + 4 * n
        self.lengths = raw[_HEADER.size : end].view("<i4")
        self._starts = np.asarray(raw[end : end + 8 * n]).view("<i8")

    def _flat(self) -> np.ndarray:
        """All tokens, back to back."""
        path, tokens = _suffixed(self.prefix, ".bin"), int(self.lengths.sum(dtype=np.int64))
        if path.stat().st_size != tokens * self.dtype.itemsize:
            raise self._broken(f"its .bin has {path.stat().st_size} bytes where the .idx promises {tokens * self.dtype.itemsize}")
        return np.memmap(path, mode="r", dtype=self.dtype) if tokens else np.zeros(0, self.dtype)

    def _broken(self, why: str) -> UserError:
        return UserError(f"token store {self.prefix} is unusable: {why}; remove {self.prefix}.* and run prepare again")

    @cached_property
    def starts(self) -> np.ndarray:
        """Index into ``flat`` where each document begins, int64."""
        return self._starts // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:  # type: ignore[override]
        """Tokens of one document, a read-only view."""
        return self.read(document, 0, int(self.lengths[document]))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document, cut at its end."""
        first = int(self._starts[document]) // self.dtype.itemsize
        return self.flat[first + start : first + min(stop, int(self.lengths[document]))]

    @cached_property
    def _target_places(self) -> np.ndarray:
        """Indices into ``flat`` of the tokens that are learned, sorted; empty where all are."""
        path = _suffixed(self.prefix, ".targets.npy")
        return np.load(path, mmap_mode="r") if path.exists() else np.zeros(0, np.int64)

    def is_target(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start] of tokens [start, stop) of one document: which are learned; None where all are."""
        if not len(self._target_places):
            return None
        first = int(self._starts[document]) // self.dtype.itemsize + start
        low, high = np.searchsorted(self._target_places, (first, first + stop - start))
        mask = np.zeros(stop - start, bool)
        mask[self._target_places[low:high] - first] = True
        return mask

    def verify(self) -> None:
        """Compare the tokens with the manifest's checksum.

        Raises:
            UserError: they differ.
        """
        digest = hashlib.sha256()
        with _suffixed(self.prefix, ".bin").open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        if digest.hexdigest() != read_json(_suffixed(self.prefix, ".json"))["sha256"]:
            raise self._broken("its .bin does not have the checksum of its manifest")


def finished(prefix: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a complete store of this fingerprint; None where there is none."""
    manifest = _suffixed(prefix, ".json")
    if not manifest.exists():
        return None
    about = read_json(manifest)
    return about if about.get("fingerprint") == fingerprint else None


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _partial(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}{suffix}.partial")


def _sync(file: Any, close: bool = True) -> None:
    file.flush()
    os.fsync(file.fileno())
    if close:
        file.close()
