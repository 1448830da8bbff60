"""Atomic files, JSON, checksums, and the user's sentence for an error of the file system.

Choice: a file is written under a temporary name, synced to the disk and renamed; then its folder is synced. So a reader
sees the old file or the new one, a kill leaves nothing half-written, and a power cut leaves no name of an empty file.
Temporary names begin with a dot and end in ``.tmp``; ``is_temporary`` recognises them, so that nothing copies or counts
them. Cost: two syncs for each file, about a millisecond each on a local disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from io import IOBase
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from lr2train.config import UserError

_CHUNK_BYTES = 1 << 18  # stays in the processor's cache between reading and hashing
TEMPORARY = ".tmp"  # the end of a temporary name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces ``path`` when the block ends. After an error the file is removed and ``path``
    is unchanged.

    Raises:
        OSError: the file cannot be written; the error's ``filename`` is ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # An OSError without a number does not show its filename.
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """The temporary name for ``path``: in the same folder, and different for every process."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def is_temporary(path: Path) -> bool:
    """Whether a file has a temporary name: its writer is at work, or was killed."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def sync_file(path: Path) -> None:
    """Sync a file that a library wrote to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk. A file system that cannot sync folders is accepted."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def usual_mode(path: Path) -> None:
    """Set the permissions that the umask allows; safetensors writes files that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. A number that is not finite has no JSON form and becomes null."""
    text = json.dumps(finite(value), indent=1, default=_plain, allow_nan=False)
    write_text(path, text + "\n")


def write_json_where_allowed(path: Path, value: Any) -> str:
    """Write JSON into a folder that may be read-only; returns why the file was not written, or an empty string."""
    try:
        write_json(path, value)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return error.strerror or str(error)
    return ""


def finite(value: Any) -> Any:
    """``value`` with None instead of every float that is not finite, in dictionaries and lists too.

    Arrays become lists.
    """
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [finite(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# Ends of names; a run without them would go on as another run.
_IDENTITY = (".config.json", ".inputs.json", "steps.json")
_WRITERS = {
    "corpus.json": "`lr2train prepare`",
    "factors.json": "`lr2train search` or train",
    "search.json": "`lr2train search`",
    "train.json": "`lr2train train`",
    "train.config.json": "`lr2train train`",
    "export.json": "`lr2train export`",
}


def read_json(path: Path) -> Any:
    """Read a JSON file that lr2train wrote.

    Raises:
        UserError: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        writer = _WRITERS.get(path.name, "the verb that writes it")
        raise UserError(f"{path} does not exist; run {writer} first, or name another folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it a readable file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        remedy = (
            "restore it, or choose another name="
            if path.name.endswith(_IDENTITY)
            else "remove it and run the verb that writes it again"
        )
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None


_SPACE = "free some, or set runs_folder to another disk, and run the same command again to go on"
_NO_DISK = "set runs_folder, or the key of this path, to a disk that can be written"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: _NO_DISK,
    errno.EACCES: "let this user read and write there, or set runs_folder, or the key of this path, to another place",
    errno.EPERM: "let this user read and write there, or set runs_folder, or the key of this path, to another place",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`) or take another disk, and run the same command again",
    errno.ENAMETOOLONG: "give a shorter name=, runs_folder or path",
    errno.ENOTDIR: "set runs_folder, or the key that names this path, to a folder",
    errno.EEXIST: "set runs_folder, or the key that names this path, to a folder",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EIO: "have the disk looked at, and copy what is on it",
}
"""errno -> remedy, for the errors that a user can repair.

ENOENT is missing: the reader of a file knows better what to do. Where a folder cannot be made, as in /proc, it is as
EROFS.
"""


def for_user(error: BaseException) -> UserError | None:
    """An error as one sentence with the file and a remedy; None where a user cannot repair the cause."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError):
        return None
    remedy = _NO_DISK if error.errno == errno.ENOENT and _makes_folder(error) else _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    file = error.filename if error.filename is not None else _file_at_work(error)
    where = f"{os.fsdecode(file)}: " if isinstance(file, str | bytes | Path) else ""
    return UserError(f"{where}{os.strerror(error.errno or 0)}; {remedy}")


def _makes_folder(error: OSError) -> bool:
    """Whether the error rose where a folder was made, with its parents."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)][-1:] == ["mkdir"]


def _file_at_work(error: OSError) -> str | None:
    """The file that was open where the error rose, from the traceback: a failed write does not name its file."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for local in frame.f_locals.values():
            for one in (local, *getattr(local, "__dict__", {}).values()):
                if isinstance(one, IOBase) and isinstance(name := getattr(one, "name", None), str):
                    return name
    return None


def fingerprint(value: Any) -> str:
    """A hash of a JSON value in 16 hex digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits in hex: finds damage and mix-ups at memory speed. No protection against forgery."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


class Hashed(IOBase):
    """A file for ``torch.load`` whose bytes are hashed while they are read, so that a check needs no second reading.

    A piece is hashed while the processor's cache still holds the piece, if the reader goes through the file in order.
    ``checksum`` reads the bytes that the reader skipped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._digest = xxhash.xxh3_128()
        self._hashed_bytes = 0  # length of the beginning of the file that the digest covers

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes, fewer at the end of the file; a negative ``size`` reads to the end."""
        if size < 0:
            size = os.fstat(self._file.fileno()).st_size - self._file.tell()
        data = bytearray(max(size, 0))
        return bytes(memoryview(data)[: self.readinto(data)])

    def readinto(self, buffer: Any) -> int:
        """Fill a writable buffer; returns the number of bytes read, fewer at the end of the file."""
        view = memoryview(buffer).cast("B")
        begin = done = 0
        position = self._file.tell()
        if 0 < position - self._hashed_bytes <= _CHUNK_BYTES:  # the reader skipped a header or padding
            self._hash_until(position)
        while done < len(view) and (size := self._file.readinto(view[done : done + _CHUNK_BYTES])):
            begin, done = done, done + size
            if position + begin == self._hashed_bytes:
                self._digest.update(view[begin:done])
                self._hashed_bytes += size
        return done

    def _hash_until(self, stop: int | None) -> None:
        """Hash the bytes before ``stop`` (None: the end) that are not hashed yet; the position becomes ``stop``."""
        self._file.seek(self._hashed_bytes)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while size := self._file.readinto(
            buffer[: None if stop is None else min(_CHUNK_BYTES, stop - self._hashed_bytes)]
        ):
            self._digest.update(buffer[:size])
            self._hashed_bytes += size

    def checksum(self) -> str:
        """The checksum of the whole file, as the function ``checksum`` gives it."""
        self._hash_until(None)
        return self._digest.hexdigest()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, as in a file of Python; returns the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def seal(path: Path, values: dict[str, Any]) -> None:
    """Write JSON values together with their checksum (a seal), atomically."""
    write_json(path, with_seal(values))


def with_seal(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values and, under ``seal``, their checksum."""
    plain = json.loads(json.dumps(values))
    return {**plain, "seal": fingerprint(plain)}


def sealed(path: Path, remedy: str = "restore it") -> dict[str, Any]:
    """Read values that ``seal`` wrote.

    Raises:
        UserError: the file is missing, or the seal does not fit the values; the text ends with ``remedy``.
    """
    values = read_json(path)
    seal_of = values.pop("seal", None) if isinstance(values, dict) else None
    if seal_of != fingerprint(values):
        raise UserError(f"{path} does not have its own checksum, so it was damaged; {remedy}")
    return values
