"""The files of a store: their names, their manifest, and one sentence for each way in which they are unusable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lr2train import io
from lr2train.config import UserError
from lr2train.data.store.open_files import with_files

TRAIN, HOLDOUT = "train", "holdout"


def suffixed(prefix: Path, suffix: str) -> Path:
    """A file of a store."""
    return prefix.with_name(prefix.name + suffix)


def sealed(path: Path) -> dict[str, Any]:
    """JSON values that ``io.seal`` wrote.

    Raises:
        UserError: the values were changed since.
    """
    return io.sealed(path, f"remove {path.with_suffix('')}.* and run prepare again")


def finished(prefix: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a complete store of this fingerprint; None where there is none."""
    manifest = suffixed(prefix, ".json")
    if not manifest.exists():
        return None
    about = sealed(manifest)
    return about if about.get("fingerprint") == fingerprint else None


def check_sizes(prefix: Path, manifest: dict[str, Any]) -> None:
    """Compare the sizes of a store's files with its manifest: finds a cut file without reading it.

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


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """A numpy array that we wrote.

    Raises:
        UserError: the file is missing, damaged or not readable.
    """
    try:
        return with_files(lambda: np.load(path, mmap_mode="r" if mapped else None))
    except PermissionError as error:
        raise unreadable(error, path) from None
    except (OSError, ValueError, EOFError) as error:
        raise broken(path.with_name(path.name.partition(".")[0]), f"{path.name} cannot be read ({error})") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to the system's errors: an error of writing into an open file has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def unreadable(error: OSError, path: Path) -> UserError:
    """The sentence for a file that the system refuses to give: it is not damaged, so it is not to be removed."""
    return UserError(
        f"{error.filename or path} cannot be read ({error.strerror}); make it and the folders that it lies in readable"
    )


def broken(prefix: Path, why: str) -> UserError:
    """The sentence for a store that cannot be used."""
    return UserError(f"token store {prefix} is unusable: {why}; remove {prefix}.* and run prepare again")
