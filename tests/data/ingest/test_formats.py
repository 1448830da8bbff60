"""Formats: shards add up to the file, whatever their size; every kind of broken record is counted by its reason."""

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
from lr2train.data.ingest.formats import InputFile, ReadCounts, read_files, shards_of
from lr2train.data.ingest.sources import read, shards

LIMIT = 1 << 20


def zst(data: bytes) -> bytes:
    """One frame."""
    return pa.Codec("zstd").compress(data, asbytes=True)


def documents(path, shard_bytes: int, tally: ReadCounts | None = None, max_bytes: int = LIMIT) -> list[tuple[str, str]]:
    made = shards_of([InputFile(path.name, str(path))], shard_bytes)
    tally = tally or ReadCounts()
    return [(document.id, document.text) for shard in made for document in read_files(shard, "text", max_bytes, tally)]


def all_of(folder, **values) -> tuple[dict[str, str], ReadCounts]:
    tally = ReadCounts()
    config = SourceConfig(name="web", path=str(folder), **values)
    return {document.id: document.text for document in read(config, tally)}, tally


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), max_size=20), st.integers(1, 200), st.booleans()
)
@settings(max_examples=80, derandomize=True, deadline=None)
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


def test_row_groups_and_record_batches_add_up(tmp_path):
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
        assert len(shards_of([InputFile(name, str(path))], 9000)) > 2


def test_what_datasets_saved_is_read_without_its_caches(tmp_path):
    from datasets import Dataset

    saved = Dataset.from_dict({"text": ["one", "two", "three"]})
    saved.save_to_disk(str(tmp_path / "set"), num_shards=2)
    (tmp_path / "set" / "cache-0123.arrow").write_bytes((tmp_path / "set" / "data-00000-of-00002.arrow").read_bytes())
    found, tally = all_of(tmp_path)
    assert list(found.values()) == ["one", "two", "three"]
    assert tally.broken == 0


def test_zst_over_several_frames(tmp_path):
    lines = [json.dumps({"text": f"number {i}"}) + "\n" for i in range(30)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zst("".join(lines[i : i + 10]).encode()) for i in (0, 10, 20)))
    found, _ = all_of(tmp_path)
    assert found == {f"a.jsonl.zst:{i}": f"number {i}" for i in range(30)}


