"""Exact duplicates: documents whose text has the same hash.

Choice: documents stay in their stores and are marked in a file beside them, so that another setting costs no tokenising. The first one stays:
held-out documents come before all training documents, so what is measured on is never trained on, then sources in their order. Cost: a
duplicate takes up room on the disk; near-duplicates are not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.data.corpus import reopen, source_folder, source_store
from lr2train.data.store import HASH_BYTES, HOLDOUT, TRAIN, SourceStore, load_array
from lr2train.io import replacing

_EXAMPLES = 5
NONE, SOURCE, CORPUS = "none", "source", "corpus"


def mark(folder: Path, names: Sequence[str], scope: str) -> dict[str, dict[str, Any]]:
    """Mark duplicates of the named sources; returns what was found in each: documents, tokens, examples.

    Args:
        folder: the run folder.
        names: sources of text, in their order.
        scope: ``none``, ``source`` (duplicates within each) or ``corpus`` (over all of them).
    """
    if scope == NONE:
        for name in names:
            for split in (TRAIN, HOLDOUT):
                _unmark(folder, _usable_file(folder, name, split))
        return {}
    groups = [[name] for name in names] if scope == SOURCE else [list(names)]
    return {name: found for group in groups for name, found in _mark(folder, group).items()}


def _usable_file(folder: Path, name: str, split: str) -> Path:
    return source_folder(folder, name) / f"{split}.usable.npy"


def _mark(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    parts = [(name, split) for split in (HOLDOUT, TRAIN) for name in names]
    stores = [source_store(folder, *part) for part in parts]
    first = first_of_each(np.concatenate([store.hashes for store in stores]))
    starts = np.cumsum([0, *(len(store) for store in stores)])
    found: dict[str, dict[str, Any]] = {name: {"documents": 0, "tokens": 0, "examples": []} for name in names}
    for number, ((name, split), store) in enumerate(zip(parts, stores, strict=True)):
        original = first[starts[number] : starts[number + 1]]
        usable = original == np.arange(starts[number], starts[number + 1])
        _write(folder, _usable_file(folder, name, split), usable)
        about = found[name]
        about["documents"] += int(np.count_nonzero(~usable))
        about["tokens"] += int(store.lengths[~usable].sum(dtype=np.int64))
        for document in np.flatnonzero(~usable)[: _EXAMPLES - len(about["examples"])]:
            about["examples"].append({"duplicate": store.origin(int(document)), "of": _origin(stores, starts, int(original[document]))})
    return found


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """For each row of hashes, uint8 [n, 16], the number of the first row that equals it, int64 [n]."""
    keys = np.ascontiguousarray(hashes).view(np.uint64).reshape(len(hashes), HASH_BYTES // 8)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows stay in their order
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1] if len(keys) else order
    return first


def _origin(stores: Sequence[SourceStore], starts: np.ndarray, document: int) -> str:
    number = int(np.searchsorted(starts, document, side="right")) - 1
    return stores[number].origin(document - int(starts[number]))


def _unmark(folder: Path, path: Path) -> None:
    if path.exists():
        reopen(folder)
        path.unlink()


def _write(folder: Path, path: Path, usable: np.ndarray) -> None:
    if path.exists() and np.array_equal(load_array(path), usable):
        return
    reopen(folder)
    with replacing(path) as file:
        np.save(file, usable)
