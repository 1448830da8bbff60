"""Decontamination: documents that share an n-gram of words with an evaluation set are left out.

Choice: n = 13 words in lower case without punctuation, as in GPT-3 (Brown et al., 2020, appendix C); a document with
one shared n-gram is left out whole. A word that no evaluation set contains breaks every n-gram around it, so most
documents cost one look-up a word. Cost: a book that quotes a question is lost. A record of fewer than n words is
compared whole, and not at all below ``SHORTEST`` words.
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

SHORTEST = 8  # words of an n-gram: shorter ones are shared by chance (GPT-3's own lower end)
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2**64 loses no word


class EvaluationNgrams:
    """The n-grams of the evaluation sets. A word is numbered from 1 on; 0 is a word that no evaluation set contains.

    Raises:
        UserError: a file is missing, or holds no text.
    """

    def __init__(self, config: DecontaminateConfig) -> None:
        self._number: dict[str, int] = {}
        ngrams: dict[int, set[bytes]] = {}  # by n; shorter records have n-grams of their own length
        for text in (text for file in config.files for text in _texts(Path(file))):
            words = [self._number.setdefault(word, len(self._number) + 1) for word in _words(text)]
            n = min(config.ngram, len(words))
            if n >= min(SHORTEST, config.ngram):
                ngrams.setdefault(n, set()).update(row.tobytes() for row in _windows(np.array(words, np.int64), n))
        self._ngrams = ngrams
        self._hashes: dict[int, np.ndarray] = {}
        for n, of_size in ngrams.items():
            self._hashes[n] = np.unique(_hashed(np.array([np.frombuffer(ngram, np.int64) for ngram in of_size])))

    def __len__(self) -> int:
        return sum(map(len, self._ngrams.values()))

    def find(self, text: str) -> str | None:
        """The first n-gram that a text shares with an evaluation set; None where it shares none."""
        words = _words(text)
        numbers = np.array([self._number.get(word, 0) for word in words], np.int64)
        for n, hashes in self._hashes.items():
            for start in _candidates(numbers, n, hashes):
                if numbers[start : start + n].tobytes() in self._ngrams[n]:  # hashes may collide
                    return " ".join(words[start : start + n])
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _windows(numbers: np.ndarray, n: int) -> np.ndarray:
    """All n-grams: int64 [len - n + 1, n], a view."""
    return np.lib.stride_tricks.sliding_window_view(numbers, n)


def _hashed(ngrams: np.ndarray) -> np.ndarray:
    """A polynomial hash of each row: [rows, n] -> uint64 [rows]."""
    value = np.zeros(len(ngrams), np.uint64)
    for column in range(ngrams.shape[1]):
        value = value * _MULTIPLIER + ngrams[:, column].astype(np.uint64)
    return value


def _candidates(numbers: np.ndarray, n: int, hashes: np.ndarray) -> Sequence[int]:
    """Starts of n-grams of known words whose hash is among the evaluation sets' hashes."""
    if len(numbers) < n:
        return []
    unknown = np.concatenate([[0], np.cumsum(numbers == 0)])
    starts = np.flatnonzero(unknown[n:] == unknown[:-n])  # no unknown word within
    found = np.isin(_hashed(_windows(numbers, n)[starts]), hashes)
    return starts[found].tolist()


def _texts(file: Path) -> Iterator[str]:
    """A .txt file whole; every string of a .jsonl file's records."""
    try:
        text = file.read_text(encoding="utf-8")
        # split("\n"), not splitlines(): a record may hold U+2028 and other line ends of Unicode
        lines = [line for line in text.split("\n") if line.strip()]
        is_jsonl = file.suffix == ".jsonl"
        texts = [string for line in lines for string in _strings(json.loads(line))] if is_jsonl else [text]
    except (OSError, ValueError) as error:
        key = "data.decontaminate.files"
        raise UserError(f"{key}: {file} cannot be read ({error}); name .txt or .jsonl files in UTF-8") from None
    if not any(text.strip() for text in texts):
        raise UserError(f"data.decontaminate.files: {file} holds no text; remove it from the list")
    yield from texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def recipe(config: DecontaminateConfig) -> str:
    """Fingerprint of everything that decides which documents are left out; empty without evaluation sets."""
    if not config.files:
        return ""
    return fingerprint([config.ngram, sorted(text for file in config.files for text in _texts(Path(file)))])
