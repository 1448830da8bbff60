"""Samples on disk: one file for each task and length.

Choice: token ids lie in the file as int64 and are mapped into memory, so that the ranks of a machine share the pages
and samples of 128k tokens take no memory of their own. The file ends with a sealed description. Cost: 8 bytes a token
on disk, 105 MB for 100 samples of 128k tokens.

Layout: ids of all prompts (int64, little-endian); the description as JSON; length of the description in bytes (int64).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lr2train import io

_INT64 = np.dtype("<i8")


@dataclass(frozen=True)
class Made:
    """A sample without its place in a task.

    Attributes:
        tokens: int64 [T], the prompt.
        answers: the right answers.
        facts: for the record.
    """

    tokens: np.ndarray
    answers: tuple[str, ...]
    facts: dict[str, Any]


def write(path: Path, identity: str, samples: Iterable[Made]) -> None:
    """Write samples atomically; ``identity`` is the fingerprint of everything that decides them."""
    digest, notes = xxhash.xxh3_128(), []
    with io.replacing(path) as file:
        for one in samples:
            data = one.tokens.astype(_INT64).tobytes()
            digest.update(data)
            file.write(data)
            notes.append({"n_tokens": len(one.tokens), "answers": one.answers, "facts": one.facts})
        values = {"identity": identity, "ids": digest.hexdigest(), "samples": notes}
        text = json.dumps(io.with_seal(values)).encode()
        file.write(text)
        file.write(np.asarray([len(text)], dtype=_INT64).tobytes())


def read(path: Path, identity: str) -> list[Made] | None:
    """The samples of a file; None where there is no file, or the file is damaged or of another identity."""
    try:
        with path.open("rb") as file:
            # Private pages: a reader may write into its tensor, and the file stays as it is.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, ValueError):  # ValueError: an empty file
        return None
    described = _description(data)
    if described is None or described[0].get("identity") != identity:
        return None
    values, n_bytes = described
    ids = np.frombuffer(data, dtype=_INT64, count=n_bytes // _INT64.itemsize)
    if xxhash.xxh3_128(ids.data).hexdigest() != values["ids"]:
        return None
    samples, start = [], 0
    for note in values["samples"]:
        stop = start + note["n_tokens"]
        samples.append(Made(ids[start:stop], tuple(note["answers"]), note["facts"]))
        start = stop
    return samples


def _description(data: mmap.mmap) -> tuple[dict[str, Any], int] | None:
    """The description, and the bytes before it; None where its seal does not fit."""
    word = _INT64.itemsize
    length = int(np.frombuffer(data[-word:], dtype=_INT64)[0]) if len(data) >= word else 0
    start = len(data) - word - length
    if length <= 0 or start < 0 or start % word:
        return None
    try:
        values = json.loads(data[start : start + length])
    except ValueError:
        return None
    seal = values.pop("seal", None) if isinstance(values, dict) else None
    return (values, start) if seal is not None and seal == io.fingerprint(values) else None
