"""A search of a folder: every entry is read once, or counted with its reason."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.find_files import CLOSED_FILE, CLOSED_FOLDER, DANGLING_LINK, NOT_A_FILE, FoundFiles
from lr2train.data.ingest.records import ReadCounts
from lr2train.data.ingest.sources import list_input, read_source


def written(folder: Path, *names: str, size: int = 40) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} ".ljust(size, "x"))
    return folder


def found_in(folder: Path, share: float = 1.0, **values) -> FoundFiles:
    return list_input(SourceConfig(name="web", path=str(folder), max_broken_share=share, **values), 1 << 20).found


def names(found: FoundFiles) -> list[str]:
    return [file.name for file in found.files]


def unread(found: FoundFiles) -> list[tuple[str, str]]:
    return [(one.name, one.reason) for one in found.unread]


def closing(monkeypatch, folder: Path, number: int = errno.EACCES) -> None:
    """Refuse to open a folder, as the system does to users without permission; root may open every folder."""
    scan: Callable = os.scandir

    def closed(place):
        if Path(place) == folder:
            raise OSError(number, os.strerror(number), str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", closed)


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    written(tmp_path, *(f"{folder}/{number}.txt" for folder in "ab" for number in range(5)))
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    found = found_in(tmp_path)
    assert names(found) == sorted(f"{folder}/{number}.txt" for folder in "ab" for number in range(5))
    assert sorted(found.repeated) == ["a/to_b", "b/to_a"]
    assert found.passed_over_report()["links"] == 2


def test_a_file_is_read_under_its_own_name_else_under_the_first_link_to_it(tmp_path):
    web, elsewhere = written(tmp_path / "web", "b.txt"), written(tmp_path / "elsewhere", "deep/x.txt")
    (web / "a.txt").symlink_to("b.txt")
    (web / "l1").symlink_to(elsewhere)
    (web / "l2").symlink_to(elsewhere / "deep")
    (web / "m.txt").symlink_to(elsewhere / "deep" / "x.txt")
    (web / "up").symlink_to("..")
    found = found_in(web)
    assert names(found) == ["b.txt", "l1/deep/x.txt"]
    assert sorted(found.repeated) == ["a.txt", "l2", "m.txt", "up"]
    assert not found.unread


def test_dangling_and_circular_links_are_unread(tmp_path):
    written(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("/gone/b.txt")
    (tmp_path / "c.jsonl").symlink_to("c.jsonl")
    (tmp_path / "folder").symlink_to("/gone/folder")
    (tmp_path / "notes.md").symlink_to("/gone/notes.md")
    found = found_in(tmp_path)
    assert unread(found) == [("b.txt", DANGLING_LINK), ("c.jsonl", DANGLING_LINK), ("folder", DANGLING_LINK)]
    assert found.others == {".md": [1, 0]}
    assert found.lost == (3, 120), "each counts as an average file or folder"


def test_a_closed_folder_counts_as_an_average_folder(tmp_path, monkeypatch):
    written(tmp_path, *(f"{folder}/{number}.txt" for folder in ("open", "closed") for number in range(5)))
    closing(monkeypatch, tmp_path / "closed")
    found = found_in(tmp_path)
    assert unread(found) == [("closed", CLOSED_FOLDER)]
    assert (found.readable, found.lost) == ((5, 200), (5, 200))
    with pytest.raises(
        UserError,
        match=r"path=.*: about 5 of 10 files are lost \(1 folder that may not be opened, such as closed\), .* of 0\.05",
    ) as refused:
        found_in(tmp_path, 0.05)
    assert "set data.sources.web.max_broken_share=0.5 to" in str(refused.value)
    assert names(found_in(tmp_path, 0.5)) == [f"open/{number}.txt" for number in range(5)], "the remedy leads on"


def test_the_reason_of_another_error_is_the_systems_message(tmp_path, monkeypatch):
    written(tmp_path, "a.txt", "bad/b.txt")
    closing(monkeypatch, tmp_path / "bad", errno.EIO)
    assert unread(found_in(tmp_path)) == [("bad", "Input/output error")]


def test_a_source_of_closed_folders_alone_is_refused(tmp_path, monkeypatch):
    written(tmp_path, "a.txt")
    closing(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"holds no file that we read \(1 folder that may not be opened"):
        found_in(tmp_path)


def test_closed_files_count_with_their_size(tmp_path, monkeypatch):
    written(tmp_path, "a.txt", "b.txt", "deep/c.jsonl.gz")
    access: Callable = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place).name == "a.txt" and access(place, mode))
    found = found_in(tmp_path)
    assert unread(found) == [("b.txt", CLOSED_FILE), ("deep/c.jsonl.gz", CLOSED_FILE)]
    assert found.lost == (2, 40 + 3 * 40), "compressed text is about three times as long"


def test_a_file_that_proves_closed_on_reading_is_counted(tmp_path, monkeypatch):
    """Some systems refuse a file only when it is opened."""
    written(tmp_path, "a.txt", "b.txt")

    def opened(place):
        if place.endswith("b.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return Path(place).open("rb")

    monkeypatch.setattr("lr2train.data.ingest.formats.open_input", opened)
    counts = ReadCounts()
    assert [one.id for one in read_source(SourceConfig(name="web", path=str(tmp_path)), counts)] == ["a.txt"]
    assert (counts.lost_files, counts.lost_bytes) == (["b.txt"], 40)


def test_pipes_and_sockets_are_unread(tmp_path):
    written(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s.txt"))
        assert unread(found_in(tmp_path)) == [("pipe.txt", NOT_A_FILE), ("s.txt", NOT_A_FILE)]


def test_file_names_that_are_not_utf8_get_a_printable_name(tmp_path):
    place = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(place)).write_text("text")
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"d\xff")))
    written(folder, "a.txt")
    assert [one.id for one in read_source(SourceConfig(name="web", path=str(tmp_path)), ReadCounts())] == [
        "caf\\xe9.txt",
        "d\\xff/a.txt",
    ]


def test_the_standard_library_and_local_data_sets_are_searched_too(tmp_path, monkeypatch):
    library = written(tmp_path / "lib", *(f"{folder}/m.py" for folder in ("a", "b")), "site-packages/x.py", "z.py")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    config = SourceConfig(name="web", kind="stdlib", max_broken_share=1.0)
    assert [file.name for shard in list_input(config, 1 << 20).splits for file in shard.files] == [
        "z.py",
        "a/m.py",
        "b/m.py",
    ]
    closing(monkeypatch, library / "b")
    assert unread(list_input(config, 1 << 20).found) == [("b", CLOSED_FOLDER)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (written(tmp_path / "set", "closed/x.txt") / "a.jsonl").write_text('{"text": "one"}\n')
    closing(monkeypatch, tmp_path / "set" / "closed")
    with pytest.raises(UserError, match=r"sources\.web\.path=.*set: .* folder that may not be opened, such as closed"):
        list_input(SourceConfig(name="web", kind="hub", path=str(tmp_path / "set")), 1 << 20)


def test_files_of_other_kinds_are_counted_by_suffix_and_bytes(tmp_path):
    for name in ("a.txt", "b.csv", "deep/c.csv", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    kinds = {".csv": {"files": 2, "bytes": 8}, "LICENSE": {"files": 1, "bytes": 4}}
    assert found_in(tmp_path).passed_over_report() == {"files": 3, "bytes": 12, "kinds": kinds, "links": 0}
    assert not found_in(tmp_path / "a.txt").others
    assert not list_input(SourceConfig(name="modules", kind="stdlib"), 1 << 26).found.others


def test_suffixes_in_capitals_are_read_and_hidden_entries_are_passed_over(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("A.TXT", "b.txt", ".b.txt", ".ipynb_checkpoints/b-checkpoint.txt"):
        (tmp_path / name).write_text("text of a file")
    found = found_in(tmp_path)
    assert names(found) == ["A.TXT", "b.txt"]
    assert found.others == {"hidden": [2, len("text of a file")]}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.txt").write_text("behind a link")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "web" / "self").symlink_to(tmp_path / "web")
    assert names(found_in(tmp_path / "web")) == ["link/deep/a.txt"]
