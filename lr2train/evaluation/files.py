"""Published files of benchmarks: folders, JSON lines, and the cut in the middle of a prompt that is too long.

Choice: a record is checked when it is read, so a wrong file is one sentence before any model is loaded. A prompt is cut
as LongBench and InfiniteBench cut theirs: the middle tokens go, the rest is decoded, and the text is tokenised again.
So a prompt is the benchmark's own text, and the model sees the ids that a user of that text would get. Cost: a cut
prompt is tokenised twice, and a third time where the joint makes more tokens than the cut left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lr2train.config import UserError
from lr2train.evaluation.tokens import PromptTokenizer


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


TEXT, TEXTS, TEXT_OR_TEXTS = "a text", "a list of texts", "a text or a list of texts"
_KINDS: dict[str, Callable[[Any], bool]] = {
    TEXT: _is_text,
    TEXTS: _is_texts,
    TEXT_OR_TEXTS: lambda value: _is_text(value) or _is_texts(value),
}


@dataclass(frozen=True)
class Source:
    """The local copy of a benchmark.

    Attributes:
        key: the config key that names the folder.
        benchmark: its name, for sentences.
        get: how a user gets the files, for the end of a sentence: "<what is wrong>; <get>".
    """

    key: str
    benchmark: str
    get: str

    def folder(self, folder: str | Path | None) -> Path:
        """The folder that ``key`` names.

        Raises:
            UserError: ``folder`` is None, or is no folder.
        """
        if folder is None:
            raise UserError(f"{self.benchmark} is read from local files and {self.key} is null; {self.get}")
        if not Path(folder).is_dir():
            raise UserError(f"{self.key}={folder} is not a folder; {self.get}")
        return Path(folder)

    def records(self, path: Path, fields: Mapping[str, str], limit: int | None = None) -> list[dict[str, Any]]:
        """The first ``limit`` records of a file of JSON lines; empty lines do not count.

        Args:
            path: the file.
            fields: name -> TEXT, TEXTS or TEXT_OR_TEXTS, for each field that every record must have.
            limit: None: all.

        Raises:
            UserError: the file is missing, unreadable or empty, a line is no JSON object, or a record lacks a field.
        """
        found = []
        for number, line in self._lines(path):
            found.append(self._record(path, number, line, fields))
            if len(found) == limit:
                break
        if not found:
            raise UserError(f"{path} is empty; {self.get}")
        return found

    def refuse(self, path: Path, number: int | str, what: str) -> UserError:
        """The error for a record that has another form."""
        return UserError(f"{path}, record {number}, {what} ({self.key}); {self.get}")

    def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, line
        except FileNotFoundError:
            raise UserError(f"{path} does not exist ({self.key}); {self.get}") from None
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise UserError(f"{path} cannot be read, as {why} ({self.key}); {self.get}") from None

    def _record(self, path: Path, number: int, line: str, fields: Mapping[str, str]) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise self.refuse(path, number, "is not valid JSON") from None
        if not isinstance(record, dict):
            raise self.refuse(path, number, "is no JSON object")
        for name, kind in fields.items():
            if name not in record:
                raise self.refuse(path, number, f"has no field {name}")
            if not _KINDS[kind](record[name]):
                raise self.refuse(path, number, f"has a field {name} that is not {kind}")
        return record


@dataclass(frozen=True)
class FolderTask:
    """A task over published files; a benchmark's own class says how samples are made and graded.

    Attributes:
        source: of the benchmark, the same for all its tasks.
        name: of the task.
        folder: holds the benchmark's files.
        tokenizer: of the model.
        length_tokens: most tokens of a prompt with its answer.
        limit: most samples, from the beginning of the file; None: all.
    """

    source: ClassVar[Source]

    name: str
    folder: Path
    tokenizer: PromptTokenizer
    length_tokens: int
    limit: int | None = None

    @classmethod
    def of_folder(
        cls,
        names: Sequence[str],
        folder: str | Path | None,
        tokenizer: PromptTokenizer,
        length_tokens: int,
        limit: int | None = None,
    ) -> list[Self]:
        """The tasks ``names`` over the files in ``folder``.

        Raises:
            UserError: there is no such folder.
        """
        where = cls.source.folder(folder)
        return [cls(name, where, tokenizer, length_tokens, limit) for name in names]


@dataclass(frozen=True)
class Prompt:
    """A prompt that fits.

    Attributes:
        tokens: int64 [T].
        cut_tokens: tokens of the whole prompt that were cut out of its middle.
    """

    tokens: np.ndarray
    cut_tokens: int = 0


def cut_middle(tokenizer: PromptTokenizer, text: str, most_tokens: int, *, halves_apart: bool) -> Prompt:
    """A prompt of at most ``most_tokens`` tokens: its first and its last ``most_tokens // 2`` where it is longer.

    The kept tokens are decoded and tokenised again, as both benchmarks do. If that makes more than ``most_tokens``
    tokens, each side gives up a few more.

    Args:
        tokenizer: of the model.
        text: the whole prompt.
        most_tokens: with special tokens.
        halves_apart: each half is decoded by itself (LongBench), or both together (InfiniteBench).

    Raises:
        ValueError: ``most_tokens`` leaves no token of each side.
    """
    ids = tokenizer.encode(text)
    if len(ids) <= most_tokens:
        return Prompt(ids)
    half = most_tokens // 2
    while half > 0:
        sides: Sequence[np.ndarray] = (ids[:half], ids[-half:])
        kept = "".join(map(tokenizer.decode, sides if halves_apart else [np.concatenate(sides)]))
        again = tokenizer.encode(kept)
        if len(again) <= most_tokens:
            return Prompt(again, len(ids) - 2 * half)
        half -= max(1, (len(again) - most_tokens) // 8)  # a cut character costs several tokens and goes with its last
    raise ValueError(f"{most_tokens} tokens are too few for a prompt")


def fitted(
    tokenizer: PromptTokenizer, text: str, length_tokens: int, budget_tokens: int, task: str, *, halves_apart: bool
) -> Prompt:
    """``cut_middle`` to what ``length_tokens`` leaves beside ``budget_tokens`` of the answer.

    Raises:
        UserError: nothing is left.
    """
    try:
        return cut_middle(tokenizer, text, length_tokens - budget_tokens, halves_apart=halves_apart)
    except ValueError:
        raise UserError(
            f"{task} generates {budget_tokens} tokens, which leaves no room for a prompt in {length_tokens} tokens; "
            "set eval.lengths_tokens to a greater length"
        ) from None
