"""Segment tables on disk: reused while nothing that decides them changes, refused when damaged, reported."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from lr2train import prepare as verb
from lr2train.config import BucketConfig, Config, OverLong, SourceConfig, UserError
from lr2train.data.batch import LONG, SHORT, WINDOWS
from lr2train.data.corpus import Corpus
from lr2train.data.plan import packing, segment_table
from lr2train.prepare import prepare


def config_of(folder, **changes) -> Config:
    """Some modules of the standard library: L0 128, T 512."""
    config = Config(name="corpus", runs_folder=str(folder))
    config.model.original_window_tokens = 128
    given = {"segment_tokens": 512, "vocab_size": 400, "holdout": 0.1, "align_sp": [2, 4], **changes}
    config.data.sources = [
        SourceConfig(name="definitions", kind="stdlib", max_bytes=80_000, options={"unit": "definition"})
    ]
    for key, value in given.items():
        setattr(config.data, key, value)
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("runs"))
    return config, prepare(config), Corpus.open(f"{config.runs_folder}/corpus")


def table_of(lengths: list[int]) -> segment_table.SegmentTable:
    documents = packing.whole_documents(np.zeros(len(lengths)), np.arange(len(lengths)), np.array(lengths))
    return packing.pack_short(documents, 64, 2, np.random.default_rng(0))


def test_a_table_comes_back_as_views_of_its_file(tmp_path):
    written = table_of([7, 30, 2, 9, 31])
    about = segment_table.write(tmp_path / "p.npy", written)
    read = segment_table.read(tmp_path / "p.npy", 64)
    assert read.n_segments == written.n_segments and read.tokens == written.tokens
    for column in segment_table.COLUMNS:
        assert getattr(read, column).tolist() == getattr(written, column).tolist()
        assert isinstance(getattr(read, column), np.memmap)
    assert about["bytes"] == (tmp_path / "p.npy").stat().st_size == 128 + 24 * 5
    segment_table.verify(tmp_path / "p.npy", about)


def test_an_empty_table_comes_back(tmp_path):
    segment_table.write(tmp_path / "p.npy", table_of([]))
    assert segment_table.read(tmp_path / "p.npy", 64).n_segments == 0


@pytest.mark.parametrize("place", [3, 130, -1])
def test_a_flipped_bit_of_a_table_is_found(tmp_path, place):
    about = segment_table.write(tmp_path / "p.npy", table_of([7, 30, 2, 9, 31]))
    data = bytearray((tmp_path / "p.npy").read_bytes())
    data[place] ^= 4
    (tmp_path / "p.npy").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"p\.npy .*checksum"):
        segment_table.verify(tmp_path / "p.npy", about)


def test_a_table_that_is_cut_or_missing_or_another_array_is_refused(tmp_path):
    about = segment_table.write(tmp_path / "p.npy", table_of([7, 30, 2, 9, 31]))
    os.truncate(tmp_path / "p.npy", 200)
    for call in (
        lambda: segment_table.verify(tmp_path / "p.npy", about),
        lambda: segment_table.read(tmp_path / "p.npy", 64),
    ):
        with pytest.raises(UserError, match=r"p\.npy is unusable .*run prepare again"):
            call()
    with pytest.raises(UserError, match=r"none\.npy is unusable"):
        segment_table.read(tmp_path / "none.npy", 64)
    np.save(tmp_path / "p.npy", np.zeros((6, 3)))
    with pytest.raises(UserError, match=r"p\.npy .*float64 \[6, 3\]"):
        segment_table.read(tmp_path / "p.npy", 64)


def test_the_manifest_and_the_report_count_the_document_spans(prepared):
    _, result, corpus = prepared
    for window in WINDOWS:
        table, said = corpus.segment_table(window), result["windows"][window]
        assert (said["segments"], said["planned_tokens"]) == (table.n_segments, table.tokens)
        each = said["documents_per_segment"]
        assert each["mean"] == pytest.approx(len(table.segment) / table.n_segments, abs=1e-3)
        assert sum(each["segments"]) == table.n_segments
    report = json.loads((corpus.folder / "plan.json").read_text())
    assert report["cells"] == result["mix"]["cells"]
    text = verb.table(result)
    assert "definitions" in text and f"{result['windows'][SHORT]['segments']} segments" in text


def test_no_short_document_crosses_a_sequence_shard_of_any_size_asked_for(prepared):
    _, _, corpus = prepared
    table = corpus.segment_table(SHORT)
    for shards in (2, 4):
        size = 512 // shards
        assert (table.offset // size == (table.stop - table.start + table.offset - 1) // size).all()


@pytest.mark.parametrize(
    "change",
    [
        {"short_tokens": 3000, "max_repeats": 99.0},
        {"long_tokens": 3000, "max_repeats": 3.5},
        {"align_sp": 2},
        {"over_long": OverLong.truncate},
        {"keep_below": {"definitions": 0.5}},
        {"buckets": [BucketConfig(name="to_300", to_tokens=300)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_mix_makes_other_segments_of_the_same_tokens(prepared, tmp_path, change):
    """Hard links to a corpus' stores and tokenizer are the start of another corpus: only its segments are made."""
    config, result, corpus = prepared
    for part in ("store", "tokenizer"):
        shutil.copytree(corpus.folder / part, tmp_path / "corpus" / part, copy_function=os.link)
    os.link(corpus.folder / "tokenizer.manifest.json", tmp_path / "corpus" / "tokenizer.manifest.json")
    tokens = (corpus.folder / "store" / "definitions" / "train-00000.bin").stat()
    changed = prepare(config_of(tmp_path, **change))
    assert (tmp_path / "corpus" / "store" / "definitions" / "train-00000.bin").stat().st_ino == tokens.st_ino, (
        "tokenised again"
    )
    assert changed["fingerprint"] != result["fingerprint"]
    assert prepare(config)["fingerprint"] == result["fingerprint"], "the first corpus has changed"


