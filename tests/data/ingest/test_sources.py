"""Sources: each kind lists and reads its input, and names the key of what it cannot read."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.records import ReadCounts
from lr2train.data.ingest.sources import check_source, identity, list_input, read_source


def source(path, **values) -> SourceConfig:
    return SourceConfig(
        name="web",
        kind=values.pop("kind", "folder"),
        path=None if path is None else str(path),
        **values,
    )


def all_of(config: SourceConfig) -> tuple[dict[str, str], ReadCounts]:
    counts = ReadCounts()
    return {document.id: document.text for document in read_source(config, counts)}, counts


def test_a_folder_gives_documents_of_every_format_in_fixed_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("from a file")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    parquet.write_table(pa.table({"text": ["row 0", "row 1"], "other": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "notes.md").write_text("not ours")
    found, counts = all_of(source(tmp_path))
    assert found == {
        "a.jsonl@0": "one",
        "a.jsonl@17": "two",
        "c.jsonl.gz:0": "zipped",
        "d.parquet:0": "row 0",
        "d.parquet:1": "row 1",
        "deep/b.txt": "from a file",
    }
    assert (counts.documents, counts.broken) == (6, 0)


def test_a_single_file_and_another_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    found, _ = all_of(source(tmp_path / "a.jsonl", text_column="body"))
    assert found == {"a.jsonl@0": "one"}


def test_limits_on_documents_and_bytes_are_never_exceeded(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(10)))
    assert len(all_of(source(tmp_path, max_documents=3))[0]) == 3
    found, counts = all_of(source(tmp_path, max_bytes=20))
    assert len(found) == 2
    assert counts.text_bytes == 16


def test_a_source_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no file"):
        all_of(source(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"no document: all its records are broken \(1 empty\)"):
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


def test_a_download_needs_permission():
    with pytest.raises(UserError, match="allow_download=true"):
        all_of(SourceConfig(name="web", kind="hub", path="someone/some-data"))


def test_a_local_data_set_needs_no_permission(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    found, counts = all_of(source(tmp_path, kind="hub"))
    assert found == {"a.jsonl@0": "one"}
    assert counts.broken == 1


def test_an_unreadable_data_set_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set.py").write_text("a script")
    for path in (tmp_path, tmp_path / "set.py"):
        with pytest.raises(
            UserError,
            match=r"data\.sources\.web\.path=.* cannot be read as a dataset \(HF_HUB_OFFLINE=1 is set\)",
        ):
            all_of(source(path, kind="hub"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="cannot be read as a dataset.*gone"):
        all_of(source(tmp_path, kind="hub", options={"split": "gone"}))


def on_the_hub(monkeypatch, **data_files: list[str]) -> None:
    """Let ``datasets`` resolve a data set to these files of each split."""
    found = SimpleNamespace(config=SimpleNamespace(data_files=data_files))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: found)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_an_error_of_the_hub_while_reading_is_one_sentence(monkeypatch):
    def gated(*_, **__):
        yield {"text": "one"}
        raise PermissionError("403: the dataset is gated.\nAsk for access.")

    on_the_hub(monkeypatch, train=["hf://datasets/a/b@c0ffee/all.csv"])
    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(
        UserError,
        match=r"path=a/b cannot be read as a dataset: 403: the dataset is gated\. Ask for access; log in",
    ):
        all_of(source("a/b", kind="hub", options={"allow_download": True}))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_the_hub_are_splits_at_their_commit(tmp_path, monkeypatch, streaming):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["row"]}), tmp_path / "y.parquet")
    places = [f"hf://datasets/a/b@c0ffee/data/{name}" for name in ("x.jsonl", "y.parquet")]
    on_the_hub(monkeypatch, train=places[:1], validation=places[1:], test=["hf://datasets/a/b@c0ffee/data/z.jsonl"])
    asked = []

    def download(repo, name, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(tmp_path / name.removeprefix("data/"))

    class FileSystem:
        def open(self, place, mode):
            asked.append((place, mode))
            return (tmp_path / place.rpartition("/")[2]).open(mode)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", FileSystem)
    options = {"allow_download": True, "split": ["train", "validation"], "streaming": streaming}
    config = source("a/b", kind="hub", options=options)
    assert [shard.files[0].location for shard in list_input(config, 1).splits] == places
    found, counts = all_of(config)
    assert found == {"data/x.jsonl@0": "one", "data/x.jsonl@16": "two", "data/y.parquet:0": "row"}
    assert counts.broken == 0
    if streaming:
        assert asked == [(place, "rb") for place in places]
    else:
        assert asked == [("a/b", f"data/{name}", "dataset", "c0ffee") for name in ("x.jsonl", "y.parquet")]


def test_another_commit_is_another_source(monkeypatch):
    config, seen = source("a/b", kind="hub", options={"allow_download": True}), set()
    for commit in ("one", "two"):
        on_the_hub(monkeypatch, train=[f"hf://datasets/a/b@{commit}/x.jsonl"])
        seen.add(identity(config, list_input(config, 1).splits))
    assert len(seen) == 2


def test_named_splits_of_a_local_data_set_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"of {split}"}) + "\n")
    found, _ = all_of(source(tmp_path, kind="hub", options={"split": "validation"}))
    assert found == {"validation.jsonl@0": "of validation"}
    found, _ = all_of(source(tmp_path, kind="hub", options={"split": ["train", "validation"]}))
    assert list(found.values()) == ["of train", "of validation"]


def test_a_local_data_set_of_another_format_is_one_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("text,n\none,1\ntwo,2\n")
    config = source(tmp_path / "set", kind="hub")
    assert len(list_input(config, 1).splits) == 1
    assert all_of(config)[0] == {"train:0": "one", "train:1": "two"}


class Counting:
    """A user's own reader, as ``target`` names it."""

    def __init__(self, upto: int) -> None:
        self.upto = upto

    def __iter__(self):
        yield from ((f"number-{i}", f"this is {i}") for i in range(self.upto))
        yield "no pair"
        yield ("empty", "")


