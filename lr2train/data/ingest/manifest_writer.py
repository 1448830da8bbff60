"""Manifests that get their names after the disk holds all that they speak for, many at a time.

Choice: a flush to the disk costs a small file milliseconds, but a hundred files that are flushed together cost little more than one. So what
is finished waits up to a second for others; then first the data is flushed, then the manifests get their names in the order in which they
came. A manifest that is there is true, after a kill and after a power cut. Cost: a kill takes the work of that second along.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from lr2train import io
from lr2train.data import store

_EVERY_S = 1.0
_AT_A_TIME = 16  # flushes under way: a journal takes them together


class ManifestWriter:
    """Writes manifests with their own checksums. Use as a context manager: on the way out, however that is, what waits is written."""

    def __init__(self) -> None:
        self._waiting: dict[Path, tuple[dict[str, Any], list[Path]]] = {}
        self._flushed = time.monotonic()

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, OSError):  # a full disk would only be full again
            self.flush()

    def add(self, manifest: Path, values: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Have a manifest written soon.

        Args:
            manifest: where.
            values: JSON values.
            files: that it speaks for, and that nobody has flushed yet.

        Raises:
            OSError: some file cannot be written; ``filename`` says which.
        """
        self._waiting.pop(manifest, None)  # an older one has lost its place in the order
        self._waiting[manifest] = values, list(files)
        if time.monotonic() - self._flushed >= _EVERY_S:
            self.flush()

    def forget(self, manifest: Path) -> None:
        """What it speaks for is about to be made again."""
        self._waiting.pop(manifest, None)

    def flush(self) -> None:
        """Write all that waits."""
        if not self._waiting:
            return
        files = [file for _, of_one in self._waiting.values() for file in of_one]
        _sync(files)
        _sync({file.parent for file in files})
        written = [(io.temporary_of(manifest), manifest) for manifest in self._waiting]
        for (temporary, _), (values, _) in zip(written, self._waiting.values(), strict=True):
            with store.naming(temporary):
                temporary.write_text(json.dumps(io.with_seal(values), indent=1) + "\n")
        _sync([temporary for temporary, _ in written])
        for temporary, manifest in written:
            os.replace(temporary, manifest)
        _sync({manifest.parent for _, manifest in written})
        self._waiting, self._flushed = {}, time.monotonic()


def _sync(paths: Iterable[Path]) -> None:
    """Have the disk hold files, and the names in folders."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(lambda path: io.sync_folder(path) if path.is_dir() else io.sync_file(path), paths):
            pass
