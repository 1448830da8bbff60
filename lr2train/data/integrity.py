"""Whether a corpus on the disk is the one that was written: sizes are compared at each start, checksums once.

Choice: a store's manifest has the checksums of its files, ``checksums.json`` has the checksums of all other files
(segment tables, tokenizer, manifests), and each of these lists has a checksum of its own. A file that passed is
remembered in ``verified.json`` by size, time and inode, so the next start does not read it. Cost: the first start reads
all tokens, at about a gigabyte a second and core. Damage after that start that keeps a file's size, time and inode is
not found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lr2train.config import UserError
from lr2train.data import store
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.io import TEMPORARY, is_temporary, read_json, seal, sha256_of, write_json
from lr2train.progress import meter

CHECKSUMS, VERIFIED = "checksums.json", "verified.json"
_AROUND = ("corpus.json", "segments*", "plan*", "tokenizer/*", "store/*/source.json", "store/*/*.usable.npy")


class _File(NamedTuple):
    path: Path
    size: int
    sha256: str


def write_checksums(folder: Path) -> None:
    """Note the checksums of all files outside the stores; the last step of ``prepare``."""
    around = {path for pattern in _AROUND for path in folder.glob(pattern)}
    files = sorted(path for path in around if path.is_file() and not is_temporary(path))
    noted = {str(path.relative_to(folder)): [path.stat().st_size, sha256_of(path)] for path in files}
    seal(folder / CHECKSUMS, {"files": noted})


def sweep(folder: Path) -> None:
    """Remove files that a kill or a full disk left half-written. The caller holds the folder's lock."""
    for place in (folder, folder / "tokenizer", *folder.glob("store/*")):
        for path in place.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def refuse_damage(folder: Path) -> None:
    """Compare the files outside the stores with their checksums, before ``prepare`` goes on from them.

    A missing file is no damage: ``prepare`` makes it again.

    Raises:
        UserError: a file was changed.
    """
    if (folder / CHECKSUMS).exists():
        noted = store.sealed(folder / CHECKSUMS)["files"]
        _compare(folder, [_File(folder / name, *about) for name, about in noted.items() if (folder / name).exists()])


def verify_corpus(folder: Path, prefixes: Iterable[Path], full: bool = True) -> int:
    """Compare a corpus with its checksums.

    Args:
        folder: of the corpus.
        prefixes: of its stores.
        full: read each file that was not read before; False compares sizes alone.

    Returns:
        Bytes that were read.

    Raises:
        UserError: a file is missing, of another size, or was changed; the text names the file.
    """
    noted = store.sealed(folder / CHECKSUMS)["files"]
    around = [_File(folder / name, size, sha256) for name, (size, sha256) in noted.items()]
    for file in around:
        _check_size(file)
    files = [*around, *(file for prefix in prefixes for file in _files_of(prefix))]
    return _compare(folder, files) if full else 0


def verify_stores(folder: Path, prefixes: Iterable[Path]) -> int:
    """Compare stores alone with their checksums; see ``verify_corpus``."""
    return _compare(folder, [file for prefix in prefixes for file in _files_of(prefix)])


def _files_of(prefix: Path) -> list[_File]:
    manifest = store.sealed(store.suffixed(prefix, ".json"))
    store.check_sizes(prefix, manifest)
    return [
        _File(store.suffixed(prefix, suffix), about["bytes"], about["sha256"])
        for suffix, about in manifest["files"].items()
    ]


def _check_size(file: _File) -> None:
    try:
        found = file.path.stat().st_size if file.path.exists() else None
    except OSError as error:
        raise store.unreadable(error, file.path) from None
    if found != file.size:
        raise _damaged(
            file.path, "is missing" if found is None else f"has {found} bytes where {file.size} were written"
        )


def _compare(folder: Path, files: list[_File]) -> int:
    known = _remembered(folder)
    new = [file for file in files if known.get(_name(folder, file)) != _stamp(file)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, meter("compare checksums") as tick:
        total, read = sum(file.size for file in new), 0
        for file, sha256 in zip(new, pool.map(_checksum, (file.path for file in new)), strict=True):
            read += file.size
            tick(read / max(total, 1), 1.0, f"{read / 1e9:.1f} GB")
            if sha256 != file.sha256:
                raise _damaged(file.path, "does not have the checksum that it was written with")
    if new:
        _remember(folder, {**known, **{_name(folder, file): _stamp(file) for file in new}})
    return sum(file.size for file in new)


def _checksum(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise store.unreadable(error, path) from None


def _name(folder: Path, file: _File) -> str:
    return file.path.relative_to(folder).as_posix()


def _stamp(file: _File) -> list[int | str]:
    """Size, time, inode and checksum, by which a file is known again. A copy has another inode, so it is read anew."""
    stat = file.path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, file.sha256]


def _remembered(folder: Path) -> dict[str, list[int | str]]:
    try:
        return dict(read_json(folder / VERIFIED)) if (folder / VERIFIED).exists() else {}
    except (UserError, TypeError, ValueError):  # a damaged memory costs only the reading
        return {}


def _remember(folder: Path, stamps: dict[str, list[int | str]]) -> None:
    try:
        write_json(folder / VERIFIED, stamps)
    except OSError:  # the corpus lies in a folder that this user may only read
        return


def _damaged(path: Path, why: str) -> UserError:
    of_store = path.parent.parent.name == "store" and path.name.startswith((f"{TRAIN}-", f"{HOLDOUT}-"))
    remove = f"{path.parent / path.name.partition('.')[0]}.*" if of_store else f"{path} and corpus.json"
    return UserError(f"the corpus is damaged: {path} {why}; remove {remove} and run prepare again")
