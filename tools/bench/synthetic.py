"""A corpus of random tokens with stores and segment tables as ``prepare`` writes them, for benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lr2train.data import corpus, store, tokenizer
from lr2train.data.batch import LONG, SHORT
from lr2train.data.plan import packing, segment_table
from lr2train.io import seal, write_json

ORIGINAL_WINDOW_TOKENS = 8192
_SHARDS = 2  # token shards of each source


def make(
    folder: Path, tokens: int, segment_tokens: int, original_window_tokens: int = ORIGINAL_WINDOW_TOKENS, seed: int = 0
) -> corpus.Corpus:
    """A corpus of two sources with half of the tokens each: short and long documents.

    The median short document is an eighth of the original window. The median long document is three quarters of a
    segment; the longest is three segments.
    """
    rng = np.random.default_rng(seed)
    vocabulary = tokenizer.train(["a"], tokenizer.SMALLEST_VOCABULARY)
    vocabulary.save(folder / corpus.TOKENIZER)
    borders = {SHORT: (2, original_window_tokens), LONG: (original_window_tokens + 1, 3 * segment_tokens)}
    medians = {
        SHORT: original_window_tokens / 8,
        LONG: segment_tokens * 0.75,
    }  # long: near the middle of the paper's Table 1
    pieces = {}
    for source, window in enumerate(borders):
        lengths = _lengths(rng, tokens // 2, medians[window], *borders[window])
        _write_source(folder, window, lengths, rng)
        documents = packing.whole_documents(np.full(len(lengths), source), np.arange(len(lengths)), lengths)
        pack = packing.pack_short if window == SHORT else packing.pack_long
        pieces[window] = pack(documents, segment_tokens)
    head = {
        "format": corpus.FORMAT,
        "fingerprint": f"synthetic-{tokens}-{seed}",
        "original_window_tokens": original_window_tokens,
    }
    plans = {
        window: segment_table.write(segment_table.file_of(folder, window), table) for window, table in pieces.items()
    }
    sources = [{"name": window} for window in borders]
    write_json(folder / corpus.MANIFEST, {**head, "segment_tokens": segment_tokens, "sources": sources, "plans": plans})
    return corpus.Corpus.open(folder)


def _lengths(rng: np.random.Generator, tokens: int, median: float, low: int, high: int) -> np.ndarray:
    """Lognormal lengths that sum to about ``tokens``."""
    drawn = np.clip(rng.lognormal(np.log(median), 1.0, max(16, int(tokens / median))), low, high).astype(np.int32)
    return drawn[: max(1, int(np.searchsorted(drawn.cumsum(dtype=np.int64), tokens)))]


def _write_source(folder: Path, name: str, lengths: np.ndarray, rng: np.random.Generator) -> None:
    noise = rng.integers(2, tokenizer.SMALLEST_VOCABULARY, 1 << 22).astype(np.uint16)
    for split in (corpus.TRAIN, corpus.HOLDOUT):
        for shard, part in enumerate(np.array_split(lengths, _SHARDS)):
            prefix = corpus.store_prefix(folder, name, split, shard)
            with store.StoreWriter(prefix, tokenizer.SMALLEST_VOCABULARY, {"fingerprint": "synthetic"}) as writer:
                for length in part.tolist() if split == corpus.TRAIN else ():
                    at = int(rng.integers(len(noise) - length)) if length < len(noise) else 0
                    writer.add(noise[at : at + length])
    seal(corpus.source_folder(folder, name) / corpus.SOURCE, {"shards": _SHARDS})
