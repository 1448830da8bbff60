"""Readers: every format, broken records, and sources that hold nothing."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lr2train.config import SourceConfig, UserError
from lr2train.data.sources import Tally, check, identity, read


def source(path, **values) -> SourceConfig:
    return SourceConfig(name="web", kind=values.pop("kind", "folder"), path=None if path is None else str(path), **values)


def all_of(config: SourceConfig) -> tuple[dict[str, str], Tally]:
    tally = Tally()
    return {document.id: document.text for document in read(config, tally)}, tally


def test_every_format_in_one_folder_in_fixed_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("from a file")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    parquet.write_table(pa.table({"text": ["row 0", "row 1"], "other": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "notes.md").write_text("not ours")
    found, tally = all_of(source(tmp_path))
    assert found == {
        "a.jsonl:0": "one",
        "a.jsonl:1": "two",
        "c.jsonl.gz:0": "zipped",
        "d.parquet:0": "row 0",
        "d.parquet:1": "row 1",
        "deep/b.txt": "from a file",
    }
    assert (tally.documents, tally.broken) == (6, 0)


def test_broken_records_are_counted_and_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n{"body": "no text"}\n{"text": 5}\n{"text": "  "}\n[1]\n{"text": "\xff"}\n{"text": "last"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no more")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    whole = gzip.compress(json.dumps({"text": "x" * 5000}).encode() + b"\n")
    (tmp_path / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, tally = all_of(source(tmp_path))
    assert list(found.values()) == ["good", "last"]
    assert tally.broken == 6 + 1 + 1 + 1 + 1


def test_one_file_and_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    found, _ = all_of(source(tmp_path / "a.jsonl", text_column="body"))
    assert found == {"a.jsonl:0": "one"}


def test_limits_are_never_exceeded(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(10)))
    assert len(all_of(source(tmp_path, max_documents=3))[0]) == 3
    found, tally = all_of(source(tmp_path, max_bytes=20))
    assert len(found) == 2
    assert tally.text_bytes == 16


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no file"):
        all_of(source(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"no document \(1 broken"):
        all_of(source(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        all_of(source(tmp_path / "gone"))
    with pytest.raises(UserError, match="path=None"):
        all_of(source(None))


def test_unknown_kinds_and_options_are_named(tmp_path):
    with pytest.raises(UserError, match="kind=web is not one of custom, folder, hub, stdlib"):
        all_of(source(tmp_path, kind="web"))
    with pytest.raises(UserError, match=r"options\.test is not an option.*tests"):
        all_of(source(None, kind="stdlib", options={"test": True}))
    with pytest.raises(UserError, match="unit=line"):
        all_of(source(None, kind="stdlib", options={"unit": "line"}))


def test_nothing_is_downloaded_by_surprise():
    with pytest.raises(UserError, match="allow_download=true"):
        all_of(SourceConfig(name="web", kind="hub", path="someone/some-data"))


def test_a_local_dataset_folder_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    found, tally = all_of(source(tmp_path, kind="hub"))
    assert found == {"train:0": "one"}
    assert tally.broken == 1


def test_a_dataset_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set.py").write_text("a script")
    for path in (tmp_path, tmp_path / "set.py"):
        with pytest.raises(UserError, match=r"data\.sources\.web\.path=.* cannot be read as a dataset \(HF_HUB_OFFLINE=1 is set\)"):
            all_of(source(path, kind="hub"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="cannot be read as a dataset.*gone"):
        all_of(source(tmp_path, kind="hub", options={"split": "gone"}))


def test_a_dataset_that_breaks_off_is_one_sentence(monkeypatch):
    def gated(*_, **__):
        yield {"text": "one"}
        raise PermissionError("403: the dataset is gated.\nAsk for access.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match=r"path=a/b cannot be read as a dataset: 403: the dataset is gated\. Ask for access; log in"):
        all_of(source("a/b", kind="hub", options={"allow_download": True}))


class Counting:
    """A reader of somebody else's: what ``target`` names."""

    def __init__(self, upto: int) -> None:
        self.upto = upto

    def __iter__(self):
        yield from ((f"number-{i}", f"this is {i}") for i in range(self.upto))
        yield "no pair"
        yield ("empty", "")


def custom(**values) -> SourceConfig:
    return SourceConfig(name="web", kind="custom", **{"target": f"{__name__}.Counting", "options": {"upto": 2}, **values})


def test_a_class_of_ones_own_is_read():
    check(custom())
    found, tally = all_of(custom())
    assert found == {"number-0": "this is 0", "number-1": "this is 1"}
    assert tally.broken == 2
    assert identity(custom()) == ""


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("target=nowhere.at.All cannot be imported", {"target": "nowhere.at.All"}),
        ("target=json.Nothing cannot be imported", {"target": "json.Nothing"}),
        ("target=Bare cannot be imported", {"target": "Bare"}),
        ("target=None cannot be imported", {"target": None}),
        ("cannot be built with options {'from': 1}", {"options": {"from": 1}}),
        ("cannot be built", {"target": "builtins.object", "options": {}}),
    ],
)
def test_a_class_that_cannot_be_built_is_named(words, values):
    with pytest.raises(UserError, match=words):
        all_of(custom(**values))


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (r"windows=\['middle'\] is not", {"windows": ["middle"]}),
        (r"windows=\[\] is not", {"windows": []}),
        ("max_tokens=0 is below 1", {"max_tokens": 0}),
        ("needs kind=custom", {"target": "a.B"}),
    ],
)
def test_bad_values_of_a_source_are_refused(words, values):
    with pytest.raises(UserError, match=words):
        check(SourceConfig(name="web", kind="stdlib", **values))


def test_the_standard_library_is_always_there():
    modules, _ = all_of(SourceConfig(name="python", kind="stdlib", max_documents=5))
    assert len(modules) == 5
    assert not any("site-packages" in name or name.startswith("test/") for name in modules)


def test_definitions_are_parts_of_their_module():
    found, _ = all_of(SourceConfig(name="python", kind="stdlib", max_documents=40, options={"unit": "definition"}))
    assert all("#" in name and (text.lstrip().startswith(("def ", "class ", "async def ", "@"))) for name, text in found.items())


def test_identity_changes_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    before = identity(source(tmp_path))
    (tmp_path / "b.txt").write_text("y")
    assert identity(source(tmp_path)) != before == identity(source(tmp_path / "a.txt"))
