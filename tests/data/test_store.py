"""Stores come back as written, in Megatron's layout; a damaged one is refused; an interrupted one is none."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.data.integrity import verify_stores
from lr2train.data.store import Store, StoreWriter, finished, token_dtype


def write(prefix, documents, vocab_size=1000):
    with StoreWriter(prefix, vocab_size, {"fingerprint": "abc", "broken": 2}) as writer:
        for document in documents:
            writer.add(document)


@given(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), max_size=12), st.sampled_from([1000, 200_000]))
@settings(max_examples=40)
def test_documents_come_back_as_written(tmp_path_factory, documents, vocab_size):
    folder = tmp_path_factory.mktemp("store")
    prefix = folder / "web"
    write(prefix, documents, vocab_size)
    store = Store(prefix)
    assert [document.tolist() for document in store] == documents
    assert store.dtype == (np.uint16 if vocab_size == 1000 else np.int32)
    assert store.flat.tolist() == [token for document in documents for token in document]
    assert np.load(f"{prefix}.lengths.npy").tolist() == [len(document) for document in documents]
    assert [store.read(i, 1, 3).tolist() for i in range(len(documents))] == [document[1:3] for document in documents]
    assert verify_stores(folder, [prefix]) > 0


def test_the_index_is_megatrons_byte_for_byte(tmp_path):
    write(tmp_path / "s", [[5, 6, 7], [8]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 1, 0, 6, 0, 1, 2)
    assert (tmp_path / "s.idx").read_bytes() == expected
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<4H", 5, 6, 7, 8)


def test_the_token_type_follows_megatrons_rule():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    write(tmp_path / "s", [[1, 2, 3], [4, 5, 6, 7]])
    file = tmp_path / f"s{suffix}"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"/s is unusable: its \{suffix} .*remove .*/s\.\* and run prepare"):
        Store(tmp_path / "s")


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.idx is missing"):
        Store(tmp_path / "nothing")
    write(tmp_path / "s", [[1]])
    (tmp_path / "s.idx").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"its \.idx is not one that we write"):
        Store(tmp_path / "s")


def test_changed_tokens_fail_the_checksum(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]])
    (tmp_path / "s.bin").write_bytes(struct.pack("<3H", 1, 2, 4))
    with pytest.raises(UserError, match=r"s\.bin .*checksum"):
        verify_stores(tmp_path, [tmp_path / "s"])


def test_an_interrupted_writer_leaves_no_finished_store(tmp_path):
    write(tmp_path / "s", [[1]])
    documents = iter([[2], [-1]])  # the second is no token id
    with pytest.raises(AssertionError):
        write(tmp_path / "s", documents)
    assert finished(tmp_path / "s", "abc") is None
    assert Store(tmp_path / "s")[0].tolist() == [1], "the old files are still whole"


def test_a_store_counts_as_finished_under_its_own_fingerprint_only(tmp_path):
    write(tmp_path / "s", [[1, 2], [3]])
    manifest = finished(tmp_path / "s", "abc")
    assert manifest is not None
    assert (manifest["documents"], manifest["tokens"], manifest["broken"]) == (2, 3, 2)
    assert finished(tmp_path / "s", "other") is None
