"""Tokens of many documents in flat files: Megatron's ``.bin/.idx``, readable by whoever reads that format, with our sidecars beside them.

Choice: ``.bin`` is the documents' tokens back to back, ``.idx`` their lengths and byte offsets. Tokens are uint16 below Megatron's limit of
65500 entries, int32 above: its format has no code for uint32. A store is one shard of a source and appears whole or not at all: files are
written under a temporary name and renamed, the ``.json`` manifest with the checksum of each last. ``SourceStore`` reads the shards of a
source as one sequence of documents. Cost: nothing is appended to a finished store; a source of many shards is many files.

Layout of ``.idx`` (little endian): magic 9 bytes, version u64 = 1, dtype code u8, n documents u64, n + 1 u64, lengths int32 [n], byte
offsets int64 [n], document index int64 [n + 1] (0 … n: one sequence a document).

Sidecars: ``.lengths.npy`` int32 [n] the lengths again, for planners that need nothing else; ``.targets.npy`` int64, places of the tokens
that are learned (empty: all are); ``.hashes.npy`` uint8 [n, 16], blake2b of each document's text; ``.origins.txt`` a line for each document,
where it came from, as a JSON string.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lr2train import io
from lr2train.config import UserError
from lr2train.io import seal, sha256_of, sync_file, sync_folder, temporary_of

T = TypeVar("T")

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TRAIN, HOLDOUT = "train", "holdout"
HASH_BYTES = 16
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_UINT16_VOCABULARY = 65500  # Megatron's own limit
_WRITE_BYTES = 1 << 20
_NO_HASH = bytes(HASH_BYTES)


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored type of a token id."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def text_hash(text: bytes) -> bytes:
    """16 bytes that stand for a document's text: equal for exact duplicates, and for them alone."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


