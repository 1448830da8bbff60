"""Manifests of finished stores, written in groups, each after the disk holds every file that it lists.

Choice: one flush to the disk costs milliseconds, and a hundred files that are flushed together cost little more. So a
finished manifest waits up to a second for others. Then the data is flushed first, and the manifests get their names
last, in the order in which they came. A manifest that exists is therefore true, after a kill and after a power cut.
Cost: a kill loses the work of the last second.
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

_FLUSH_EVERY_S = 1.0
_FLUSHES_AT_ONCE = 16  # a file system's journal takes them together


class ManifestWriter:
    """Writes manifests with their own checksums. Use as a context manager: the block's end writes the waiting ones.

    An OSError is the exception: a full disk would only be full again.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, tuple[dict[str, Any], list[Path]]] = {}  # in the order in which they came
        self._flushed = time.monotonic()

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):
            self.flush()

    def add(self, manifest: Path, values: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Have a manifest written within about a second. A waiting older version is dropped.

        Args:
            manifest: its path.
            values: JSON values.
            files: that the manifest lists and that are not yet flushed to the disk.

        Raises:
            OSError: a file cannot be written; ``filename`` says which.
        """
        self._waiting.pop(manifest, None)  # an older version loses its place in the order
        self._waiting[manifest] = values, list(files)
        if time.monotonic() - self._flushed >= _FLUSH_EVERY_S:
            self.flush()

    def drop(self, manifest: Path) -> None:
        """Forget a waiting manifest, because its files are about to be replaced."""
        self._waiting.pop(manifest, None)

    def flush(self) -> None:
        """Write all waiting manifests.

        Raises:
            OSError: a file cannot be written; ``filename`` says which.
        """
        if not self._waiting:
            return
        files = [file for _, listed in self._waiting.values() for file in listed]
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
    """Flush files, and the names in folders, to the disk."""
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
        for _ in pool.map(lambda path: io.sync_folder(path) if path.is_dir() else io.sync_file(path), paths):
            pass
