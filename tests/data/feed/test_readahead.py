"""Reading ahead asks for any range, changes no token, and leaves no file open."""

from __future__ import annotations

import os

import numpy as np
import pytest

from lr2train.data.feed.readahead import ReadAhead

TOKENS = 1_000_000


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "tokens.bin"
    np.arange(TOKENS, dtype=np.int32).tofile(made)
    return made


def test_tokens_that_left_the_memory_are_read_again(path):
    flat = np.memmap(path, np.int32, "r")
    ahead = ReadAhead(flat)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ahead(100_000, 300_000)
    assert np.array_equal(flat[100_000:300_000], np.arange(100_000, 300_000))


def the_system_can_tell(path) -> bool:
    """Whether the system answers for this file system; for some memory file systems it does not."""
    try:
        with path.open("rb") as file:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False


def test_tokens_that_were_just_read_are_known_to_be_in_memory(path):
    ahead = ReadAhead(np.memmap(path, np.int32, "r"))
    path.read_bytes()
    assert ahead._in_memory(4 * TOKENS - 1) == the_system_can_tell(path)
    assert not ahead._in_memory(4 * TOKENS)  # beyond the end of the file


def test_any_range_may_be_asked_for_and_the_file_is_closed(path):
    open_before = len(os.listdir("/proc/self/fd"))
    flat = np.memmap(path, np.int32, "r")
    ahead = ReadAhead(flat)
    for begin, end in ((0, 1), (0, TOKENS), (TOKENS - 1, TOKENS), (5000, 90_000)):
        ahead(begin, end)
    del flat, ahead
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_an_array_that_is_not_mapped_is_left_alone():
    open_before = len(os.listdir("/proc/self/fd"))
    flat = np.arange(9, dtype=np.uint16)
    ahead = ReadAhead(flat)
    ahead(2, 7)
    assert flat.tolist() == list(range(9))
    assert len(os.listdir("/proc/self/fd")) == open_before, "there is no file to ask about"
