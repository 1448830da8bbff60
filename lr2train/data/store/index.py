"""Megatron's ``.idx``: the lengths of a store's documents and where each begins in the ``.bin``.

Layout (little endian): magic 9 bytes, version u64 = 1, dtype code u8, n documents u64, n + 1 u64, lengths int32 [n],
byte offsets int64 [n], document index int64 [n + 1]. The document index is 0 … n, because each document is one
sequence.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_UINT16_VOCABULARY = 65500  # Megatron's own limit
_CUT_SHORT = "its .idx is cut short"


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored type of a token id."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class Index(NamedTuple):
    """The content of an ``.idx``."""

    dtype: np.dtype
    lengths: np.ndarray  # int32 [n]
    offsets: np.ndarray  # int64 [n], bytes

    @classmethod
    def parsed(cls, raw: np.ndarray) -> Index:
        """Views into the bytes of an ``.idx``, uint8.

        Raises:
            ValueError: the file is cut short or of another format; the text completes "the store is unusable: …".
        """
        if len(raw) < _HEADER.size:
            raise ValueError(_CUT_SHORT)
        magic, version, code, n, n_index = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != MAGIC or version != VERSION or code not in _DTYPES or n_index != n + 1:
            raise ValueError(
                "its .idx is not one that we write (Megatron version 1, uint16 or int32, a sequence a document)"
            )
        if len(raw) != _HEADER.size + 4 * n + 8 * n + 8 * (n + 1):
            raise ValueError(_CUT_SHORT)
        end = _HEADER.size + 4 * n
        # The offsets begin at an odd byte: their view is not aligned, which numpy allows.
        return cls(_DTYPES[code], raw[_HEADER.size : end].view("<i4"), raw[end : end + 8 * n].view("<i8"))


def packed(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The bytes of an ``.idx`` for documents of these lengths, int32 [n], stored back to back."""
    n = len(lengths)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    columns = (lengths.astype("<i4"), offsets.astype("<i8"), np.arange(n + 1, dtype="<i8"))
    return b"".join([_HEADER.pack(MAGIC, VERSION, _CODES[dtype], n, n + 1), *(column.tobytes() for column in columns)])
