"""File formats: the splits of a file add up to the file, and every broken record is counted by its reason."""

from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest import formats, tables
from lr2train.data.ingest.formats import input_splits, read_files
from lr2train.data.ingest.records import InputFile, ReadCounts
from lr2train.data.ingest.sources import list_input, read_source

LIMIT = 1 << 20


def zst(data: bytes) -> bytes:
    """One frame."""
    return pa.Codec("zstd").compress(data, asbytes=True)


def documents(
    path,
    shard_bytes: int,
    counts: ReadCounts | None = None,
    max_bytes: int = LIMIT,
) -> list[tuple[str, str]]:
    made = input_splits([InputFile(path.name, str(path))], shard_bytes)
    counts = counts or ReadCounts()
    return [(document.id, document.text) for shard in made for document in read_files(shard, "text", max_bytes, counts)]


def all_of(folder, **values) -> tuple[dict[str, str], ReadCounts]:
    counts = ReadCounts()
    config = SourceConfig(name="web", path=str(folder), **values)
    return {document.id: document.text for document in read_source(config, counts)}, counts


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), max_size=20),
    st.integers(1, 200),
    st.booleans(),
)
@settings(max_examples=80)
def test_byte_ranges_of_a_jsonl_file_hold_every_line_once(tmp_path_factory, texts, shard_bytes, ends):
    lines = [json.dumps({"text": text}, ensure_ascii=False) if text != "x" else "" for text in texts]
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(("\n".join(lines) + ("\n" if ends else "")).encode())
    expected, place = [], 0
    for line in lines:  # line by line, nothing seeked
        if line and json.loads(line)["text"].strip():
            expected.append((f"a.jsonl@{place}", json.loads(line)["text"]))
        place += len(line.encode()) + 1
    assert documents(path, shard_bytes) == expected


