"""What lies in a folder: everything is read once, or counted with its reason; nothing is left without a word."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lr2train.config import SourceConfig, UserError
from lr2train.data.ingest.find_files import CLOSED_FILE, CLOSED_FOLDER, NO_FILE, NOWHERE, Found
from lr2train.data.ingest.formats import ReadCounts
from lr2train.data.ingest.sources import listing, read


def written(folder: Path, *names: str, size: int = 40) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} ".ljust(size, "x"))
    return folder


def found_in(folder: Path, share: float = 1.0, **values) -> Found:
    return listing(SourceConfig(name="web", path=str(folder), max_broken_share=share, **values), 1 << 20).found


def names(found: Found) -> list[str]:
    return [file.name for file in found.files]


def unread(found: Found) -> list[tuple[str, str]]:
    return [(one.name, one.reason) for one in found.unread]


def closing(monkeypatch, folder: Path, number: int = errno.EACCES) -> None:
    """As the system does to users who may not open a folder; root may open all."""
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
    assert sorted(found.again) == ["a/to_b", "b/to_a"]
    assert found.about_others()["links"] == 2


def test_a_file_is_read_under_its_own_name_else_under_the_first_link_to_it(tmp_path):
    web, elsewhere = written(tmp_path / "web", "b.txt"), written(tmp_path / "elsewhere", "deep/x.txt")
    (web / "a.txt").symlink_to("b.txt")
    (web / "l1").symlink_to(elsewhere)
    (web / "l2").symlink_to(elsewhere / "deep")
    (web / "m.txt").symlink_to(elsewhere / "deep" / "x.txt")
    (web / "up").symlink_to("..")
    found = found_in(web)
    assert names(found) == ["b.txt", "l1/deep/x.txt"]
    assert sorted(found.again) == ["a.txt", "l2", "m.txt", "up"]
    assert not found.unread


def test_links_to_nothing_and_to_themselves_are_unread(tmp_path):
    written(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("/gone/b.txt")
    (tmp_path / "c.jsonl").symlink_to("c.jsonl")
    (tmp_path / "folder").symlink_to("/gone/folder")
    (tmp_path / "notes.md").symlink_to("/gone/notes.md")
    found = found_in(tmp_path)
    assert unread(found) == [("b.txt", NOWHERE), ("c.jsonl", NOWHERE), ("folder", NOWHERE)]
    assert found.others == {".md": [1, 0]}
    assert found.lost == (3, 120), "each counts as an average file or folder"


def test_a_folder_that_may_not_be_opened_counts_as_an_average_one(tmp_path, monkeypatch):
    written(tmp_path, *(f"{folder}/{number}.txt" for folder in ("open", "closed") for number in range(5)))
    closing(monkeypatch, tmp_path / "closed")
    found = found_in(tmp_path)
    assert unread(found) == [("closed", CLOSED_FOLDER)]
    assert (found.held, found.lost) == ((5, 200), (5, 200))
    with pytest.raises(
        UserError, match=r"path=.*: about 5 of 10 files are lost \(1 folder that may not be opened, such as closed\), .* of 0\.05"
    ) as refused:
        found_in(tmp_path, 0.05)
    assert "set data.sources.web.max_broken_share=0.5 to" in str(refused.value)
    assert names(found_in(tmp_path, 0.5)) == [f"open/{number}.txt" for number in range(5)], "the remedy leads on"


def test_another_error_of_a_folder_keeps_its_words(tmp_path, monkeypatch):
    written(tmp_path, "a.txt", "bad/b.txt")
    closing(monkeypatch, tmp_path / "bad", errno.EIO)
    assert unread(found_in(tmp_path)) == [("bad", "Input/output error")]


def test_a_source_of_nothing_but_closed_folders_says_so(tmp_path, monkeypatch):
    written(tmp_path, "a.txt")
    closing(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"holds no file that we read \(1 folder that may not be opened"):
        found_in(tmp_path)


def test_files_that_may_not_be_opened_count_with_their_size(tmp_path, monkeypatch):
    written(tmp_path, "a.txt", "b.txt", "deep/c.jsonl.gz")
    access: Callable = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place).name == "a.txt" and access(place, mode))
    found = found_in(tmp_path)
    assert unread(found) == [("b.txt", CLOSED_FILE), ("deep/c.jsonl.gz", CLOSED_FILE)]
    assert found.lost == (2, 40 + 3 * 40), "compressed text is about three times as long"


def test_a_file_that_turns_out_to_be_closed_is_counted_where_it_is_read(tmp_path, monkeypatch):
    """Where the system says only then that it may not be opened."""
    written(tmp_path, "a.txt", "b.txt")

    def opened(place):
        if place.endswith("b.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return Path(place).open("rb")

    monkeypatch.setattr("lr2train.data.ingest.formats.opened", opened)
    tally = ReadCounts()
    assert [one.id for one in read(SourceConfig(name="web", path=str(tmp_path)), tally)] == ["a.txt"]
    assert (tally.lost_files, tally.lost_bytes) == (["b.txt"], 40)


def test_pipes_and_sockets_are_no_text(tmp_path):
    written(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s.txt"))
        assert unread(found_in(tmp_path)) == [("pipe.txt", NO_FILE), ("s.txt", NO_FILE)]


def test_file_names_of_another_encoding_are_read_under_a_printable_name(tmp_path):
    place = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(place)).write_text("text")
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"d\xff")))
    written(folder, "a.txt")
    assert [one.id for one in read(SourceConfig(name="web", path=str(tmp_path)), ReadCounts())] == ["caf\\xe9.txt", "d\\xff/a.txt"]


def test_other_kinds_are_passed_over_with_their_bytes(tmp_path):
    written(tmp_path, "a.txt", "b.md", "deep/c.md", "README")
    about = found_in(tmp_path).about_others()
    assert (about["files"], about["bytes"], about["kinds"][".md"]) == (3, 120, {"files": 2, "bytes": 80})


def test_the_standard_library_and_local_data_sets_are_looked_through_too(tmp_path, monkeypatch):
    library = written(tmp_path / "lib", *(f"{folder}/m.py" for folder in ("a", "b")), "site-packages/x.py", "z.py")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    config = SourceConfig(name="web", kind="stdlib", max_broken_share=1.0)
    assert [file.name for shard in listing(config, 1 << 20).shards for file in shard.files] == ["z.py", "a/m.py", "b/m.py"]
    closing(monkeypatch, library / "b")
    assert unread(listing(config, 1 << 20).found) == [("b", CLOSED_FOLDER)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (written(tmp_path / "set", "closed/x.txt") / "a.jsonl").write_text('{"text": "one"}\n')
    closing(monkeypatch, tmp_path / "set" / "closed")
    with pytest.raises(UserError, match=r"sources\.web\.path=.*set: .* folder that may not be opened, such as closed"):
        listing(SourceConfig(name="web", kind="hub", path=str(tmp_path / "set")), 1 << 20)