def test_a_damaged_table_is_not_reused(tmp_path):
    config = config_of(tmp_path)
    prepare(config)
    file = segment_table.file_of(tmp_path / "corpus", LONG)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"segments\.long\.npy"):
        prepare(config)
    file.unlink()
    with pytest.raises(UserError, match=r"segments\.long\.npy"):
        Corpus.open(tmp_path / "corpus").segment_table(LONG)


def test_tokens_over_the_limit_are_printed_as_lost(tmp_path, capsys):
    result = prepare(config_of(tmp_path, over_long=OverLong.truncate))
    stored = Corpus.open(tmp_path / "corpus").documents().lengths
    over = stored[stored > 512]
    assert result["lost_tokens"]["truncated"] == (over - 512).sum() > 0
    assert f"{result['lost_tokens']['truncated']:,} over the limit" in capsys.readouterr().out


def test_documents_in_no_bucket_are_logged(tmp_path, capsys):
    prepare(config_of(tmp_path, buckets=[BucketConfig(name="to_300", to_tokens=300)]))
    stored = Corpus.open(tmp_path / "corpus").documents().lengths
    outside = stored[stored > 300]
    assert f"{len(outside)} documents with {outside.sum()} tokens lie in no bucket" in capsys.readouterr().err


def test_a_source_without_documents_of_a_bucket_is_logged_with_its_share(tmp_path, capsys):
    """The other sources take the share, so the mix over sources differs from the weights."""
    (tmp_path / "a.txt").write_text(
        "".join(map(str, np.random.default_rng(0).integers(10, size=420)))
    )  # 129 to 300 tokens
    ranges = [BucketConfig(name="to_300", to_tokens=300), BucketConfig(name="rest", above_tokens=300, weight=3)]
    config = config_of(tmp_path / "runs", holdout=0.0, buckets=ranges, long_tokens=4000, max_repeats=99.0)
    config.data.sources.append(SourceConfig(name="a", path=str(tmp_path / "a.txt")))
    prepare(config)
    err = capsys.readouterr().err
    assert "a has no long document of bucket rest, so the other sources take its share of 1500 tokens" in err
    assert "of bucket to_300" not in err
