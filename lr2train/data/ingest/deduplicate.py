"""Exact duplicates: documents whose texts have the same hash.

Choice: duplicates stay in their token stores and are marked in a file beside them, so another setting costs no
tokenising. The first document stays: held-out documents come before all training documents, so evaluation text is never
trained on; then the sources in their order. Cost: a duplicate takes up disk space, and near-duplicates are not found.

The marks (``<split>.usable.npy``, bool [documents]) are read by ``SourceStore.usable``; the planner leaves marked
documents out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.data.corpus import reopen, source_folder, source_store
from lr2train.data.store import HASH_BYTES, HOLDOUT, TRAIN, SourceStore, load_array
from lr2train.io import replacing

_MAX_EXAMPLES = 5
NONE, SOURCE, CORPUS = "none", "source", "corpus"


def mark_duplicates(folder: Path, names: Sequence[str], scope: str) -> dict[str, dict[str, Any]]:
    """Mark the duplicates of some sources.

    Args:
        folder: the run folder.
        names: sources of text, in their order.
        scope: ``none`` removes all marks; ``source`` compares within each source; ``corpus`` compares all sources.

    Returns:
        For each source the number of marked documents, their tokens, and examples; empty for ``none``.
    """
    if scope == NONE:
        for name in names:
            for split in (TRAIN, HOLDOUT):
                _remove_marks(folder, _marks_file(folder, name, split))
        return {}
    groups = [[name] for name in names] if scope == SOURCE else [list(names)]
    return {name: found for group in groups for name, found in _mark_group(folder, group).items()}


def _marks_file(folder: Path, name: str, split: str) -> Path:
    return source_folder(folder, name) / f"{split}.usable.npy"


def _mark_group(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mark every document whose text an earlier document of these sources has."""
    parts = [(name, split) for split in (HOLDOUT, TRAIN) for name in names]
    stores = [source_store(folder, *part) for part in parts]
    # int64 [documents of all stores], numbered through
    first = first_of_each(np.concatenate([store.hashes for store in stores]))
    starts = np.cumsum([0, *(len(store) for store in stores)])
    found: dict[str, dict[str, Any]] = {name: {"documents": 0, "tokens": 0, "examples": []} for name in names}
    for number, ((name, split), store) in enumerate(zip(parts, stores, strict=True)):
        original = first[starts[number] : starts[number + 1]]
        usable = original == np.arange(starts[number], starts[number + 1])
        _write_marks(folder, _marks_file(folder, name, split), usable)
        of_source = found[name]
        of_source["documents"] += int(np.count_nonzero(~usable))
        of_source["tokens"] += int(store.lengths[~usable].sum(dtype=np.int64))
        for document in np.flatnonzero(~usable)[: _MAX_EXAMPLES - len(of_source["examples"])]:
            kept = _origin(stores, starts, int(original[document]))
            of_source["examples"].append({"duplicate": store.origin(int(document)), "of": kept})
    return found


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """For each row of hashes, uint8 [n, 16], the number of the first equal row, int64 [n]."""
    keys = np.ascontiguousarray(hashes).view(np.uint64).reshape(len(hashes), HASH_BYTES // 8)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows stay in their order
    ordered = keys[order]
    new = np.ones(len(keys), bool)  # where a run of equal rows begins
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1] if len(keys) else order
    return first


def _origin(stores: Sequence[SourceStore], starts: np.ndarray, document: int) -> str:
    number = int(np.searchsorted(starts, document, side="right")) - 1
    return stores[number].origin(document - int(starts[number]))


def _remove_marks(folder: Path, path: Path) -> None:
    if path.exists():
        reopen(folder)
        path.unlink()


def _write_marks(folder: Path, path: Path, usable: np.ndarray) -> None:
    if path.exists() and np.array_equal(load_array(path), usable):
        return
    reopen(folder)
    with replacing(path) as file:
        np.save(file, usable)