def test_small_files_share_a_shard_and_large_ones_are_cut(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("x" * 40)
    (tmp_path / "9.jsonl").write_text('{"text": "twenty two"}\n' * 10)
    made = shards(SourceConfig(name="web", path=str(tmp_path)), 100)
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
        b'{"text": "good"}\n{"text": \n{"body": "no text"}\n{"text": 5}\n{"text": "  "}\n[1]\n{"text": "\xff"}\n{"text": "\\ud800"}\n'
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
    with pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("body", pa.string())])) as writer:
        writer.write_table(pa.table({"body": ["x"]}))
    (tmp_path / "i.txt").write_text("w" * 3000)
    (tmp_path / "j.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "v" * 2001}).encode() + b"\n"))
    found, tally = all_of(tmp_path, max_document_bytes=2000)
    assert list(found.values()) == ["good", "last"]
    assert dict(tally.reasons) == REASONS
    assert all({"reason", "origin", "beginning"} == set(reject) and len(reject["beginning"]) <= 1000 for reject in tally.rejects)
    json.dumps(tally.rejects)
    assert {reject["reason"] for reject in tally.rejects} == set(REASONS)


def test_only_a_few_examples_of_a_reason_are_kept():
    tally = ReadCounts()
    for number in range(100):
        tally.reject("empty", f"a:{number}", b"\xff" * 1000)
    assert (tally.broken, len(tally.rejects)) == (100, 5)


@pytest.mark.parametrize("shard_bytes", [50, 1 << 20])
def test_a_line_that_cannot_be_held_is_passed_over(tmp_path, shard_bytes):
    buffer = io.BytesIO()
    for text in ("before", "q" * 300_000, "after"):
        buffer.write(json.dumps({"text": text}).encode() + b"\n")
    (tmp_path / "a.jsonl").write_bytes(buffer.getvalue())
    tally = ReadCounts()
    assert [text for _, text in documents(tmp_path / "a.jsonl", shard_bytes, tally, max_bytes=1000)] == ["before", "after"]
    assert dict(tally.reasons) == {"too large": 1}


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.binary()])
def test_one_bad_value_of_a_column_costs_its_row_alone(tmp_path, type):
    data = [b"one", b"t\xffo", "thrée".encode(), None]
    column = pa.array(data, pa.large_binary() if type == pa.large_string() else pa.binary()).view(type)
    table = pa.table({"text": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found, tally = all_of(tmp_path)
    assert found == {f"{name}:{row}": text for name in ("a.parquet", "b.arrow") for row, text in ((0, "one"), (2, "thrée"))}
    assert dict(tally.reasons) == {"bad UTF-8": 2, "no text": 2}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "text"}\n')
    assert list(all_of(tmp_path)[0].values()) == ["text", "text"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.txt").write_text("behind a link")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "web" / "self").symlink_to(tmp_path / "web")
    assert all_of(tmp_path / "web")[0] == {"link/deep/a.txt": "behind a link"}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_gone_ends_the_job_instead_of_counting_as_one_record(tmp_path, name):
    """As one that the disk or the network does not give for the moment: passed over, its documents would be lost for good."""
    (tmp_path / name).write_bytes(b"x")
    listed = shards_of([InputFile(name, str(tmp_path / name))], 1 << 20)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read .*No such file.*run the same command again"):
        list(read_files(listed[0], "text", LIMIT, ReadCounts()))


def test_a_source_that_is_broken_throughout_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "text"}\n' * 3)
    with pytest.raises(
        UserError, match=r"records are broken \(3 missing column; a\.jsonl@0 has content\); set .*\.text_column \(now text\) to content"
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
def test_dots_lead_into_records(tmp_path, write):
    write(ROWS, tmp_path)
    found, tally = all_of(tmp_path, text_column="meta.text")
    assert list(found.values()) == ["one", "four"]
    assert tally.broken == 2
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
def test_a_missing_column_is_answered_with_those_that_are_there(tmp_path, write, rows, asked, has, meant):
    write(rows, tmp_path)
    with pytest.raises(UserError, match=rf"missing column.*; a\.\w+(@0)? has {has}\); set .*\.text_column \(now {asked}\) to {meant}$"):
        all_of(tmp_path, text_column=asked)
    assert all_of(tmp_path, text_column=meant)[0], "the remedy leads on"


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_a_table_without_the_column_counts_with_all_its_rows_and_bytes(tmp_path, write):
    write([{"body": "x" * 100, "n": 1}] * 50, tmp_path)
    (tmp_path / "b.txt").write_text("text")
    _, tally = all_of(tmp_path)
    assert dict(tally.reasons) == {"missing column": 50}
    assert len(tally.rejects) == 1
    if write is as_arrow:  # parquet keeps equal strings once
        assert tally.lost_bytes >= 50 * 100


def test_every_broken_record_counts_with_its_bytes(tmp_path):
    lines = [b'{"text": "good"}', b"{", b'{"body": "other"}', b'{"text": "\xff"}', b'{"text": 5}', b'{"text": null}', b'{"text": " "}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.txt").write_bytes(b"\xff" * 30)
    _, tally = all_of(tmp_path)
    broken = sum(len(line) + 1 for line in lines[1:5])
    assert tally.lost_bytes == broken + 30, "null and white space are no text that is lost"
    assert tally.input_bytes == broken + 30 + len(lines[0]) + 1


def test_a_line_that_cannot_be_held_counts_with_its_bytes_and_takes_no_memory(tmp_path):
    class Long(io.RawIOBase):
        """A line of 300 MB that is nowhere."""

        left = 300 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            size = min(len(buffer), self.left)
            self.left -= size
            buffer[:size] = b"x" * size
            return size

    tracemalloc.start()
    size, line = formats._line(io.BufferedReader(Long()), 8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (size, line) == (300 << 20, None)
    assert peak < 32 << 20


def test_wide_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lr2train.data.ingest.tables._ROWS_BYTES", 10_000)
    rows = [f"{number:04d}" * 1000 for number in range(20)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=False)
    at_a_time = []
    values = tables._values
    monkeypatch.setattr(
        "lr2train.data.ingest.tables._values", lambda batch, column: at_a_time.append(batch.num_rows) or values(batch, column)
    )
    assert [text for _, text in documents(tmp_path / "a.parquet", LIMIT)] == rows
    assert max(at_a_time) <= 3


def compressed(lines: int) -> bytes:
    rng = random.Random(0)
    return gzip.compress(b"".join(json.dumps({"text": "0 " * 40 + str(rng.random())}).encode() + b"\n" for _ in range(lines)))


def test_a_cut_file_counts_as_if_half_of_its_text_were_gone(tmp_path):
    whole = compressed(4000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, tally = all_of(tmp_path)
    assert tally.lost_files == ["a.jsonl.gz"]
    assert tally.lost_bytes == pytest.approx(tally.input_bytes / 2, rel=0.05)
    assert tally.lost_bytes > 3 * len(whole) // 2, "of text, not of the compressed file"
    assert len(found) > 1500


def test_a_file_with_a_bad_place_counts_with_its_rest(tmp_path):
    member = compressed(12_000)
    (tmp_path / "a.jsonl.gz").write_bytes(member + b"no gzip" * (4 * len(member) // 7))
    found, tally = all_of(tmp_path)
    assert len(found) == 12_000
    assert tally.lost_bytes == pytest.approx(4 * len(gzip.decompress(member)), rel=0.1)
