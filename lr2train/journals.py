"""A journal of finished work: one JSON line an entry, appended as soon as it is computed, each with a checksum.

Choice: a line that a kill cut short, or that a disk damaged, is taken out of the file when the journal is read, and its
work is done again. Cost: an entry that two processes wrote at the same time is lost; only rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lr2train import io
from lr2train.config import UserError


def read(file: Path, keys: Collection[str]) -> tuple[list[dict[str, Any]], int]:
    """The entries that have all ``keys``, and the number of damaged lines.

    Damaged lines are removed from the file, so the next append starts on a line of its own.
    """
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
    parsed = [(line, _parsed(line, keys)) for line in lines]
    good = [(line, entry) for line, entry in parsed if entry is not None]
    if len(good) < len(lines):
        io.write_text(file, "".join(line for line, _ in good))
    return [entry for _, entry in good], len(lines) - len(good)


def append(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write entries at the end of the journal.

    Raises:
        UserError: the disk is full.
    """
    try:
        with file.open("a") as stream:
            stream.write("".join(line_of(entry) for entry in entries))
    except OSError as error:  # a full disk; the next start removes the line that was cut short
        raise UserError(
            f"{file} cannot be written ({error.strerror}); free some room on that disk, and run the "
            "same command again to go on"
        ) from error


def line_of(entry: dict[str, Any]) -> str:
    """An entry as a line, with its checksum: a damaged number would change a result."""
    plain = io.finite(entry)
    return json.dumps({**plain, "check": io.fingerprint(plain)}, allow_nan=False) + "\n"


def _parsed(line: str, keys: Collection[str]) -> dict[str, Any] | None:
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return None
    if not isinstance(entry, dict) or not {*keys, "check"} <= entry.keys():
        return None
    return entry if entry.pop("check") == io.fingerprint(entry) else None
