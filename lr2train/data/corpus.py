"""A prepared corpus on disk: tokenizer, token stores, segment tables, manifest.

``prepare`` writes a corpus, all other verbs open it.

    corpus.json                    manifest: fingerprint, L0, T, sources, counts
    tokenizer/                     a Hugging Face tokenizer folder
    store/<source>/train-<i>.*     training documents, one token shard each (lr2train.data.store)
    store/<source>/holdout-<i>.*   documents that no segment holds
    store/<source>/source.json     number of token shards, where the documents came from, counts
    segments.<window>.npy          the segment table of a window; plan.json and plan.txt report the mix that came out

Choice: documents are stored with their BOS and EOS, so the length of a document is its tokens in a segment. Cost:
another convention means tokenising again. A job opens a corpus once and hands it on: stores and the tokenizer are
opened when they are first asked for, and kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.data import integrity
from lr2train.data import tokenizer as tokenizers
from lr2train.data.batch import WINDOWS
from lr2train.data.plan import segment_table
from lr2train.data.plan.segment_table import SegmentTable
from lr2train.data.store import HOLDOUT, TRAIN, SourceStore, sealed, unreadable
from lr2train.data.text import Text
from lr2train.io import read_json

MANIFEST, TOKENIZER = "corpus.json", "tokenizer"
SOURCE = "source.json"
FORMAT = 2


def source_folder(folder: Path, source: str) -> Path:
    """Where the stores of a source lie."""
    return folder / "store" / source


def store_prefix(folder: Path, source: str, split: str, shard: int) -> Path:
    """Path of one store of a source, without suffix."""
    return source_folder(folder, source) / f"{split}-{shard:05d}"


def source_store(folder: Path, source: str, split: str = TRAIN) -> SourceStore:
    """All documents of a source and split, after stage 1.

    Raises:
        UserError: stage 1 has not finished the source.
    """
    shards = sealed(source_folder(folder, source) / SOURCE)["shards"]
    usable = source_folder(folder, source) / f"{split}.usable.npy"
    return SourceStore([store_prefix(folder, source, split, shard) for shard in range(shards)], usable)


def reopen(folder: Path) -> None:
    """Remove the manifest and the checksums, before any file of a finished corpus changes.

    So a corpus that is being changed cannot be opened until ``prepare`` has finished again.
    """
    for name in (integrity.CHECKSUMS, MANIFEST):
        (folder / name).unlink(missing_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(error, path) from None


class Documents(Sequence[np.ndarray]):
    """The documents of several stores as one sequence of token arrays, which are views of files."""

    def __init__(self, stores: Sequence[SourceStore]) -> None:
        self._stores = stores
        self._ends = list(accumulate(map(len, stores)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        store = bisect_right(self._ends, index)
        return self._stores[store][index - (self._ends[store] - len(self._stores[store]))]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(store.lengths.astype(np.int64) for store in self._stores)])


class Corpus:
    """An opened corpus.

    Attributes:
        folder: where the corpus lies.
        manifest: content of its corpus.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._stores: dict[str, list[SourceStore]] = {}

    @classmethod
    def open(cls, path: str | Path | None) -> Corpus:
        """Open the run folder of ``prepare``; reads the manifest alone.

        Raises:
            UserError: the folder holds no finished corpus, or a corpus of another format.
        """
        if path is None or not _is_file(Path(path) / MANIFEST):
            raise UserError(
                f"data.path={path} holds no finished corpus ({MANIFEST}); run prepare and set data.path to its run "
                "folder"
            )
        manifest = read_json(Path(path) / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"data.path={path} is a corpus of format {manifest.get('format')}, this version reads {FORMAT}; run "
                "prepare again"
            )
        return cls(Path(path), manifest)

    @property
    def fingerprint(self) -> str:
        """Stands for all tokens and segments."""
        return self.manifest["fingerprint"]

    @property
    def original_window_tokens(self) -> int:
        """L0, which decides a document's window."""
        return self.manifest["original_window_tokens"]

    @property
    def segment_tokens(self) -> int:
        """T, the length of its segments."""
        return self.manifest["segment_tokens"]

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order in which a segment table's ``source`` column counts them."""
        return [source["name"] for source in self.manifest["sources"]]

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer folder."""
        return self.folder / TOKENIZER

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer of the stored tokens."""
        return tokenizers.load(str(self.tokenizer_folder))

    def refuse_other_tokenizer(self, n_ids: int, model_folder: Path | None) -> None:
        """Refuse a corpus whose token ids mean something else to a model.

        Args:
            n_ids: size of the model's embedding table.
            model_folder: holds the model's tokenizer.json; without the folder or the file, vocabularies are not
                compared.

        Raises:
            UserError: the corpus has more ids than the model knows, or the vocabularies differ.
        """
        if self.vocab_size > n_ids:
            raise UserError(
                f"data.path={self.folder} uses {self.vocab_size} token ids and the model knows {n_ids}; prepare the "
                "corpus with the model's own tokenizer (data.tokenizer)"
            )
        file = (model_folder or self.folder / "none") / "tokenizer.json"
        if file.exists() and not self.tokenizer.same_ids(tokenizers.load(str(file))):
            raise UserError(
                f"data.path={self.folder} was tokenised by another tokenizer than the model's in {model_folder}; "
                f"prepare it again with data.tokenizer={model_folder}"
            )

    def stores(self, split: str = TRAIN) -> list[SourceStore]:
        """One store for each source, in the order of ``source_names``; opened once for each split."""
        if split not in self._stores:
            self._stores[split] = [source_store(self.folder, name, split) for name in self.source_names]
        return self._stores[split]

    def verify(self, full: bool = True) -> int:
        """Compare the files with their checksums; a file that passed and has not changed is not read again.

        Args:
            full: False compares the sizes alone.

        Returns:
            Bytes that were read.

        Raises:
            UserError: a file is missing, cut short or changed.
        """
        shards = [
            (source["name"], split, shard)
            for source in self.manifest["sources"]
            for split in (TRAIN, HOLDOUT)
            for shard in range(source["shards"])
        ]
        return integrity.verify_corpus(self.folder, [store_prefix(self.folder, *shard) for shard in shards], full)

    def documents(self, split: str = TRAIN) -> Documents:
        """Token arrays of a split, BOS and EOS included. Needle documents are never held out."""
        assert split in (TRAIN, HOLDOUT)
        return Documents(self.stores(split))

    def text(self, split: str = TRAIN) -> Text:
        """Random stretches of a split's text.

        Raises:
            UserError: the split has no document.
        """
        text = Text(self.stores(split), self.tokenizer.n_borders)
        if not text.tokens:
            raise UserError(
                f"the corpus {self.folder} has no {split} document; prepare it with more documents, or another "
                "data.holdout"
            )
        return text

    def segment_table(self, window: str) -> SegmentTable:
        """The segment table of one window, mapped.

        Raises:
            UserError: the table's file is missing or cut short.
        """
        assert window in WINDOWS
        return segment_table.read(segment_table.file_of(self.folder, window), self.segment_tokens)