class StoreWriter:
    """Writes one store. Use as a context manager: on success the store appears, on an exception or a kill nothing does.

    Args:
        prefix: path without suffix.
        vocab_size: decides the dtype; every id must lie below it.
        about: JSON values for the manifest, ``fingerprint`` among them.
        sealed: False leaves it to the caller to flush ``files`` to the disk and then write ``manifest``; until then the store is none.

    Attributes:
        manifest: JSON values, once the store is written.
        files: that the manifest speaks for.

    Raises:
        OSError: a file cannot be written; ``filename`` says which.
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
        suffixed(self._prefix, ".json").unlink(missing_ok=True)  # from here on an older store of this name counts as unfinished
        self._file = _Checked(self._prefix, ".bin")
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
            tokens: its ids, at least one.
            targets: half-open ranges of it that are learned, None all of it. A store has them for all documents or none.
            hash: of its text (``text_hash``); zeros where there is no text.
            origin: where it came from, such as ``web/a.jsonl.gz:17``.
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
            ".idx": lambda file: self._write_index(file, lengths),
            ".lengths.npy": lambda file: np.save(file, lengths),
            ".targets.npy": lambda file: np.save(file, targets),
            ".hashes.npy": lambda file: np.save(file, hashes),
            ".origins.txt": lambda file: file.write("".join(f"{json.dumps(origin)}\n" for origin in self._origins).encode()),
        }
        written = [self._file]
        try:
            for suffix, write in sidecars.items():
                written.append(_Checked(self._prefix, suffix))
                write(written[-1])
            files = {one.suffix: one.finish() for one in written}
        except BaseException:
            for one in written:
                one.abandon()
            raise
        counts = {"documents": len(lengths), "tokens": self._tokens, "targets": len(self._targets), "dtype": self._dtype.name}
        self.manifest = {**self._about, **counts, "files": files}
        self.files = [suffixed(self._prefix, suffix) for suffix in files]
        if self._sealed:
            for file in self.files:
                sync_file(file)
            sync_folder(self._prefix.parent)
            seal(suffixed(self._prefix, ".json"), self.manifest)

    def _write_index(self, file: _Checked, lengths: np.ndarray) -> None:
        n = len(lengths)
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * self._dtype.itemsize
        file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self._dtype], n, n + 1))
        for values in (lengths.astype("<i4"), offsets.astype("<i8"), np.arange(n + 1, dtype="<i8")):
            file.write(values.tobytes())


class _Checked:
    """A file under a temporary name that counts its bytes and their checksum as they are written."""

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
        """Make it appear; returns its size and checksum. The disk need not hold it yet."""
        with naming(self._path):
            self._file.close()
            os.replace(self._temporary, self._path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what is left in its buffer finds no room either
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """The system's errors about writing into an open file do not say which; here they do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def _with_files(open_it: Callable[[], T]) -> T:
    """``open_it()``, with this process' limit of open files raised where it is reached: it begins at 1024 on many systems.

    Raises:
        UserError: the system's own limit is reached.
    """
    try:
        return open_it()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        raise UserError(
            f"the corpus has more shards than this system lets a process open files ({hard}); raise the limit (`ulimit -Hn`, nofile in "
            "limits.conf), or prepare another corpus with a greater data.shard_bytes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open_it()


class Store(Sequence[np.ndarray]):
    """Reads one store through mmap: opening costs nothing, a document is a view.

    Raises:
        UserError: the files are missing, of another format, or cut short.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = suffixed(prefix, ".idx")
        try:
            if index.stat().st_size < _HEADER.size:
                raise self._broken("its .idx is cut short")
            raw = _with_files(lambda: np.fromfile(index, np.uint8))  # read, not mapped: a map holds a file open
            self.dtype, n = self._header(raw)
            self._parse(raw, n)
            self.flat = self._flat()
        except FileNotFoundError as error:
            raise self._broken(f"{error.filename} is missing") from None
        except OSError as error:
            raise unreadable(error, index) from None

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
        path, tokens = suffixed(self.prefix, ".bin"), int(self.lengths.sum(dtype=np.int64))
        if path.stat().st_size != tokens * self.dtype.itemsize:
            raise self._broken(f"its .bin has {path.stat().st_size} bytes where the .idx promises {tokens * self.dtype.itemsize}")
        return _with_files(lambda: np.memmap(path, mode="r", dtype=self.dtype)) if tokens else np.zeros(0, self.dtype)

    def _broken(self, why: str) -> UserError:
        return broken(self.prefix, why)

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
        """Tokens [start, stop) of one document, cut at its end; a read-only view."""
        first = int(self._starts[document]) // self.dtype.itemsize
        return self.flat[first + start : first + min(stop, int(self.lengths[document]))]

    @cached_property
    def _target_places(self) -> np.ndarray:
        """Indices into ``flat`` of the tokens that are learned, sorted; empty where all are."""
        if not self.manifest["targets"]:
            return np.zeros(0, np.int64)
        return load_array(suffixed(self.prefix, ".targets.npy"), mapped=True)

    def is_target(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start] of tokens [start, stop) of one document: which are learned; None where all are."""
        if not len(self._target_places):
            return None
        first = int(self._starts[document]) // self.dtype.itemsize + start
        low, high = np.searchsorted(self._target_places, (first, first + stop - start))
        mask = np.zeros(stop - start, bool)
        mask[self._target_places[low:high] - first] = True
        return mask

    @cached_property
    def hashes(self) -> np.ndarray:
        """blake2b of each document's text, uint8 [n, 16]; zeros where there is no text (synthetic documents)."""
        return load_array(suffixed(self.prefix, ".hashes.npy"))

    @cached_property
    def origins(self) -> list[str]:
        """Where each document came from: ``file:record``, ``file@byte``, or what its reader calls it."""
        path = suffixed(self.prefix, ".origins.txt")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise self._broken(f"{path.name} cannot be read ({error})") from None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What its ``.json`` says.

        Raises:
            UserError: it is missing or was changed.
        """
        return sealed(suffixed(self.prefix, ".json"))

    def verify(self) -> None:
        """Compare every file with the manifest's sizes and checksums.

        Raises:
            UserError: one differs.
        """
        check_sizes(self.prefix, self.manifest)
        for suffix, about in self.manifest["files"].items():
            if sha256_of(suffixed(self.prefix, suffix)) != about["sha256"]:
                raise self._broken(f"its {suffix} does not have the checksum of its manifest")


class SourceStore(Sequence[np.ndarray]):
    """The shards of a source as one sequence of documents, numbered through. Nothing is opened before it is asked for.

    Args:
        prefixes: of its shards, in order.
        usable: bool, a file of numpy's with an entry a document; None where all documents may be used.
    """

    def __init__(self, prefixes: Sequence[Path], usable: Path | None = None) -> None:
        self._prefixes, self._usable = list(prefixes), usable
        self._opened: dict[int, Store] = {}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, BOS and EOS included, int32 [n]; reads the sidecars of lengths alone."""
        parts = [load_array(suffixed(prefix, ".lengths.npy")) for prefix in self._prefixes]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @cached_property
    def usable(self) -> np.ndarray | None:
        """bool [n]: False where a document is left out as a duplicate, and must not be planned; None where none is."""
        return load_array(self._usable) if self._usable is not None and self._usable.exists() else None

    @cached_property
    def first(self) -> list[int]:
        """The number of each shard's first document, and at the end the number of all."""
        counts = [len(load_array(suffixed(prefix, ".lengths.npy"), mapped=True)) for prefix in self._prefixes]
        return np.cumsum([0, *counts]).tolist()

    @property
    def shards(self) -> list[Store]:
        """All of them, opened."""
        return [self.shard(number) for number in range(len(self._prefixes))]

    def shard(self, number: int) -> Store:
        """One of them."""
        if number not in self._opened:
            self._opened[number] = Store(self._prefixes[number])
        return self._opened[number]

    def locate(self, document: int) -> tuple[Store, int]:
        """The shard that holds a document, and its number there.

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
        """Tokens [start, stop) of one document, cut at its end; a read-only view."""
        shard, local = self.locate(document)
        return shard.read(local, start, stop)

    def is_target(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start] of tokens [start, stop) of one document: which are learned; None where all are."""
        shard, local = self.locate(document)
        return shard.is_target(local, start, stop)

    def origin(self, document: int) -> str:
        """Where one document came from; reads the names of its shard alone."""
        shard, local = self.locate(document)
        return shard.origins[local]

    @property
    def origins(self) -> list[str]:
        """Where each document came from."""
        return [origin for shard in self.shards for origin in shard.origins]

    @property
    def hashes(self) -> np.ndarray:
        """blake2b of each document's text, uint8 [n, 16]."""
        return np.concatenate([np.zeros((0, HASH_BYTES), np.uint8), *(shard.hashes for shard in self.shards)])

    def verify(self) -> None:
        """Compare every file of every shard with its manifest's checksum.

        Raises:
            UserError: one differs.
        """
        for shard in self.shards:
            shard.verify()


def finished(prefix: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a complete store of this fingerprint; None where there is none."""
    manifest = suffixed(prefix, ".json")
    if not manifest.exists():
        return None
    about = sealed(manifest)
    return about if about.get("fingerprint") == fingerprint else None


def check_sizes(prefix: Path, manifest: dict[str, Any]) -> None:
    """Compare the sizes of a store's files with its manifest: what a cut or a full disk leaves is found without reading.

    Raises:
        UserError: a file is missing, or of another size.
    """
    for suffix, about in manifest["files"].items():
        path = suffixed(prefix, suffix)
        found = path.stat().st_size if path.exists() else None
        if found is None:
            raise broken(prefix, f"{path} is missing")
        if found != about["bytes"]:
            raise broken(prefix, f"its {suffix} has {found} bytes where the manifest promises {about['bytes']}")


def sealed(path: Path) -> dict[str, Any]:
    """Values that ``io.seal`` wrote.

    Raises:
        UserError: they were changed since.
    """
    return io.sealed(path, f"remove {path.with_suffix('')}.* and run prepare again")


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """A numpy array that we wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return _with_files(lambda: np.load(path, mmap_mode="r" if mapped else None))
    except PermissionError as error:
        raise unreadable(error, path) from None
    except (OSError, ValueError, EOFError) as error:
        raise broken(path.with_name(path.name.partition(".")[0]), f"{path.name} cannot be read ({error})") from None


def unreadable(error: OSError, path: Path) -> UserError:
    """What to say of a file that is there and that the system does not give."""
    return UserError(f"{error.filename or path} cannot be read ({error.strerror}); make it and the folders that it lies in readable")


def broken(prefix: Path, why: str) -> UserError:
    """What to say of a store that cannot be used."""
    return UserError(f"token store {prefix} is unusable: {why}; remove {prefix}.* and run prepare again")


def suffixed(prefix: Path, suffix: str) -> Path:
    """A file of a store."""
    return prefix.with_name(prefix.name + suffix)
