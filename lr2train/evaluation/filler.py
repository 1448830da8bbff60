"""Text that needles are hidden in: the held-out documents of a corpus, or a folder of text files.

Choice: a folder of texts behaves as a corpus does: it has a tokenizer and gives random stretches. Cost: its texts are
tokenised anew by every start; a book takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lr2train.config import UserError
from lr2train.data.corpus import HOLDOUT, Corpus
from lr2train.data.text import Text
from lr2train.evaluation.tokens import PromptTokenizer


class TextFolder:
    """The .txt files of a folder, in the order of their names, as the documents of a corpus.

    Args:
        folder: holds text files, in UTF-8.
        tokenizer: of the model that is asked.

    Raises:
        UserError: the folder holds no text; a file cannot be read.
    """

    def __init__(self, folder: Path, tokenizer: PromptTokenizer):
        self.folder, self._tokenizer = folder, tokenizer

    @property
    def bos(self) -> int | None:
        """Id that the tokenizer puts before a text; None where it puts none."""
        ids, bos = self._tokenizer.encode("a"), self._tokenizer.hf.bos_token_id
        return bos if len(ids) and bos == ids[0] else None

    def encode(self, text: str) -> np.ndarray:
        """int64 [n]: ids of a text without special tokens."""
        return self._tokenizer.encode_plain(text)

    @property
    def tokenizer(self) -> TextFolder:
        """What needles ask a corpus for: ``encode`` and ``bos``."""
        return self

    @cached_property
    def texts(self) -> list[str]:
        """The contents of the files."""
        found = [text for file in sorted(self.folder.glob("*.txt")) if (text := _read(file)).strip()]
        if not found:
            raise UserError(
                f"eval.essays={self.folder} holds no text in .txt files; set eval.essays to a folder that does"
            )
        return found

    def text(self, split: str = HOLDOUT) -> Text:
        """Random stretches of the texts; every split is the same."""
        return self._text

    @cached_property
    def _text(self) -> Text:
        return Text([_Documents([self.encode(text) for text in self.texts])], n_borders=1)  # type: ignore[list-item]


class _Documents:
    """Token arrays in memory, in the form of a token store; one border token ends each, as in a store."""

    usable = None

    def __init__(self, documents: Sequence[np.ndarray]):
        self._documents = documents
        self.lengths = np.array([len(document) + 1 for document in documents])

    def __len__(self) -> int:
        return len(self._documents)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._documents[document][start:stop]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} of eval.essays cannot be read ({error}); make it a text file in UTF-8") from error


def essays_of(source: Corpus | TextFolder, most_characters: int = 4_000_000) -> str:
    """Running text of a source, for haystacks: its files, or its held-out documents decoded.

    Args:
        source: held-out documents or text files.
        most_characters: enough for a prompt of a million tokens; a longer text ends there.
    """
    if isinstance(source, TextFolder):
        return "\n".join(source.texts)[:most_characters]
    source.text(HOLDOUT)  # refuses a corpus without held-out documents
    parts, n_characters, skipped = [], 0, set(source.tokenizer.special_ids)
    documents = source.documents(HOLDOUT)
    for number in range(len(documents)):
        parts.append(source.tokenizer.decode([one for one in documents[number].tolist() if one not in skipped]))
        n_characters += len(parts[-1])
        if n_characters >= most_characters:
            break
    return "\n".join(parts)[:most_characters]