def test_row_groups_and_record_batches_add_up_to_the_table(tmp_path):
    table = pa.table({"text": [f"row {i} " + "x" * i for i in range(500)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    expected = [(str(i), text) for i, text in enumerate(table["text"].to_pylist())]
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        for shard_bytes in (1, 9000, 1 << 30):
            path = tmp_path / name
            found = [(id.removeprefix(f"{name}:"), text) for id, text in documents(path, shard_bytes)]
            assert found == expected
        assert len(input_splits([InputFile(name, str(path))], 9000)) > 2


def test_a_saved_dataset_is_read_without_its_caches(tmp_path):
    from datasets import Dataset

    saved = Dataset.from_dict({"text": ["one", "two", "three"]})
    saved.save_to_disk(str(tmp_path / "set"), num_shards=2)
    (tmp_path / "set" / "cache-0123.arrow").write_bytes((tmp_path / "set" / "data-00000-of-00002.arrow").read_bytes())
    found, counts = all_of(tmp_path)
    assert list(found.values()) == ["one", "two", "three"]
    assert counts.broken == 0


def test_all_frames_of_a_zst_file_are_read(tmp_path):
    lines = [json.dumps({"text": f"number {i}"}) + "\n" for i in range(30)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zst("".join(lines[i : i + 10]).encode()) for i in (0, 10, 20)))
    found, _ = all_of(tmp_path)
    assert found == {f"a.jsonl.zst:{i}": f"number {i}" for i in range(30)}


def test_small_files_share_a_split_and_large_files_are_cut(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("x" * 40)
    (tmp_path / "9.jsonl").write_text('{"text": "twenty two"}\n' * 10)
    made = list_input(SourceConfig(name="web", path=str(tmp_path)), 100).splits
    assert [len(shard.files) for shard in made] == [2, 2, 2, 1, 1, 1]
    assert [(shard.start, shard.stop) for shard in made[3:]] == [(0, 100), (100, 200), (200, 230)]


REASONS = {
    "bad UTF-8": 3,
    "empty": 1,
    "invalid JSON": 2,
    "missing column": 4,
    "no text": 1,
    "too large": 4,
    "unreadable file": 4,
}


def test_every_reason_is_counted_and_sampled(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n{"body": "no text"}\n{"text": 5}\n{"text": "  "}\n'
        + b'[1]\n{"text": "\xff"}\n{"text": "\\ud800"}\n'
        + b"["
        + b"1" * 5
        + b"\n"
        + json.dumps({"text": "y" * 3000}).encode()
        + b"\n"
        + b'{"text": "'
        + b"z" * 200_000
        + b'"}\n{"text": "last"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no more")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    whole = gzip.compress(json.dumps({"text": "x" * 5000}).encode() + b"\n")
    (tmp_path / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f.jsonl.zst").write_bytes(zst(b'{"text": "fine"}\n')[:-6])
    (tmp_path / "g.arrow").write_bytes(b"no arrow at all, but long enough")
    with (
        pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("body", pa.string())])) as writer,
    ):
        writer.write_table(pa.table({"body": ["x"]}))
    (tmp_path / "i.txt").write_text("w" * 3000)
    (tmp_path / "j.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "v" * 2001}).encode() + b"\n"))
    found, counts = all_of(tmp_path, max_document_bytes=2000)
    assert list(found.values()) == ["good", "last"]
    assert dict(counts.reasons) == REASONS
    assert all(set(reject) == {"reason", "origin", "beginning"} for reject in counts.rejects)
    assert all(len(reject["beginning"]) <= 1000 for reject in counts.rejects)
    json.dumps(counts.rejects)
    assert {reject["reason"] for reject in counts.rejects} == set(REASONS)


def test_only_a_few_examples_of_a_reason_are_kept():
    counts = ReadCounts()
    for number in range(100):
        counts.count_broken("empty", f"a:{number}", b"\xff" * 1000)
    assert (counts.broken, len(counts.rejects)) == (100, 5)


@pytest.mark.parametrize("shard_bytes", [50, 1 << 20])
def test_a_too_long_line_is_skipped_and_counted_once(tmp_path, shard_bytes):
    buffer = io.BytesIO()
    for text in ("before", "q" * 300_000, "after"):
        buffer.write(json.dumps({"text": text}).encode() + b"\n")
    (tmp_path / "a.jsonl").write_bytes(buffer.getvalue())
    counts = ReadCounts()
    assert [text for _, text in documents(tmp_path / "a.jsonl", shard_bytes, counts, max_bytes=1000)] == [
        "before",
        "after",
    ]
    assert dict(counts.reasons) == {"too large": 1}


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.binary()])
def test_a_bad_value_in_a_column_loses_its_row_alone(tmp_path, type):
    data = [b"one", b"t\xffo", "thrée".encode(), None]
    column = pa.array(data, pa.large_binary() if type == pa.large_string() else pa.binary()).view(type)
    table = pa.table({"text": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found, counts = all_of(tmp_path)
    good = ((0, "one"), (2, "thrée"))
    assert found == {f"{name}:{row}": text for name in ("a.parquet", "b.arrow") for row, text in good}
    assert dict(counts.reasons) == {"bad UTF-8": 2, "no text": 2}


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "text"}\n')
    assert list(all_of(tmp_path)[0].values()) == ["text", "text"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_vanished_file_ends_the_job(tmp_path, name):
    """So does a file that the disk or the network fails to deliver: if it were skipped, its documents would be lost."""
    (tmp_path / name).write_bytes(b"x")
    listed = input_splits([InputFile(name, str(tmp_path / name))], 1 << 20)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read .*No such file.*run the same command again"):
        list(read_files(listed[0], "text", LIMIT, ReadCounts()))


def test_a_source_of_broken_records_alone_names_the_right_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "text"}\n' * 3)
    with pytest.raises(
        UserError,
        match=r"\(3 missing column; a\.jsonl@0 has content\); set .*\.text_column \(now text\) to content",
    ):
        all_of(tmp_path)


ROWS = [
    {"meta": {"text": "one"}, "id": "a"},
    {"meta": None, "id": "b"},
    {"meta": {"text": None}, "id": "c"},
    {"meta": {"text": "four"}, "id": "d"},
]
DEEP = [{"a": {"b": {"c": "deep"}}, "d": 1}]
LITERAL = [{"meta.text": "with a dot in its name", "meta": {"text": "inside"}}]


def as_jsonl(rows: list[dict], folder) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(rows: list[dict], folder) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def as_arrow(rows: list[dict], folder) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


in_every_format = pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_arrow])


@in_every_format
def test_dots_in_a_column_lead_into_nested_records(tmp_path, write):
    write(ROWS, tmp_path)
    found, counts = all_of(tmp_path, text_column="meta.text")
    assert list(found.values()) == ["one", "four"]
    assert counts.broken == 2
    for rows, column, text in ((DEEP, "a.b.c", "deep"), (LITERAL, "meta.text", "with a dot in its name")):
        write(rows, tmp_path)
        assert list(all_of(tmp_path, text_column=column)[0].values()) == [text]


