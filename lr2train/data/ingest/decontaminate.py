"""Documents that hold text of an evaluation set: found by shared runs of words.

Choice: 13 words in a row, lower case, without punctuation, as GPT-3 did (Brown et al., 2020, appendix C) and others after it; a document with
one such run is left out whole. Words that no evaluation record has break every run at once, so most of a document costs one look-up a word.
Cost: a book that quotes a question is lost; a record of fewer words than a run is compared whole, and not at all below ``SHORTEST`` words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import DecontaminateConfig, UserError
from lr2train.io import fingerprint

SHORTEST = 8  # words of a run: fewer are found by chance (GPT-3's own lower end)
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's part of a hash is lost


class Contamination:
    """Runs of words of the evaluation sets.

    Raises:
        UserError: a file is missing, or holds no text.
    """

    def __init__(self, config: DecontaminateConfig) -> None:
        self._number: dict[str, int] = {}
        runs: dict[int, set[bytes]] = {}
        for text in (text for file in config.files for text in _texts(Path(file))):
            words = [self._number.setdefault(word, len(self._number) + 1) for word in _words(text)]
            size = min(config.ngram, len(words))
            if size >= min(SHORTEST, config.ngram):
                runs.setdefault(size, set()).update(row.tobytes() for row in _rows(np.array(words, np.int64), size))
        self._runs = runs
        self._hashes = {
            size: np.unique(_hashed(np.array([np.frombuffer(run, np.int64) for run in of_size]))) for size, of_size in runs.items()
        }

    def __len__(self) -> int:
        return sum(map(len, self._runs.values()))

    def find(self, text: str) -> str | None:
        """The first run of words that a text shares with an evaluation set, None where it shares none."""
        words = _words(text)
        known = np.array([self._number.get(word, 0) for word in words], np.int64)
        for size, hashes in self._hashes.items():
            for start in _candidates(known, size, hashes):
                if known[start : start + size].tobytes() in self._runs[size]:
                    return " ".join(words[start : start + size])
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _rows(words: np.ndarray, size: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(words, size)


def _hashed(rows: np.ndarray) -> np.ndarray:
    """A number for each row of words, uint64; equal rows have equal numbers."""
    value = np.zeros(len(rows), np.uint64)
    for column in range(rows.shape[1]):
        value = value * _MULTIPLIER + rows[:, column].astype(np.uint64)
    return value


def _candidates(known: np.ndarray, size: int, hashes: np.ndarray) -> Sequence[int]:
    """Where runs begin that consist of known words alone and whose hash is an evaluation set's."""
    if len(known) < size:
        return []
    unknown = np.concatenate([[0], np.cumsum(known == 0)])
    starts = np.flatnonzero(unknown[size:] == unknown[:-size])
    found = np.isin(_hashed(_rows(known, size)[starts]), hashes)
    return starts[found].tolist()


def _texts(file: Path) -> Iterator[str]:
    """A .txt file whole; every string of a .jsonl file's records."""
    try:
        text = file.read_text(encoding="utf-8")
        found = (
            [one for line in text.split("\n") if line.strip() for one in _strings(json.loads(line))] if file.suffix == ".jsonl" else [text]
        )
    except (OSError, ValueError) as error:
        raise UserError(f"data.decontaminate.files: {file} cannot be read ({error}); name .txt or .jsonl files in UTF-8") from None
    if not any(one.strip() for one in found):
        raise UserError(f"data.decontaminate.files: {file} holds no text; remove it from the list")
    yield from found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def recipe(config: DecontaminateConfig) -> str:
    """What decides which documents are left out; empty where nothing is compared."""
    if not config.files:
        return ""
    return fingerprint([config.ngram, sorted(text for file in config.files for text in _texts(Path(file)))])
