"""Writing one store: its files under temporary names, then under their own, then the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lr2train.data.store.files import naming, suffixed
from lr2train.data.store.index import packed, token_dtype
from lr2train.io import seal, sync_file, sync_folder, temporary_of

HASH_BYTES = 16
_NO_HASH = bytes(HASH_BYTES)
_WRITE_BYTES = 1 << 20


def text_hash(text: bytes) -> bytes:
    """16 bytes that stand for a document's text: equal for exact duplicates only."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


class StoreWriter:
    """Writes one store, as a context manager: after an exception or a kill there is no store.

    Args:
        prefix: path without suffix.
        vocab_size: decides the dtype; each id must lie below it.
        about: JSON values for the manifest, ``fingerprint`` among them.
        sealed: False leaves the end to the caller, who flushes ``files`` to the disk and then writes ``manifest``.
            Until then the store counts as unfinished.

    Attributes:
        manifest: JSON values, once the files are written.
        files: all files that the manifest speaks for.

    Raises:
        OSError: a file cannot be written; ``filename`` names it.
    """

    def __init__(self, prefix: Path, vocab_size: int, about: dict[str, Any], sealed: bool = True) -> None:
        self._prefix, self._about, self._vocab_size, self._sealed = prefix, about, vocab_size, sealed
        self.manifest: dict[str, Any] = {}
        self.files: list[Path] = []
        self._dtype = token_dtype(vocab_size)
        self._lengths, self._tokens, self._targets = array("i"), 0, array("q")
        self._hashes, self._origins = bytearray(), list[str]()

    def __enter__(self) -> StoreWriter:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        # from here on an older store of this name counts as unfinished
        suffixed(self._prefix, ".json").unlink(missing_ok=True)
        self._file = _HashedFile(self._prefix, ".bin")
        return self

    def add(
        self,
        tokens: np.ndarray | Sequence[int],
        targets: Sequence[tuple[int, int]] | None = None,
        hash: bytes = _NO_HASH,
        origin: str = "",
    ) -> None:
        """Append one document.

        Args:
            tokens: ids of the document, at least one.
            targets: half-open ranges of its tokens that are learned; None is all. A store has ranges for all of its
                documents or for none.
            hash: ``text_hash`` of the text; zeros where there is no text.
            origin: where the document came from, such as ``web/a.jsonl.gz:17``.
        """
        ids = np.asarray(tokens)
        assert ids.ndim == 1
        assert len(ids)
        assert ids.dtype.kind in "iu"
        assert ids.min() >= 0
        assert ids.max() < self._vocab_size
        assert len(hash) == HASH_BYTES
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        for start, stop in targets or ():
            self._targets.extend(range(self._tokens + start, self._tokens + stop))
        self._lengths.append(len(ids))
        self._hashes += hash
        self._origins.append(origin)
        self._tokens += len(ids)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._file.abandon()
            return
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        targets = np.frombuffer(self._targets, dtype=np.int64) if self._targets else np.zeros(0, np.int64)
        hashes = np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, HASH_BYTES)
        sidecars: dict[str, Callable[[Any], Any]] = {
            ".idx": lambda file: file.write(packed(lengths, self._dtype)),
            ".lengths.npy": lambda file: np.save(file, lengths),
            ".targets.npy": lambda file: np.save(file, targets),
            ".hashes.npy": lambda file: np.save(file, hashes),
            ".origins.txt": lambda file: file.write(
                "".join(f"{json.dumps(origin)}\n" for origin in self._origins).encode()
            ),
        }
        written = [self._file]
        try:
            for suffix, write in sidecars.items():
                written.append(_HashedFile(self._prefix, suffix))
                write(written[-1])
            files = {one.suffix: one.finish() for one in written}
        except BaseException:
            for one in written:
                one.abandon()
            raise
        counts = {
            "documents": len(lengths),
            "tokens": self._tokens,
            "targets": len(self._targets),
            "dtype": self._dtype.name,
        }
        self.manifest = {**self._about, **counts, "files": files}
        self.files = [suffixed(self._prefix, suffix) for suffix in files]
        if self._sealed:
            for file in self.files:
                sync_file(file)
            sync_folder(self._prefix.parent)
            # only now: a power cut must not leave a manifest without its files
            seal(suffixed(self._prefix, ".json"), self.manifest)


class _HashedFile:
    """A file under a temporary name whose size and SHA-256 are counted while it is written."""

    def __init__(self, prefix: Path, suffix: str) -> None:
        self.suffix = suffix
        self._path = suffixed(prefix, suffix)
        self._temporary = temporary_of(self._path)
        with naming(self._path):
            self._file: IO[bytes] = self._temporary.open("wb", buffering=_WRITE_BYTES)
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        with naming(self._path):
            return self._file.write(data)

    def finish(self) -> dict[str, Any]:
        """Give the file its name; returns its size and checksum. The disk need not hold the file yet."""
        with naming(self._path):
            self._file.close()
            os.replace(self._temporary, self._path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Leave nothing of the file."""
        with contextlib.suppress(OSError):  # on a full disk, closing fails too: its buffer finds no room
            self._file.close()
        self._temporary.unlink(missing_ok=True)
