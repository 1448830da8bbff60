"""Asking the disk for mapped tokens before they are touched.

Choice: touching a page that is not in memory waits for that page alone, again and again, so a whole piece is asked for at once and without waiting
(``madvise``). Where its last page is in memory already nothing is asked: the question costs a hundredth of the copy, the request a third of it.
Cost: an open file a shard; a piece of which only the beginning was dropped from memory is read page by page.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

_WORTH_LOOKING_BYTES = 16 * mmap.PAGESIZE  # a smaller piece is asked for faster than it is looked up


class ReadAhead:
    """Of one array; does nothing for one that is not mapped, and on a system without the call.

    Args:
        flat: tokens, mapped from the beginning of a file.
    """

    def __init__(self, flat: np.ndarray) -> None:
        self._file, self._mapped, self._bytes = -1, None, flat.itemsize
        mapped = getattr(flat, "_mmap", None)
        if mapped is None or not hasattr(mapped, "madvise"):
            return
        assert isinstance(flat, np.memmap) and flat.filename is not None
        mapped.madvise(mmap.MADV_RANDOM)  # read what is asked for and not what lies around it
        self._mapped = mapped
        if hasattr(os, "RWF_NOWAIT"):
            self._file = os.open(flat.filename, os.O_RDONLY | os.O_CLOEXEC)
            self._byte = [bytearray(1)]  # what is read is of no interest

    def __call__(self, begin: int, end: int) -> None:
        """Tokens [begin, end) will be read soon."""
        if self._mapped is None:
            return
        start, stop = begin * self._bytes, end * self._bytes
        if stop - start < _WORTH_LOOKING_BYTES or not self._in_memory(stop - 1):
            start -= start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def _in_memory(self, at: int) -> bool:
        if self._file < 0:
            return False
        try:
            return os.preadv(self._file, self._byte, at, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or the file system cannot tell
            return False

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)