@in_every_format
@pytest.mark.parametrize(
    ("rows", "asked", "has", "meant"),
    [
        (ROWS, "text", "meta.text, id", "meta.text"),
        (ROWS, "meta", "meta.text, id", "meta.text"),
        (ROWS, "meta.txt", "meta.text, id", "meta.text"),
        (DEEP, "a.b", "a.b.c", "a.b.c"),
        ([{"content": "long enough to be it", "lang": "en"}], "text", "content, lang", "content"),
        ([{"texts": "x", "body": "longer"}], "text", "texts, body", "texts"),
    ],
)
def test_a_missing_column_is_answered_with_the_columns_of_text(tmp_path, write, rows, asked, has, meant):
    write(rows, tmp_path)
    with pytest.raises(
        UserError,
        match=rf"missing column.*; a\.\w+(@0)? has {has}\); set .*\.text_column \(now {asked}\) to {meant}$",
    ):
        all_of(tmp_path, text_column=asked)
    assert all_of(tmp_path, text_column=meant)[0], "the remedy leads on"


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_a_table_without_the_column_counts_with_all_its_rows_and_bytes(tmp_path, write):
    write([{"body": "x" * 100, "n": 1}] * 50, tmp_path)
    (tmp_path / "b.txt").write_text("text")
    _, counts = all_of(tmp_path)
    assert dict(counts.reasons) == {"missing column": 50}
    assert len(counts.rejects) == 1
    if write is as_arrow:  # parquet keeps equal strings once
        assert counts.lost_bytes >= 50 * 100


def test_every_broken_record_counts_with_its_bytes(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{",
        b'{"body": "other"}',
        b'{"text": "\xff"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": " "}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.txt").write_bytes(b"\xff" * 30)
    _, counts = all_of(tmp_path)
    broken = sum(len(line) + 1 for line in lines[1:5])
    assert counts.lost_bytes == broken + 30, "null and white space are no text that is lost"
    assert counts.input_bytes == broken + 30 + len(lines[0]) + 1


def test_a_too_long_line_is_never_held_in_memory(tmp_path):
    class Long(io.RawIOBase):
        """A line of 300 MB that is made while it is read."""

        left = 300 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            size = min(len(buffer), self.left)
            self.left -= size
            buffer[:size] = b"x" * size
            return size

    tracemalloc.start()
    size, line = formats._read_line(io.BufferedReader(Long()), 8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (size, line) == (300 << 20, None)
    assert peak < 32 << 20


def test_wide_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lr2train.data.ingest.tables._BATCH_BYTES", 10_000)
    rows = [f"{number:04d}" * 1000 for number in range(20)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=False)
    at_a_time = []
    values = tables._values
    monkeypatch.setattr(
        "lr2train.data.ingest.tables._values",
        lambda batch, column: at_a_time.append(batch.num_rows) or values(batch, column),
    )
    assert [text for _, text in documents(tmp_path / "a.parquet", LIMIT)] == rows
    assert max(at_a_time) <= 3


def compressed(lines: int) -> bytes:
    rng = random.Random(0)
    return gzip.compress(
        b"".join(json.dumps({"text": "0 " * 40 + str(rng.random())}).encode() + b"\n" for _ in range(lines)),
    )


def test_a_truncated_file_counts_as_if_half_of_its_text_were_lost(tmp_path):
    whole = compressed(4000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, counts = all_of(tmp_path)
    assert counts.lost_files == ["a.jsonl.gz"]
    assert counts.lost_bytes == pytest.approx(counts.input_bytes / 2, rel=0.05)
    assert counts.lost_bytes > 3 * len(whole) // 2, "of text, not of the compressed file"
    assert len(found) > 1500


def test_a_file_damaged_in_the_middle_counts_with_its_rest(tmp_path):
    member = compressed(12_000)
    (tmp_path / "a.jsonl.gz").write_bytes(member + b"no gzip" * (4 * len(member) // 7))
    found, counts = all_of(tmp_path)
    assert len(found) == 12_000
    assert counts.lost_bytes == pytest.approx(4 * len(gzip.decompress(member)), rel=0.1)


def test_text_with_nul_characters_is_broken(tmp_path):
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "sound.txt").write_text("text of a file")
    found, counts = all_of(tmp_path)
    assert list(found) == ["sound.txt"]
    assert dict(counts.reasons) == {"NUL characters": 1}
