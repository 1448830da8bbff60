"""Tokens of many documents in flat files: Megatron's ``.bin/.idx`` with our sidecars beside them.

A *store* is one token shard of a source and one split (``store/<source>/train-00003.*``). ``SourceStore`` reads the
token shards of a source as one sequence of documents.

Choice: Megatron's own format, so that other tools read it. Tokens are uint16 below Megatron's limit of 65500 entries
and int32 above, because the format has no code for uint32. A store appears whole or not at all: each file is written
under a temporary name and renamed, and the manifest with all checksums comes last. Cost: nothing is appended to a
finished store, and a source of many token shards is many files.

| file | holds |
|---|---|
| ``.bin`` | the documents' tokens, back to back |
| ``.idx`` | lengths and byte offsets (``index``) |
| ``.lengths.npy`` | int32 [n]: the lengths again, for planning, which needs nothing else |
| ``.targets.npy`` | int64: places in ``.bin`` of the tokens that are learned; empty where all are |
| ``.hashes.npy`` | uint8 [n, 16]: blake2b of each document's text |
| ``.origins.txt`` | a line for each document: its origin as a JSON string |
| ``.json`` | the manifest: counts, fingerprint, size and SHA-256 of each file, and its own checksum; written last |
"""

from lr2train.data.store.files import (
    HOLDOUT,
    TRAIN,
    broken,
    check_sizes,
    finished,
    load_array,
    naming,
    sealed,
    suffixed,
    unreadable,
)
from lr2train.data.store.index import token_dtype
from lr2train.data.store.open_files import allow_open_files
from lr2train.data.store.reader import SourceStore, Store
from lr2train.data.store.writer import HASH_BYTES, StoreWriter, text_hash

__all__ = [
    "HASH_BYTES",
    "HOLDOUT",
    "TRAIN",
    "SourceStore",
    "Store",
    "StoreWriter",
    "allow_open_files",
    "broken",
    "check_sizes",
    "finished",
    "load_array",
    "naming",
    "sealed",
    "suffixed",
    "text_hash",
    "token_dtype",
    "unreadable",
]