def custom(**values) -> SourceConfig:
    return SourceConfig(
        name="web",
        kind="custom",
        **{"target": f"{__name__}.Counting", "options": {"upto": 2}, **values},
    )


def test_a_users_own_class_is_read():
    check_source(custom())
    found, counts = all_of(custom())
    assert found == {"number-0": "this is 0", "number-1": "this is 1"}
    assert counts.broken == 2
    assert identity(custom(), list_input(custom(), 1).splits) == ""


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
        ("max_document_bytes=0 is below 1", {"max_document_bytes": 0}),
        (r"max_broken_share=1\.5 is not between", {"max_broken_share": 1.5}),
        ("needs kind=custom", {"target": "a.B"}),
    ],
)
def test_bad_values_of_a_source_are_refused(words, values):
    with pytest.raises(UserError, match=words):
        check_source(SourceConfig(name="web", kind="stdlib", **values))


def test_the_standard_library_is_read_without_packages_and_tests():
    modules, _ = all_of(SourceConfig(name="python", kind="stdlib", max_documents=5))
    assert len(modules) == 5
    assert not any("site-packages" in name or name.startswith("test/") for name in modules)


def test_definitions_are_parts_of_their_module():
    found, _ = all_of(SourceConfig(name="python", kind="stdlib", max_documents=40, options={"unit": "definition"}))
    assert all("#" in name for name in found)
    assert all(text.lstrip().startswith(("def ", "class ", "async def ", "@")) for text in found.values())


def test_identity_changes_with_the_files(tmp_path):
    def of(path) -> str:
        return identity(source(path), list_input(source(path), 1).splits)

    (tmp_path / "a.txt").write_text("x")
    before = of(tmp_path)
    (tmp_path / "b.txt").write_text("y")
    assert of(tmp_path) != before == of(tmp_path / "a.txt")
